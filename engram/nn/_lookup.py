"""Embeddings whose rows come from a table: one layer's, or those of all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from engram.errors import SelectionError, TokenError
from engram.gpu.dequantize import dequantize
from engram.gpu.tier import GpuTier
from engram.nn._prepared import Prepared, gpu_tier, prepare
from engram.rows import RowFormat, Rows
from engram.sizes import parse_size
from engram.tiers import Prefetch, Selection, chosen

if TYPE_CHECKING:
    from engram.table import Table


Ids = torch.Tensor | np.ndarray[Any, Any]
_CPU = torch.device("cpu")


class TableRef:
    """Keeps a table inside a module: a copy of the module shares it, a pickle refuses it.

    Attributes:
        tiers: those that serve the module, by device.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.tiers: dict[torch.device, GpuTier] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TableRef:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self.table!r} is open in this process and cannot be pickled; open or connect the "
            "table where the model is needed and build its modules there (state_dict() works)"
        )


class LayerRows:
    """The rows of one step, on a device; `rows[layer]` are that layer's embeddings.

    Attributes:
        layers: the model layer indices it holds.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor | None,
        row_format: RowFormat,
        layers: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.layers = layers
        self._values = values
        self._scales = scales
        self._row_format = row_format
        self._dtype = dtype

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Decode one layer: `[*tokens.shape, columns * dim]`.

        Raises:
            SelectionError: a layer that was not looked up.
        """
        return self.decode(layer, self._dtype, self._values.device)

    def wait(self) -> LayerRows:
        """As `Prepared.wait`: nothing is left to wait for."""
        return self

    def decode(self, layer: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `[layer]`, in another dtype or on another device."""
        if layer not in self.layers:
            raise SelectionError(f"layer {layer} was not looked up; layers are {self.layers}")
        position = self.layers.index(layer)
        values = self._values.select(-3, position).to(device)
        scales = None if self._scales is None else self._scales.select(-3, position).to(device)
        return dequantize(values, scales, self._row_format, dtype).flatten(-2)


def read(
    table: Table,
    tokens: Ids,
    batch: dict[str, Any],
    layers: tuple[int, ...],
    columns: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> LayerRows:
    """One `Table.lookup`, its bytes brought to `device` without waiting for it: what serves where
    there is no GPU tier.

    Bytes bound for a CUDA device land in pinned memory, which torch reuses only after the copy
    from it has finished.

    Args:
        batch: `starts`, `history` and `dead` of the lookup.
    """
    shape = (*tokens.shape, len(layers), len(columns))
    pinned = device.type == "cuda"
    row_format = table.row_format
    values = torch.empty((*shape, row_format.value_bytes), dtype=torch.uint8, pin_memory=pinned)
    scales = None
    if row_format.scale_bytes:
        scales = torch.empty((*shape, row_format.scale_bytes), dtype=torch.uint8, pin_memory=pinned)
    out = Rows(values.numpy(), None if scales is None else scales.numpy())
    host = {name: _on_host(part) for name, part in batch.items()}
    table.lookup(_on_host(tokens), **host, layers=layers, columns=columns, out=out)
    values = values.to(device, non_blocking=True)
    scales = None if scales is None else scales.to(device, non_blocking=True)
    return LayerRows(values, scales, row_format, layers, dtype)


def _require_ids(tokens: Ids) -> None:
    if isinstance(tokens, torch.Tensor) and (
        tokens.is_floating_point() or tokens.dtype == torch.bool
    ):
        raise TokenError(f"token ids must be integers, not {tokens.dtype}")


def _on_host(part: Any) -> Any:
    return part.numpy(force=True) if isinstance(part, torch.Tensor) else part


def _device_of(tokens: Ids) -> torch.device:
    return tokens.device if isinstance(tokens, torch.Tensor) else _CPU


class EngramLookup(nn.Module):
    """Looks the rows of several layers up at once: call it once per step, then hand each layer
    its own, `rows = lookup(tokens, history=history); rows[1]; rows[14]`.

    It has no parameters and nothing in its state dict. A deep copy shares the table; pickling
    raises TypeError, because a table is open in one process.

    Args:
        table: from `engram.open` or `engram.connect`.
        dtype: floating dtype of the embeddings; see `engram.nn.dequantize` for the rounding.
        layers: model layer indices, 0-based; all of the table when None.
        columns: column numbers, in the order wanted; all when None.
        device: where the embeddings go; when None, where the tokens are. Tokens kept on the host
            with `device` naming a CUDA device spare the wait for a copy of them. `cuda` is the
            device that is the current one at the first call.
        hbm: memory on a CUDA device for n-grams that come again, like `"2GiB"` or in bytes.

    Raises:
        SelectionError: a layer or column that the table lacks, or a dtype that is not floating.
        ConfigError: `hbm` is no size. More than the device has free is refused by the first call.
    """

    def __init__(
        self,
        table: Table,
        dtype: torch.dtype = torch.bfloat16,
        layers: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        hbm: int | str = 0,
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise SelectionError(f"embeddings need a floating dtype, not {dtype}")
        self.layers = chosen("layer", layers, table.layers)
        self.columns = chosen("column", columns, table.columns)
        self.dtype = dtype
        self.device = None if device is None else torch.device(device)
        self.hbm = parse_size(hbm)
        self._selection = Selection.of(table.spec, self.layers, self.columns)
        self._ref = TableRef(table)

    @property
    def table(self) -> Table:
        return self._ref.table

    @property
    def embedding_dim(self) -> int:
        """Width of a layer's embeddings: columns * dim."""
        return len(self.columns) * self.table.row_format.dim

    @torch.compiler.disable
    def forward(
        self,
        tokens: Ids,
        starts: Ids | None = None,
        history: Ids | None = None,
        dead: Ids | None = None,
    ) -> LayerRows | Prepared:
        """Look up all layers for `tokens`.

        Args:
            tokens: integer ids `[T]` with `starts`; else `[L]` or `[B, L]`. A tensor, or a NumPy
                array, as all of these may be.
            starts, history, dead: as for `Table.lookup`.

        Returns:
            Each layer's embeddings `[*tokens.shape, columns * dim]`, by model layer index.

        Raises: as `Table.lookup`.
        """
        device = self.device or _device_of(tokens)
        tier = self._tier_on(device)
        if tier is not None:
            return self._prepare(tier, tokens, starts, history, dead).wait()
        _require_ids(tokens)
        batch = {"starts": starts, "history": history, "dead": dead}
        return read(self.table, tokens, batch, self.layers, self.columns, self.dtype, device)

    def prepare(
        self,
        tokens: Ids,
        starts: Ids | None = None,
        history: Ids | None = None,
        dead: Ids | None = None,
        out: torch.Tensor | None = None,
        after: Any = None,
    ) -> LayerRows | Prepared:
        """Begin a step: its embeddings are gathered on a stream of their own, beside whatever the
        device does. Call `wait` on the result at the first layer that needs them.

        With a captured CUDA graph, pass the same `out` for each replay, which the graph reads:
        `prepare(tokens, out=out).wait(); graph.replay()`. Capture with
        `capture_error_mode="thread_local"` once a step was prepared: threads of the GPU tier ask
        the device meanwhile what has ended.

        Args:
            tokens, starts, history, dead: as for `forward`; on the host, or the step waits for
                their copy. NumPy arrays cost the host least.
            out: to be filled, dtype `[layers, *tokens.shape, columns * dim]` on the device; fresh
                memory when None.
            after: CUDA event behind which `out` may be written; when None, behind all that the
                current stream has queued.

        Raises: as `forward`; SelectionError for an `out` that does not fit.
        """
        device = self.device or _device_of(tokens)
        tier = self._tier_on(device)
        if tier is None:
            if out is not None:
                raise SelectionError(f"out is for tables with a GPU tier; {device} has none here")
            rows: LayerRows = self.forward(tokens, starts, history, dead)
            return rows
        return self._prepare(tier, tokens, starts, history, dead, out, after)

    def _tier_on(self, device: torch.device) -> GpuTier | None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
            if self.device is not None:
                self.device = device
        found = self._ref.tiers.get(device)
        if found is None:
            found = gpu_tier(self.table, self._selection, device, self.hbm)
            if found is not None:
                self._ref.tiers[device] = found
        return found

    def _prepare(
        self,
        tier: GpuTier,
        tokens: Ids,
        starts: Any,
        history: Any,
        dead: Any,
        out: torch.Tensor | None = None,
        after: Any = None,
    ) -> Prepared:
        _require_ids(tokens)
        batch = self.table.spec.batch(
            _on_host(tokens), _on_host(starts), _on_host(history), _on_host(dead)
        )
        return prepare(tier, batch.windows, batch.shape, self.layers, self.dtype, out, after)

    def prefetch(
        self,
        tokens: Ids,
        starts: Ids | None = None,
        history: Ids | None = None,
        dead: Ids | None = None,
    ) -> Prefetch:
        """Bring the rows of a coming call closer, up to the device; returns at once, with what
        cancels it."""
        parts = [_on_host(part) for part in (tokens, starts, history, dead)]
        return self.table.prefetch(*parts, **({"tier": "gpu"} if self.hbm else {}))

    def extra_repr(self) -> str:
        return f"{self.table!r}, layers={list(self.layers)}, dtype={self.dtype}"


class EngramEmbedding(nn.Module):
    """One layer's n-gram embeddings: tokens in, `[*tokens.shape, columns * dim]` out.

    A drop-in for the embedding of a model whose table is not resident. A model with several such
    layers reads each n-gram once if it uses `EngramLookup` instead.

    Args:
        table: from `engram.open` or `engram.connect`.
        layer: model layer index, 0-based.
        dtype, columns, device, hbm: as for `EngramLookup`.

    Raises:
        SelectionError: a layer or column that the table lacks, or a dtype that is not floating.
    """

    def __init__(
        self,
        table: Table,
        layer: int,
        dtype: torch.dtype = torch.bfloat16,
        columns: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        hbm: int | str = 0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.lookup = EngramLookup(table, dtype, [layer], columns, device, hbm)

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings: columns * dim."""
        return self.lookup.embedding_dim

    def forward(
        self,
        tokens: Ids,
        starts: Ids | None = None,
        history: Ids | None = None,
        dead: Ids | None = None,
    ) -> torch.Tensor:
        """Embed `tokens`; arguments and errors as for `EngramLookup.forward`."""
        rows: LayerRows | Prepared = self.lookup(tokens, starts, history, dead)
        return rows[self.layer]

    def prepare(
        self,
        tokens: Ids,
        starts: Ids | None = None,
        history: Ids | None = None,
        dead: Ids | None = None,
        out: torch.Tensor | None = None,
        after: Any = None,
    ) -> LayerRows | Prepared:
        """As `EngramLookup.prepare`, for this layer alone."""
        rows: LayerRows | Prepared = self.lookup.prepare(tokens, starts, history, dead, out, after)
        return rows
