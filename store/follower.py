"""Reading written extents back and seeing them to the device, behind the writer.

Another process reads an extent back as soon as it is written, from the page cache and before any
sync. Meanwhile the device writes; when it is done the pages are dropped, so that an import leaves
the cache to those who need it, and the syncs, which come after, have little left to do.

**What reading back proves.** That the file holds what was meant, by code that shares no memory
with the writer: LMDB put every value whole where its tree says, and no buffer was used again too
early. It does not prove the medium: that is for the device's answer to the sync and, ever after,
for the check that each row is read with.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engram.errors import CorruptTableError
from engram.store.layout import PAGE_BYTES
from engram.store.readback import Readback

_BEHIND_MAX = 4
"""Extents that may be written and not yet read back."""
_PUSHED_BYTES_MAX = 64 << 20
"""Bytes that may be on their way to the device: enough that waiting for them does not idle it."""

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Written:
    """An extent in the data file: its rows, its pages, and the digest its rows must have."""

    layer: int
    first_row: int
    rows: int
    page: int
    pages: int
    digest: str


class Follower:
    """One thread that takes extents in the order in which they were written."""

    def __init__(self, descriptor: int, readback: Readback) -> None:
        self._descriptor = descriptor
        self._readback = readback
        self._thread = ThreadPoolExecutor(1, "engram-follow")
        self._behind: deque[Future[None]] = deque()
        self._pushed: deque[Written] = deque()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def follow(self, written: Written) -> None:
        """Take on one more; waits while too many are underway, and raises their errors."""
        self._behind.append(self._thread.submit(self._step, written))
        while len(self._behind) > _BEHIND_MAX:
            self._behind.popleft().result()

    def catch_up(self) -> None:
        """Wait until all are read back and handed to the device, which the caller then syncs.

        Raises:
            CorruptTableError: rows read back differ from those written.
        """
        self._behind.append(self._thread.submit(self._step, None))
        while self._behind:
            self._behind.popleft().result()

    def _step(self, written: Written | None) -> None:
        bytes_max = 0
        if written is not None:
            self._write_back(written, _WRITE)
            self._verify(written)
            self._pushed.append(written)
            bytes_max = _PUSHED_BYTES_MAX
        while sum(each.pages for each in self._pushed) * PAGE_BYTES > bytes_max:
            oldest = self._pushed.popleft()
            self._write_back(oldest, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            self._drop(oldest)

    def _verify(self, written: Written) -> None:
        found = self._readback.extent(written.page, written.layer, written.first_row, written.rows)
        if found != written.digest:
            raise CorruptTableError(
                f"layer {written.layer} rows from {written.first_row} read back differ from the "
                "source; check memory and device, then import again"
            )

    def _write_back(self, written: Written, flags: int) -> None:
        _libc.sync_file_range(
            ctypes.c_int(self._descriptor),
            ctypes.c_int64(written.page * PAGE_BYTES),
            ctypes.c_int64(written.pages * PAGE_BYTES),
            ctypes.c_uint(flags),
        )

    def _drop(self, written: Written) -> None:
        os.posix_fadvise(
            self._descriptor,
            written.page * PAGE_BYTES,
            written.pages * PAGE_BYTES,
            os.POSIX_FADV_DONTNEED,
        )
