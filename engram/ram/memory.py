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
from typing import Any

import numpy as np

from engram.errors import ConfigError, ServiceError
from engram.sizes import format_size

_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 0x01, 0x02, 0x04, 0x10
SEALS_OF_WRITER = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_FUTURE_WRITE
"""Seals of memory that only who made it can write."""
SEALS_OF_READER = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW
"""Seals of memory that whoever holds it can write, but not resize."""
_MADV_HUGEPAGE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 14, 22, 23
_HUGE_PAGE = 2 << 20
_libc: Any = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FIXED = 0x10
_ADDRESSES = 2**47
_MAP_FAILED = ctypes.c_void_p(-1).value


class Memory:
    """Some mapped bytes, unmapped with the last reference to this object.

    Attributes:
        address: where they begin, a multiple of the page size.
        size: in bytes.
        descriptor: of the memfd, or -1; closed with the object.
    """

    def __init__(self, mapped: np.ndarray, descriptor: int = -1) -> None:
        self._mapped = mapped
        self.size = mapped.size
        self.descriptor = descriptor
        self.address = int(mapped.ctypes.data)
        # At exit other threads may still read; the system frees all then.
        self._descriptor_closed = weakref.finalize(self, os.close, descriptor)
        self._descriptor_closed.atexit = False
        if descriptor < 0:
            self._descriptor_closed.detach()

    @classmethod
    def private(cls, size: int) -> Memory:
        """Zeros of this process alone; a forked child has a copy."""
        try:
            return cls(_map(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        except OSError as error:
            raise _no_room(size, error) from None

    @classmethod
    def shared(cls, name: str, size: int, seals: int, *, reserve: bool = True) -> Memory:
        """Zeros in a sealed memfd that this process can write.

        Args:
            name: shown in `/proc/PID/maps`.
            reserve: take the memory now, so that writing to it can never fail.

        Raises:
            ConfigError: there is not so much memory.
        """
        descriptor = -1
        try:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            mapped = _map(descriptor, size, mmap.MAP_SHARED)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise _no_room(size, error) from None
        memory = cls(mapped, descriptor)
        if reserve:
            memory.reserve()
        return memory

    def reserve(self) -> None:
        """Take the memory now, if it is a memfd, so that writing to it can never fail.

        Raises:
            ConfigError: there is not so much.
        """
        if self.descriptor < 0:
            return
        # Through the map, because only so does the kernel use huge pages.
        if _madvise(self.address, self.size, _MADV_POPULATE_WRITE):
            try:
                os.posix_fallocate(self.descriptor, 0, self.size)
            except OSError as error:
                raise _no_room(self.size, error) from None

    @classmethod
    def received(cls, descriptor: int, size: int, seals: int, *, writable: bool = False) -> Memory:
        """Map memory that another process made; takes over the descriptor.

        Raises:
            ServiceError: it is not a memfd of this size with these seals.
        """
        try:
            found = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            status, pages = os.fstat(descriptor), os.fstatvfs(descriptor)
            if found & seals != seals or status.st_size != size:
                raise ServiceError(
                    f"shared memory came with seals {found:#x} and {status.st_size} bytes, not "
                    f"{seals:#x} and {size}; use versions of engram that match"
                )
            # Huge pages can run out, which kills whoever touches one that is not there.
            if pages.f_bsize != mmap.PAGESIZE:
                raise ServiceError("shared memory came in huge pages; use normal ones")
            mapped = _map(descriptor, size, mmap.MAP_SHARED, writable=writable)
        except OSError as error:
            os.close(descriptor)
            raise ServiceError(f"shared memory cannot be mapped: {error.strerror}") from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(mapped, descriptor)

    def words(self, count: int) -> np.ndarray:
        """uint64 `[count]`, the first words."""
        return self._mapped[: 8 * count].view(np.uint64)

    def bytes(self) -> np.ndarray:
        """uint8 `[size]`."""
        return self._mapped

    def populate(self) -> None:
        """Map every page now, for reading; what cannot be is mapped when it is used."""
        _madvise(self.address, self.size, _MADV_POPULATE_READ)

    def close_descriptor(self) -> None:
        """Keep the mapping only; safe to call twice."""
        self._descriptor_closed()
        self.descriptor = -1


def _map(descriptor: int, size: int, flags: int, *, writable: bool = True) -> np.ndarray:
    """uint8 `[size]`, unmapped with the last array over it.

    Not by `mmap.mmap`, which keeps a copy of the descriptor open as long as the map.
    """
    if not 0 < size < _ADDRESSES:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _mmap_aligned(size, protection, flags, descriptor)
    owner = (ctypes.c_uint8 * size).from_address(address)
    # At exit other threads may still read; the system frees all then.
    weakref.finalize(owner, _munmap, address, size).atexit = False
    mapped: np.ndarray = np.frombuffer(memoryview(owner), np.uint8)
    mapped.flags.writeable = writable
    return mapped


def _mmap_aligned(size: int, protection: int, flags: int, descriptor: int) -> int:
    """Map so that huge pages fit, where there are any; returns the address.

    Bundles are read at random: with pages of 4 KiB nearly each would cost a walk of page tables.
    """
    if size < _HUGE_PAGE:
        return _checked(_mmap(None, size, protection, flags, descriptor, 0))
    aside = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = _checked(_mmap(None, size + _HUGE_PAGE, 0, aside, -1, 0))
    address = -(-room // _HUGE_PAGE) * _HUGE_PAGE
    try:
        _checked(_mmap(address, size, protection, flags | _MAP_FIXED, descriptor, 0))
    except OSError:
        _munmap(room, size + _HUGE_PAGE)
        raise
    pages_end = -(-(address + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    if address > room:
        _munmap(room, address - room)
    if pages_end < room + size + _HUGE_PAGE:
        _munmap(pages_end, room + size + _HUGE_PAGE - pages_end)
    # Not every kernel has them, and none must.
    _madvise(address, size, _MADV_HUGEPAGE)
    return address


def _checked(address: int | None) -> int:
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def _no_room(size: int, error: OSError) -> ConfigError:
    files = error.errno in (errno.EMFILE, errno.ENFILE)
    hint = "raise the limit of open files" if files else "give the RAM tier less"
    return ConfigError(f"{format_size(size)} of memory cannot be had ({error.strerror}); {hint}")


class _Owned:
    """An array's own description of itself, and what must live as long as the array."""

    def __init__(self, array: np.ndarray, owner: object) -> None:
        self.__array_interface__ = array.__array_interface__
        self._kept = array, owner


def owning(array: np.ndarray, owner: object) -> np.ndarray:
    """The same array, which keeps `owner` alive."""
    return np.asarray(_Owned(array, owner))
