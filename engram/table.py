"""Tables as model code sees them: tokens in, rows out, whichever tier answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from engram._counters import Counters
from engram._ngrams import copy_repeated_rows, distinct_ngrams, distinct_rows
from engram.errors import RowIntegrityError, SelectionError
from engram.ram.limits import DEFAULT_SHARE, check_budget, memory_allowed
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat, Rows
from engram.sizes import parse_size
from engram.spec import NgramSpec
from engram.ssd import SsdTier
from engram.tiers import Ngrams, Prefetch, Prefetches, Selection, Tier

RAM_BYTES_DEFAULT = 1 << 30
_SELECTIONS_KEPT = 64


class Table:
    """One n-gram memory table. Methods may be called from several threads at once.

    Get one from `engram.open` (this process reads the files) or `engram.connect` (a sidecar does).
    Use it as a context manager, or call `close`.

    Attributes:
        spec: how tokens become row ids.
        row_format: how rows are stored.
        layers: model layer indices, 0-based, in spec order.
        columns: all column numbers.
        fingerprint: digest of the content, equal wherever the same rows are stored.
        name: how messages name the table.
        on_devices: its `engram.gpu.tier.GpuTier`s in this process, closed with it.
    """

    spec: NgramSpec
    row_format: RowFormat
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    fingerprint: str
    name: str

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.spec = tier.spec
        self.row_format = tier.row_format
        self.layers = tier.spec.layer_ids
        self.columns = tuple(range(tier.spec.num_columns))
        self.fingerprint = tier.fingerprint
        self.name = tier.name
        self._everything = Selection.of(tier.spec)
        self._counters = Counters("lookups", "tokens", "lookups_failed")
        self._selections: dict[tuple[Any, Any], Selection] = {}
        self.on_devices: list[Any] = []

    def lookup(
        self,
        tokens: npt.ArrayLike,
        starts: npt.ArrayLike | None = None,
        history: npt.ArrayLike | None = None,
        dead: npt.ArrayLike | None = None,
        layers: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        out: Rows | None = None,
    ) -> Rows:
        """Read the rows of every n-gram that ends at each token.

        Args:
            tokens: ids `[T]` of all sequences with `starts`; else `[L]` or `[B, L]`.
            starts: int `[B + 1]`, boundaries of the sequences in `tokens`.
            history: int `[B, max_order - 1]`, ids just before each sequence, oldest first; -1 is
                before the start, or dead.
            dead: bool, shaped like `tokens`: positions that take no part.
            layers: model layer indices; all when None.
            columns: column numbers; all when None.
            out: buffers to fill, `[*tokens.shape, layers, columns]` rows; made when None.

        Returns:
            Rows `[*tokens.shape, layers, columns]`, layers and columns in the order asked for.

        Raises:
            TokenError: ids, starts, history or dead that do not fit the spec.
            SelectionError: no such layer or column, or an `out` that does not fit.
            RowIntegrityError: some rows failed, named; all others in `out` are valid.
            ServiceError: the sidecar could not serve.
        """
        selection = self._selection(layers, columns)
        batch = self.spec.batch(tokens, starts, history, dead)
        shape = (*batch.shape, len(selection.layers), len(selection.columns))
        if out is None:
            out = Rows.empty(shape, self.row_format)
        flat = _flat(out, shape, self.row_format)
        try:
            self._tier.lookup(batch.windows, selection, flat)
        except BaseException:
            self._counters.add(lookups=1, tokens=len(batch.tokens), lookups_failed=1)
            raise
        self._counters.add(lookups=1, tokens=len(batch.tokens))
        return out

    def lookup_rows(self, layer: int, row_ids: npt.ArrayLike, out: Rows | None = None) -> Rows:
        """Read rows by id, for callers that hash themselves.

        Args:
            layer: model layer index.
            row_ids: integers of any shape, each in `[0, rows of the layer)`.
            out: buffers to fill, one row per id; made when None.

        Returns:
            Rows shaped like `row_ids`.

        Raises: as `lookup`; SelectionError also for a row id that does not exist.
        """
        ids = np.asarray(row_ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise SelectionError(f"row ids must be integers, not {ids.dtype}")
        position = Selection.of(self.spec, [layer]).layers[0]
        limit = self.spec.layers[position].rows
        bad = (ids < 0) | (ids >= limit)
        if bad.any():
            raise SelectionError(
                f"row {int(ids[bad].flat[0])} does not exist; "
                f"layer {layer} has rows 0 to {limit - 1}"
            )
        if out is None:
            out = Rows.empty(ids.shape, self.row_format)
        flat = _flat(out, ids.shape, self.row_format)
        ids_flat = np.ascontiguousarray(ids, np.int64).reshape(-1)
        places, first = distinct_rows(ids_flat)
        try:
            self._tier.read_rows(position, ids_flat[places], flat, places)
        except RowIntegrityError:
            copy_repeated_rows(first, flat)
            raise
        copy_repeated_rows(first, flat)
        return out

    def prefetch(
        self,
        tokens: npt.ArrayLike,
        starts: npt.ArrayLike | None = None,
        history: npt.ArrayLike | None = None,
        dead: npt.ArrayLike | None = None,
        *,
        tier: str = "ram",
    ) -> Prefetch:
        """Bring the rows of a coming `lookup` closer; returns at once.

        It gives way to lookups. Several continuations of one context (speculation) may go into
        one call, as sequences of a batch.

        Args and raises: as `lookup`, but rows that cannot be read are left for the lookup to name.
            tier: how far: `"ram"`, or `"gpu"`, into the device memory that `engram.nn` modules of
                this table keep (their `hbm`); as far as there is a tier.

        Returns:
            a handle to cancel it with, once its request has gone away.
        """
        windows = self.spec.windows(tokens, starts, history, dead)
        windows = windows.reshape(-1, self.spec.max_order)
        ngrams: Ngrams
        ngrams, _, _ = distinct_ngrams(windows, self.spec.min_order, self._everything)
        if tier not in ("ram", "gpu"):
            raise SelectionError(f"tier must be 'ram' or 'gpu', not {tier!r}")
        if not len(ngrams):
            return Prefetch()
        if tier == "gpu" and self.on_devices:
            return Prefetches([each.prefetch(ngrams) for each in self.on_devices])
        return self._tier.prefetch(ngrams)

    def stats(self) -> dict[str, Any]:
        """Counters since the table was opened, with those of its tiers, fastest first, under
        `"tiers"`."""
        tiers = [each.stats() for each in self.on_devices]
        tier: Tier | None = self._tier
        while tier is not None:
            tiers.append(tier.stats())
            tier = tier.backing
        return {"table": self.name, **self._counters.read(), "tiers": tiers}

    def close(self) -> None:
        """Free files, maps and connections; safe to call twice."""
        try:
            for each in self.on_devices:
                each.close()
        finally:
            self._tier.close()

    def _selection(self, layers: Sequence[int] | None, columns: Sequence[int] | None) -> Selection:
        if layers is None and columns is None:
            return self._everything
        try:
            key = (_as_key(layers), _as_key(columns))
            selection = self._selections.get(key)
        except TypeError:  # of something that is no list of numbers: refused below
            return Selection.of(self.spec, layers, columns)
        if selection is None:
            selection = Selection.of(self.spec, layers, columns)
            if len(self._selections) >= _SELECTIONS_KEPT:
                self._selections.clear()
            self._selections[key] = selection
        return selection

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<engram.Table {self.name}: {self.spec.family}, layers {list(self.layers)}, "
            f"{len(self.columns)} columns, {self.row_format.name} x {self.row_format.dim}>"
        )


def _flat(out: Rows, shape: tuple[int, ...], row_format: RowFormat) -> Rows:
    if not isinstance(out, Rows):
        raise SelectionError(
            f"out must be engram.Rows, not {type(out).__name__}; make one with Rows.empty"
        )
    return out.flat(shape, row_format)


def _as_key(chosen: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if chosen is None else tuple(chosen)


def open(
    path: str | os.PathLike[str], *, ram: int | str | None = None, guard: bool = False
) -> Table:
    """Open a table on local disk, read by this process itself.

    Args:
        path: the table's directory, made by `engram import` or `engram synth`.
        ram: memory for n-grams that were looked up, like `"8GiB"` or in bytes; 0 keeps none. When
            None, 1 GiB, or a quarter of what this process may use if that is less. It is taken as
            n-grams come in, not at once.
        guard: read through a memory map instead of `pread`: faster for rows in the page cache,
            but installs a SIGBUS handler in this process.

    Raises:
        StoreError: no table there, or one that cannot be used.
        CorruptTableError: its structure is damaged.
        ConfigError: `ram` is no size, or more than this process may use.
    """
    if ram is None:
        budget = min(RAM_BYTES_DEFAULT, memory_allowed() // DEFAULT_SHARE)
    else:
        budget = parse_size(ram)
        check_budget(budget)
    tier = SsdTier(path, guard=guard)
    try:
        (ram_tier,) = ram_tiers({tier.name: tier}, budget, shared=False).values()
    except BaseException:
        tier.close()
        raise
    return Table(ram_tier)
