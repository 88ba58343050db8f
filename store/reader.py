"""Reading rows of a table on disk: open once, then gather from any number of threads."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engram.errors import RowIntegrityError, SelectionError, StoreError
from engram.rows import Rows
from engram.store import datafile, gather
from engram.store.manifest import Manifest, Physical, read_manifest

_NO_SCALES = np.empty((0, 0), np.uint8)
_ROWS_PER_CALL = 16384


class _OpenFile:
    """Descriptor and, if wanted, map of a data file; freed with the last reference.

    A gather holds a reference while it runs, so closing a reader never pulls the file from under
    another thread.
    """

    def __init__(self, descriptor: int, file_bytes: int, mapped: bool) -> None:
        self.descriptor = descriptor
        self.base = 0
        view = None
        if mapped:
            view = mmap.mmap(descriptor, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            view.madvise(mmap.MADV_RANDOM)
            self.base = np.frombuffer(view, np.uint8).ctypes.data
        finalizer = weakref.finalize(self, _free, descriptor, view)
        finalizer.atexit = False


def _free(descriptor: int, view: mmap.mmap | None) -> None:
    if view is not None:
        view.close()
    os.close(descriptor)


class StoreReader:
    """Rows of one table, verified on every read.

    Args:
        path: the table's directory.
        guard: read warm rows through a memory map, with the SIGBUS guard installed in this
            process; else everything with `pread`.

    Attributes:
        path: as given.
        manifest: what the table is.
        token_map: int32 `[vocab]`, or None.
        layers: model layer indices, in the manifest's order.

    Raises:
        StoreError: no table there, or one that cannot be read.
        CorruptTableError: its structure is damaged; single rows are only checked when read.
    """

    def __init__(self, path: str | os.PathLike[str], *, guard: bool) -> None:
        self.path = Path(path)
        self.manifest, physical = read_manifest(self.path)
        descriptor = datafile.open_file(self.path)
        try:
            before = datafile.identity(descriptor)
            datafile.check_structure(descriptor, self.manifest, physical)
            self.token_map = datafile.read_embedded(descriptor, self.manifest, physical)
            if datafile.identity(descriptor) != before:
                raise StoreError("the data file changed while it was being opened; try again")
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._file: _OpenFile | None = _OpenFile(descriptor, physical.file_bytes, guard)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, StoreError):
                raise type(error)(f"{self.path}: {error}") from None
            raise
        self.layers = tuple(layer for layer, _ in self.manifest.layers)
        self._geometry = geometry_of(self.manifest, physical)
        self._calm = 0

    def gather(
        self,
        layers: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        out: Rows,
    ) -> None:
        """Copy rows to `out` and verify each.

        Args:
            layers: int32 `[R]`, positions in `self.layers`.
            row_ids: int64 `[R]`.
            places: int64 `[R]`, where in `out` each row goes.
            out: flat rows, as `Rows.empty((R',), row_format)`.

        Raises:
            SelectionError: a layer, row, place or buffer that does not fit; nothing was written.
            RowIntegrityError: some rows could not be read or verified; all others were written.
            StoreError: the reader is closed.
        """
        file = self._opened()
        self._check_request(layers, row_ids, places, out)
        fates = np.empty(len(row_ids), np.uint8)
        scales = _NO_SCALES if out.scales is None else out.scales
        for first in range(0, len(row_ids), _ROWS_PER_CALL):
            part = slice(first, first + _ROWS_PER_CALL)
            self._calm = gather.gather(
                *self._geometry,
                file.descriptor,
                file.base,
                self._calm,
                layers[part],
                row_ids[part],
                places[part],
                out.values,
                scales,
                fates[part],
            )
        if fates.any():
            raise self._failure(fates, layers, row_ids)

    def touch(self, layers: npt.NDArray[np.int32], row_ids: npt.NDArray[np.int64]) -> None:
        """Start bringing rows into the page cache, arguments as in `gather`.

        Returns once all reads are queued: for many cold rows that is when the device took most
        of them.

        Raises:
            SelectionError: a layer or row that does not exist.
            StoreError: the reader is closed.
        """
        file = self._opened()
        self._check_rows(layers, row_ids, np.zeros(len(row_ids), np.int64), 1)
        gather.touch(*self._geometry, file.descriptor, layers, row_ids)

    def close(self) -> None:
        """Free file and map, once no gather uses them any more. Safe to call twice."""
        self._file = None

    def _opened(self) -> _OpenFile:
        if self._file is None:
            raise StoreError(f"{self.path}: the table is closed; open it again")
        return self._file

    def _check_request(
        self,
        layers: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        out: Rows,
    ) -> None:
        out.check(out.values.shape[:1], self.manifest.row_format)
        self._check_rows(layers, row_ids, places, len(out.values))

    def _check_rows(
        self,
        layers: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        room: int,
    ) -> None:
        for name, array, dtype in (
            ("layers", layers, np.int32),
            ("row_ids", row_ids, np.int64),
            ("places", places, np.int64),
        ):
            if array.dtype != dtype or array.shape != row_ids.shape or array.ndim != 1:
                raise SelectionError(
                    f"{name} must be {np.dtype(dtype)} [{row_ids.size}], "
                    f"not {array.dtype} {list(array.shape)}"
                )
        bad = gather.find_outside(layers, row_ids, places, room, self._geometry.layers)
        if bad >= 0:
            raise SelectionError(
                f"{self.path}: request {bad} (layer position {layers[bad]}, row {row_ids[bad]}, "
                f"place {places[bad]} of {room}) does not exist; "
                f"layers and rows are {list(self.manifest.layers)}"
            )

    def _failure(
        self,
        fates: npt.NDArray[np.uint8],
        layers: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int64],
    ) -> RowIntegrityError:
        failures = {
            self.layers[layer]: row_ids[(fates != gather.OK) & (layers == layer)].tolist()
            for layer in np.unique(layers[fates != gather.OK])
        }
        return RowIntegrityError.of(failures, str(self.path))


def geometry_of(manifest: Manifest, physical: Physical) -> gather.Geometry:
    """Where the rows of a table lie, for the kernels."""
    layout = manifest.layout
    counts = [layout.extents(rows) for _, rows in manifest.layers]
    layers = [
        (layer, rows, sum(counts[:position]))
        for position, (layer, rows) in enumerate(manifest.layers)
    ]
    return gather.Geometry(
        manifest.row_format.value_bytes,
        layout.row_bytes,
        layout.rows_per_block,
        layout.extent_blocks,
        np.uint64(manifest.table_seed),
        np.array(layers, np.int64).reshape(-1, 3),
        np.array(physical.extent_pages, np.int64),
        np.zeros(len(physical.extent_pages), np.uint8),
    )
