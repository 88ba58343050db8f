"""Reading rows of a table on disk: open once, then gather from any number of threads."""

from __future__ import annotations

import mmap
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram._counters import Counters
from engram.errors import RowIntegrityError, SelectionError, StoreError
from engram.rows import Rows
from engram.store import datafile, gather
from engram.store import guard as sigbus
from engram.store.geometry import BAD_CHECK, IO_ERROR, OK, REFUSED, SHORT_READ, Geometry
from engram.store.layout import PAGE_BYTES
from engram.store.manifest import MANIFEST_FILE, Physical, manifest_text, parse_manifest

_NO_SCALES = np.empty((0, 0), np.uint8)
_CAUSES = {
    BAD_CHECK: "damaged bytes",
    SHORT_READ: "the file is too short",
    IO_ERROR: "I/O error",
    REFUSED: "their extent had a hole; reopen the table once it is repaired",
}
_KINDS = {BAD_CHECK: "damaged", SHORT_READ: "short", IO_ERROR: "io", REFUSED: "hole"}
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)


class _OpenFile:
    """Descriptor and, if guarded, map of a data file; freed with the last reference.

    A gather holds a reference while it runs, so closing a reader never pulls the file from under
    another thread.
    """

    def __init__(self, descriptor: int, file_bytes: int, guarded: bool) -> None:
        self.descriptor = descriptor
        self.base = 0
        self.map: sigbus.GuardedMap | None = None
        view = None
        if guarded:
            view = mmap.mmap(descriptor, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            view.madvise(mmap.MADV_RANDOM)
            self.base = int(np.frombuffer(view, np.uint8).ctypes.data)
            self.map = sigbus.register(self.base, file_bytes)
        finalizer = weakref.finalize(self, _free, descriptor, view, self.map)
        # At exit other threads may still read; the system frees all then.
        finalizer.atexit = False


def _free(descriptor: int, view: mmap.mmap | None, guarded: sigbus.GuardedMap | None) -> None:
    if view is not None and guarded is not None:
        sigbus.unregister(guarded)
        view.close()
    os.close(descriptor)


@dataclass(frozen=True)
class TableFiles:
    """A table that is already open, perhaps by another process.

    Attributes:
        manifest: content of its `table.json`.
        descriptor: its data file, open for reading.
    """

    manifest: bytes
    descriptor: int


class StoreReader:
    """Rows of one table, verified on every read.

    Args:
        path: the table's directory.
        guard: read warm rows through a memory map, with the SIGBUS guard installed in this
            process; else everything with `pread`.
        files: read these instead, which may have no path here; the descriptor is taken over, and
            `path` only names the table in messages. They are trusted no more than a path.

    Attributes:
        path: as given.
        manifest: what the table is.
        token_map: int32 `[vocab]`, or None.
        layers: model layer indices, in the manifest's order.
        failed: counts of rows that could not be read or verified, each time, by kind: `damaged`,
            `short` (of a file), `io` and `hole` (in their extent).
        file_bytes: size of the data file.

    Raises:
        StoreError: no table there, or one that cannot be read.
        CorruptTableError: its structure is damaged; single rows are only checked when read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, guard: bool, files: TableFiles | None = None
    ) -> None:
        self.path = Path(path)
        files = files or TableFiles(manifest_text(self.path), datafile.open_file(self.path))
        try:
            place = str(self.path / MANIFEST_FILE)
            self.manifest, physical = parse_manifest(files.manifest, place)
        except BaseException:
            os.close(files.descriptor)
            raise
        self._manifest_text = files.manifest
        self._open(files.descriptor, physical, guard)
        self.layers = tuple(layer for layer, _ in self.manifest.layers)
        self._geometry = Geometry.of(self.manifest, physical)
        self.failed = Counters(*_KINDS.values())
        self.file_bytes = physical.file_bytes
        self._calm = 0
        self._holes = 0

    def _open(self, descriptor: int, physical: Physical, guard: bool) -> None:
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StoreError("the data file is not a regular file; import the table again")
            before = datafile.identity(descriptor)
            datafile.check_structure(descriptor, self.manifest, physical)
            self.token_map = datafile.read_embedded(descriptor, self.manifest, physical)
            if datafile.identity(descriptor) != before:
                raise StoreError("the data file changed while it was being opened; try again")
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._handler = sigbus.ensure() if guard else 0
            self._file: _OpenFile | None = _OpenFile(descriptor, physical.file_bytes, guard)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, StoreError):
                raise type(error)(f"{self.path}: {error}") from None
            raise

    def files(self) -> TableFiles:
        """The open table, for another process to read; the caller closes the descriptor.

        It has an open file description of its own: whoever gets it can change neither the flags
        nor the readahead that this reader has.

        Raises:
            StoreError: the reader is closed, or the file cannot be opened again.
        """
        file = self._opened()
        try:
            descriptor = os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(
                f"{self.path}: the data file cannot be opened again: {error.strerror}"
            ) from None
        return TableFiles(self._manifest_text, descriptor)

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
        self._check_arrays(layers, row_ids, places)
        out.check(out.values.shape[:1], self.manifest.row_format)
        fates = np.empty(len(row_ids), np.uint8)
        request = (
            layers,
            row_ids,
            places,
            out.values,
            _NO_SCALES if out.scales is None else out.scales,
            fates,
        )
        result = self._run(file, file.base, request)
        if result == gather.GUARD_LOST:
            self._handler = sigbus.ensure()
            result = self._run(file, file.base, request)
        if result == gather.GUARD_LOST:
            # Somebody takes SIGBUS again and again: plain reads need no guard.
            result = self._run(file, 0, request)
        if result < 0:
            raise self._outside(-1 - result, layers, row_ids)
        self._calm = result
        if file.map is not None and file.map.holes != self._holes:
            self._refuse_holes(file.map)
        if fates.any():
            raise self._failure(fates, layers, row_ids)

    def _run(self, file: _OpenFile, base: int, request: tuple[Any, ...]) -> int:
        return int(
            gather.gather(
                self._geometry.packed,
                file.descriptor,
                base,
                self._handler,
                self._calm,
                *request,
            )
        )

    def _refuse_holes(self, guarded: sigbus.GuardedMap) -> None:
        """Refuse all rows of extents that have holes: zeros lie over these until reopened."""
        self._holes = guarded.holes
        pages = guarded.hole_offsets() // PAGE_BYTES
        order = np.argsort(self._geometry.pages)
        place = np.searchsorted(self._geometry.pages[order], pages, side="right") - 1
        self._geometry.refused[order[place[place >= 0]]] = 1

    def free_bytes(self) -> int:
        """Bytes that may still be written to the file system that the table is on.

        Raises:
            StoreError: the reader is closed.
        """
        found = os.fstatvfs(self._opened().descriptor)
        return found.f_bavail * found.f_frsize

    @property
    def waits(self) -> bool:
        """Whether the last gather ended with rows that were not in the page cache."""
        return self._calm < gather.CALM_ROWS

    def touch(self, layers: npt.NDArray[np.int32], row_ids: npt.NDArray[np.int64]) -> None:
        """Start bringing rows into the page cache, arguments as in `gather`.

        Returns once all reads are queued: for many cold rows that is when the device took most
        of them.

        Raises:
            SelectionError: a layer or row that does not exist.
            StoreError: the reader is closed.
        """
        file = self._opened()
        self._check_arrays(layers, row_ids, row_ids)
        result = gather.touch(self._geometry.packed, file.descriptor, layers, row_ids)
        if result < 0:
            raise self._outside(-1 - result, layers, row_ids)

    def close(self) -> None:
        """Free file and map, once no gather uses them any more. Safe to call twice."""
        self._file = None

    def _opened(self) -> _OpenFile:
        if self._file is None:
            raise StoreError(f"{self.path}: the table is closed; open it again")
        return self._file

    def _check_arrays(
        self,
        layers: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
    ) -> None:
        count = row_ids.shape
        for name, array, dtype in (
            ("layers", layers, _INT32),
            ("row_ids", row_ids, _INT64),
            ("places", places, _INT64),
        ):
            if array.dtype != dtype or array.shape != count or array.ndim != 1:
                raise SelectionError(
                    f"{name} must be {dtype} [{row_ids.size}], "
                    f"not {array.dtype} {list(array.shape)}"
                )
            if not array.flags.c_contiguous:
                raise SelectionError(f"{name} must be C-contiguous")

    def _outside(
        self, index: int, layers: npt.NDArray[np.int32], row_ids: npt.NDArray[np.int64]
    ) -> SelectionError:
        return SelectionError(
            f"{self.path}: request {index} (layer position {layers[index]}, row {row_ids[index]}) "
            "names a layer, row or place that does not exist; "
            f"layers and their rows are {list(self.manifest.layers)}"
        )

    def _failure(
        self,
        fates: npt.NDArray[np.uint8],
        layers: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int64],
    ) -> RowIntegrityError:
        failures = {
            self.layers[layer]: row_ids[(fates != OK) & (layers == layer)].tolist()
            for layer in np.unique(layers[fates != OK])
        }
        found = {kind: int((fates == fate).sum()) for fate, kind in _KINDS.items()}
        self.failed.add(**found)
        causes = [cause for fate, cause in _CAUSES.items() if (fates == fate).any()]
        return RowIntegrityError.of(failures, str(self.path), ", ".join(causes))
