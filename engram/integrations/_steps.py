"""One lookup per forward of a model, shared by all of its layers that read the same tokens.

How layers that know nothing of each other share it

1. A hook at the model's entry opens a step. If it can tell the ids the layers will get, it copies
   them and the history before them to the host. With a GPU tier it then prepares the embeddings of
   all layers, beside which the device computes what comes before the first of them; without, it
   starts a prefetch.
2. The first layer that asks reads the rows of all layers, unless they are prepared; the others take
   theirs from the step.
3. A layer belongs to the step if it asks for the first time and its ids and history are the very
   tensors the step was opened with, or else if they hold the same numbers. One that does not
   belong is looked up by itself: sharing saves time and never decides what a layer gets.
4. A hook at the exit closes the step, also after an error, and frees its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from engram.gpu.tier import GpuTier
from engram.nn._lookup import LayerRows, TableRef, read
from engram.nn._prepared import Prepared, gpu_tier, prepare
from engram.tiers import Selection

if TYPE_CHECKING:
    from engram.table import Table

Int64s = npt.NDArray[np.int64]
States = Mapping[int, torch.Tensor | None]
"""For each layer, the ids before the chunk `[B, any]`, or None before the start."""


@dataclass
class Request:
    """What the layers of one step read.

    Attributes:
        ids, states: the tensors it was made from.
        tokens: `ids` on the host, int64 `[B, L]`.
        history: `states` on the host, int64 `[B, max_order - 1]` each.
    """

    ids: torch.Tensor
    states: States
    tokens: Int64s
    history: dict[int, Int64s]

    @classmethod
    def of(cls, ids: torch.Tensor, states: States, width: int) -> Request:
        """Copy ids and states to the host, in one transfer from where `ids` are."""
        present = [state for state in states.values() if state is not None]
        parts = [part.detach().to(ids.device, torch.int64) for part in (ids, *present)]
        joined = torch.cat(parts, dim=-1).cpu().numpy()
        pieces = np.split(joined, np.cumsum([part.shape[-1] for part in parts])[:-1], axis=-1)
        tokens, before = pieces[0], iter(pieces[1:])
        blank = np.full((len(tokens), width), -1, np.int64)
        history = {
            layer: blank if state is None else _last(next(before), blank)
            for layer, state in states.items()
        }
        return cls(ids, states, tokens, history)

    def shared_history(self) -> Int64s | None:
        """The history, where all layers have the same."""
        first, *others = self.history.values()
        return first if all(np.array_equal(first, other) for other in others) else None

    def covers(self, other: Request, layer: int) -> bool:
        """Whether `layer` reads the same rows by either."""
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(
            self.history[layer], other.history[layer]
        )


def _last(before: Int64s, blank: Int64s) -> Int64s:
    """The last columns of `before`, as many as `blank` has; -1 where there are fewer."""
    joined: Int64s = np.concatenate([blank, before], axis=-1)
    return joined[:, -blank.shape[1] :]


@dataclass
class _Step:
    dtype: torch.dtype
    request: Request | None = None
    rows: LayerRows | Prepared | None = None
    served: set[int] = field(default_factory=set)


class SharedLookup:
    """Opens and closes steps, and gives layers their embeddings.

    A deep copy shares the table and begins without a step. Threads have steps of their own.

    Args:
        table: where rows come from.
        layers: model layer indices that share a step.
        hbm: bytes on a CUDA device for n-grams that come again.
    """

    def __init__(self, table: Table, layers: tuple[int, ...], hbm: int = 0) -> None:
        self._ref = TableRef(table)
        self._hbm = hbm
        self.layers = layers
        self._selection = Selection.of(table.spec, layers)
        self.width = table.spec.max_order - 1
        self._steps: dict[int, _Step] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedLookup:
        return SharedLookup(self.table, self.layers, self._hbm)

    @property
    def table(self) -> Table:
        return self._ref.table

    @torch.compiler.disable
    def open(
        self, ids: torch.Tensor | None, states: States, dtype: torch.dtype = torch.float32
    ) -> None:
        """Begin a step of this thread, and what brings its rows if the ids are known already.

        Args:
            ids: that the layers will get.
            states: that they will get.
            dtype: that all of them will ask for; float32 where they differ.

        Raises: as `Table.lookup`.
        """
        step = self._steps[threading.get_ident()] = _Step(dtype)
        if ids is None:
            return
        step.request = Request.of(ids, states, self.width)
        history = step.request.shared_history()
        if history is None:
            return
        if self._tier(self.layers, ids.device) is None:
            self.table.prefetch(step.request.tokens, history=history)
        else:
            step.rows = self._read(step.request, self.layers, history, dtype)

    @torch.compiler.disable
    def close(self) -> None:
        """End this thread's step, if there is one."""
        self._steps.pop(threading.get_ident(), None)

    @torch.compiler.disable
    def embeddings(
        self, layer: int, ids: torch.Tensor, states: States, dtype: torch.dtype
    ) -> torch.Tensor:
        """Embeddings `[B, L, columns * dim]` of one layer, where `ids` are."""
        step = self._steps.get(threading.get_ident())
        if step is None:
            request = Request.of(ids, {layer: states[layer]}, self.width)
            rows = self._read(request, (layer,), request.history[layer], dtype)
            return rows.decode(layer, dtype, ids.device)
        request = self._join(step, layer, ids, states)
        # What was rounded for others is not what this layer asks for.
        fits = step.dtype in (dtype, torch.float32)
        if step.rows is None and fits and request.shared_history() is not None:
            step.rows = self._read(request, self.layers, request.history[layer], step.dtype)
        shared = step.rows if fits else None
        rows = shared or self._read(request, (layer,), request.history[layer], dtype)
        return rows.decode(layer, dtype, ids.device)

    def _join(self, step: _Step, layer: int, ids: torch.Tensor, states: States) -> Request:
        """The step's request if it covers this layer, else one of this layer's making."""
        known = step.request
        # A cache may update its tensors in place, so the same tensor counts only once.
        first = layer not in step.served
        step.served.add(layer)
        if known and first and ids is known.ids and states[layer] is known.states[layer]:
            return known
        own = Request.of(ids, states, self.width)
        if known and known.covers(own, layer):
            known.ids = ids
            return known
        step.request, step.rows = own, None
        return own

    def _tier(self, layers: tuple[int, ...], device: torch.device) -> GpuTier | None:
        if layers == self.layers:
            return gpu_tier(self.table, self._selection, device, self._hbm)
        # A layer that reads by itself does so rarely: no device memory for that.
        return gpu_tier(self.table, Selection.of(self.table.spec, layers), device, 0)

    def _read(
        self, request: Request, layers: tuple[int, ...], history: Int64s, dtype: torch.dtype
    ) -> LayerRows | Prepared:
        device = request.ids.device
        tier = self._tier(layers, device)
        if tier is not None:
            given = self.table.spec.batch(request.tokens, history=history)
            return prepare(tier, given.windows, given.shape, layers, dtype, None)
        batch = {"starts": None, "history": history, "dead": None}
        return read(self.table, request.tokens, batch, layers, self.table.columns, dtype, device)
