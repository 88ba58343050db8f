"""The SSD tier: n-grams hashed to row ids, rows read from a table's file and checked."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from engram.errors import RowIntegrityError, SpecMismatchError
from engram.rows import RowFormat, Rows
from engram.spec import NgramSpec
from engram.store.manifest import Schema
from engram.store.reader import StoreReader
from engram.tiers import Int64s, Ngrams, Selection, Tier

_PREFETCHES_MAX = 64


def schema_of(spec: NgramSpec, row_format: RowFormat) -> Schema:
    """What a table of `spec` holds; `SsdTier` reads the spec back from it.

    Raises:
        SpecMismatchError: rows of another width than the spec's.
    """
    if row_format.dim != spec.dim:
        raise SpecMismatchError(
            f"the spec has {spec.dim} values in a row, the row format {row_format.dim}", "dim"
        )
    layers = tuple((layer.layer, layer.rows) for layer in spec.layers)
    return Schema(spec.to_json(), row_format, layers, spec.token_map)


class SsdTier(Tier):
    """Reads a table on local disk.

    Args:
        path: the table's directory.
        guard: read through a memory map, with the SIGBUS guard installed in this process; else
            with `pread`, which needs no signal handler.

    Raises:
        StoreError: no table there, or one that cannot be used.
        CorruptTableError: its structure is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, guard: bool = False) -> None:
        self._reader = StoreReader(Path(path), guard=guard)
        manifest = self._reader.manifest
        self.name = str(path)
        self.row_format = manifest.row_format
        self.fingerprint = manifest.fingerprint
        self.spec = NgramSpec.from_json(manifest.spec, self._reader.token_map)
        needed = schema_of(self.spec, self.row_format).layers
        if needed != manifest.layers:
            raise SpecMismatchError(
                f"{path}: its spec needs (layer, rows) {needed}, it holds {manifest.layers}; "
                "import the table again",
                "layers",
            )
        self._everything = Selection.of(self.spec)
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(
            ("ngrams_read", "rows_read", "rows_failed", "prefetches", "prefetches_dropped"), 0
        )
        self._background: ThreadPoolExecutor | None = None
        self._owner = os.getpid()
        self._queued = 0

    def read(self, ngrams: Ngrams, selection: Selection, out: Rows, places: Int64s) -> None:
        layers, row_ids = self._rows_of(ngrams, selection)
        self._gather(layers, row_ids, places, out, ngrams=len(ngrams))

    def read_rows(self, layer: int, row_ids: Int64s, out: Rows, places: Int64s) -> None:
        self._gather(np.full(len(row_ids), layer, np.int32), row_ids, places, out, ngrams=0)

    def _rows_of(self, ngrams: Ngrams, selection: Selection) -> tuple[Any, Int64s]:
        return self.spec.ngram_rows(
            ngrams.windows,
            ngrams.orders,
            selection.layer_array,
            selection.column_array,
            selection.ordered,
            selection.order_bounds,
        )

    def _gather(self, layers: Any, row_ids: Int64s, places: Int64s, out: Rows, ngrams: int) -> None:
        failed = 0
        try:
            self._reader.gather(layers, row_ids, places, out)
        except RowIntegrityError as error:
            failed = sum(len(rows) for rows in error.failures.values())
            raise
        finally:
            self._count(ngrams_read=ngrams, rows_read=len(row_ids), rows_failed=failed)

    def _count(self, **increments: int) -> None:
        with self._lock:
            for counter, increment in increments.items():
                self._counters[counter] += increment

    def prefetch(self, ngrams: Ngrams) -> None:
        with self._lock:
            if self._background is None or self._owner != os.getpid():
                self._background = ThreadPoolExecutor(1, thread_name_prefix="engram-prefetch")
                self._owner, self._queued = os.getpid(), 0
            background = self._background
            # A backlog means that reads cannot keep up: more hints would only arrive late.
            full = self._queued >= _PREFETCHES_MAX
            self._queued += not full
            self._counters["prefetches_dropped" if full else "prefetches"] += 1
        if not full:
            background.submit(self._touch, ngrams)

    def _touch(self, ngrams: Ngrams) -> None:
        try:
            self._reader.touch(*self._rows_of(ngrams, self._everything))
        finally:
            with self._lock:
                self._queued -= 1

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {"tier": "ssd", **self._counters}

    def check_integrity(self) -> None:
        with self._lock:
            assert 0 <= self._queued <= _PREFETCHES_MAX
            assert all(count >= 0 for count in self._counters.values())

    def close(self) -> None:
        with self._lock:
            background, self._background = self._background, None
        if background is not None and self._owner == os.getpid():
            background.shutdown(cancel_futures=True)
        self._reader.close()
