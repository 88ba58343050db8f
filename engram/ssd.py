"""The SSD tier: n-grams hashed to row ids, rows read from a table's file and checked."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from engram._background import Background
from engram._counters import SECONDS, Counters, Histogram
from engram.errors import RowIntegrityError, SpecMismatchError, StoreError
from engram.rows import RowFormat, Rows
from engram.spec import NgramSpec
from engram.store.layout import CHECK_BYTES
from engram.store.manifest import Schema
from engram.store.reader import StoreReader, TableFiles
from engram.tiers import Int64s, Ngrams, Prefetch, Selection, Tier

PENDING_NGRAMS_MAX = 1 << 18
"""N-grams that may wait to be prefetched."""
_TOUCHED_NGRAMS = 4096
_STARTED_NGRAMS = 16


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

    Attributes:
        read_seconds: how long reads of some rows together took.

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
        self._counters = Counters(
            "ngrams_read", "rows_read", "rows_failed", "prefetches", "prefetches_dropped"
        )
        self.read_seconds = Histogram(SECONDS)
        # A backlog means that reads cannot keep up: more hints would only arrive late.
        self._background = Background("engram-prefetch", PENDING_NGRAMS_MAX)
        self._closed = False

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
        failed, began = 0, time.perf_counter()
        try:
            self._reader.gather(layers, row_ids, places, out)
        except RowIntegrityError as error:
            failed = sum(len(rows) for rows in error.failures.values())
            raise
        finally:
            self.read_seconds.add(time.perf_counter() - began)
            self._counters.add(ngrams_read=ngrams, rows_read=len(row_ids), rows_failed=failed)

    def prefetch(self, ngrams: Ngrams) -> Prefetch:
        if self._closed:
            raise StoreError(f"{self.name}: the table is closed; open it again")
        handle = Prefetch()
        if self._background.submit(len(ngrams), self._touch, ngrams, handle):
            self._counters.add(prefetches=1)
        else:
            self._counters.add(prefetches_dropped=1)
        return handle

    def start(self, ngrams: Ngrams) -> None:
        if len(ngrams) and self._reader.waits:
            self._reader.touch(
                *self._rows_of(ngrams.take(slice(0, _STARTED_NGRAMS)), self._everything)
            )

    def _touch(self, ngrams: Ngrams, handle: Prefetch) -> None:
        # In parts, so that a long prompt's row ids never stand in memory all at once.
        for at in range(0, len(ngrams), _TOUCHED_NGRAMS):
            if handle.cancelled:
                return
            some = ngrams.take(slice(at, at + _TOUCHED_NGRAMS))
            self._reader.touch(*self._rows_of(some, self._everything))

    def files(self) -> TableFiles:
        """The open table, for another process to read; see `StoreReader.files`."""
        return self._reader.files()

    def stats(self) -> dict[str, Any]:
        return {"tier": "ssd", **self._counters.read()}

    def rows_failed(self) -> dict[str, int]:
        """Rows that failed since the start, each time, by kind: see `StoreReader`."""
        return self._reader.failed.read()

    def store_stats(self) -> dict[str, int]:
        """Bytes of rows and their checks that were read since the start, from the page cache or
        the device; of the table's file; and free on its file system.

        Raises:
            StoreError: the table is closed.
        """
        rows = self._counters.read()["rows_read"]
        return {
            "read_bytes": rows * (self.row_format.row_bytes + CHECK_BYTES),
            "file_bytes": self._reader.file_bytes,
            "free_bytes": self._reader.free_bytes(),
        }

    def check_integrity(self) -> None:
        self._counters.check_integrity()
        self._background.check_integrity()

    def close(self) -> None:
        self._closed = True
        self._background.close()
        self._reader.close()
