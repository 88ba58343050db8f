"""Memory that can be handed to other processes, and its twin that cannot.

A memfd has no name, so nothing of it is left behind when its last user dies, and needs no
`/dev/shm`. Its seals are what keeps readers from writing: even with the descriptor in hand a
client can neither write, nor map it writable, nor change its size.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import numpy as np

from engram.errors import ConfigError, ServiceError
from engram.sizes import format_size

_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 0x01, 0x02, 0x04, 0x10
SEALS_OF_WRITER = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_FUTURE_WRITE
"""Seals of memory that only who made it can write."""
SEALS_OF_READER = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW
"""Seals of memory that whoever holds it can write, but not resize."""
_MADV_POPULATE_READ = 22
_libc: Any = ctypes.CDLL(None, use_errno=True)


class Memory:
    """Some mapped bytes, unmapped with the last reference to this object.

    Attributes:
        address: where they begin, a multiple of the page size.
        size: in bytes.
        descriptor: of the memfd, or -1; closed with the object.
    """

    def __init__(self, view: mmap.mmap, descriptor: int = -1) -> None:
        self._view = view
        self.size = len(view)
        self.descriptor = descriptor
        self.address = int(np.frombuffer(view, np.uint8).ctypes.data)
        # At exit other threads may still read; the system frees all then.
        weakref.finalize(self, _unmap, view).atexit = False
        self._descriptor_closed = weakref.finalize(self, os.close, descriptor)
        self._descriptor_closed.atexit = False
        if descriptor < 0:
            self._descriptor_closed.detach()

    @classmethod
    def private(cls, size: int) -> Memory:
        """Zeros of this process alone; a forked child has a copy."""
        try:
            view = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise _no_room(size, error) from None
        return cls(view)

    @classmethod
    def shared(cls, name: str, size: int, seals: int, *, reserve: bool = True) -> Memory:
        """Zeros in a sealed memfd that this process can write.

        Args:
            name: shown in `/proc/PID/maps`.
            reserve: take the memory now, so that writing to it can never fail.

        Raises:
            ConfigError: there is not so much memory.
        """
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            if reserve:
                os.posix_fallocate(descriptor, 0, size)
            view = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            os.close(descriptor)
            raise _no_room(size, error) from None
        return cls(view, descriptor)

    @classmethod
    def received(cls, descriptor: int, size: int, seals: int, *, writable: bool = False) -> Memory:
        """Map memory that another process made; takes over the descriptor.

        Raises:
            ServiceError: it is not a memfd of this size with these seals.
        """
        try:
            found = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if found & seals != seals or os.fstat(descriptor).st_size != size:
                raise ServiceError(
                    f"shared memory came with seals {found:#x} and "
                    f"{os.fstat(descriptor).st_size} bytes, not {seals:#x} and {size}; "
                    "use versions of engram that match"
                )
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            view = mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection)
        except OSError as error:
            os.close(descriptor)
            raise ServiceError(f"shared memory cannot be mapped: {error.strerror}") from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(view, descriptor)

    def words(self, count: int) -> np.ndarray:
        """uint64 `[count]`, the first words."""
        return np.frombuffer(self._view, np.uint64, count)

    def bytes(self) -> np.ndarray:
        """uint8 `[size]`."""
        return np.frombuffer(self._view, np.uint8)

    def populate(self) -> None:
        """Map every page now, for reading; what cannot be is mapped when it is used."""
        _libc.madvise(
            ctypes.c_void_p(self.address), ctypes.c_size_t(self.size), _MADV_POPULATE_READ
        )

    def close_descriptor(self) -> None:
        """Keep the mapping only; safe to call twice."""
        self._descriptor_closed()
        self.descriptor = -1


def _unmap(view: mmap.mmap) -> None:
    # An array over it that still lives unmaps it when it goes.
    with suppress(BufferError):
        view.close()


def _no_room(size: int, error: Exception) -> ConfigError:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    hint = "give the RAM tier less"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        hint = "raise the limit of open files"
    return ConfigError(f"{format_size(size)} of memory cannot be had ({reason}); {hint}")
