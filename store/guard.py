"""The SIGBUS guard: a hole in a mapped data file costs its rows, not the process.

Reading a map where the file was truncated or the device fails raises SIGBUS. The handler puts a
page of zeros over the hole if it lies in a registered map, and notes the page; the row check then
refuses what is read there. Any other SIGBUS goes to whoever handled it before: the handler puts
that action back and returns, so that the fault happens again under it.

The handler runs between any two instructions of any thread. It is compiled, holds no lock,
allocates nothing, and uses only the fixed table below and system calls.

A later `sigaction` by others (`faulthandler.enable()` is one) silences the guard unnoticed, so
every use of a map begins by asking whether the handler is still there; see `ensure`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from engram._jit import callback, kernel, load_u32, load_u64, store_u8, store_u32
from engram.errors import StoreError

MAPS_MAX = 256
"""Maps that can be registered at once in a process."""

_SIGBUS = int(signal.SIGBUS)
_SYSTEM_PAGE = mmap.PAGESIZE

# struct sigaction and siginfo_t of 64-bit Linux.
_ACTION_WORDS = 19
_FLAGS = 17
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTART = 0x4, 0x08000000, 0x10000000
_CODE_OFFSET, _ADDRESS_OFFSET = 8, 16
_PROT_READ = mmap.PROT_READ
_COVER = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED, which mmap does not export

# The handler's state, in words: signals passed on; the handler's own address; the action before
# ours; the default action; then for each map its start, end, the address of its hole bytes, and
# the number of holes.
_ENTRY_WORDS = 4
_START, _END, _HOLES, _COUNT = range(_ENTRY_WORDS)
_PASSED_ON, _ADDRESS, _PREVIOUS = range(3)
_DEFAULT = _PREVIOUS + _ACTION_WORDS
_ENTRIES = _DEFAULT + _ACTION_WORDS
_state = np.zeros(_ENTRIES + MAPS_MAX * _ENTRY_WORDS, np.int64)
_entries = _state[_ENTRIES:].reshape(MAPS_MAX, _ENTRY_WORDS)
# Linked by name, so that the compiled handler holds no address and can be cached.
_STATE_SYMBOL = "engram_guard_state"
llvmlite.binding.add_symbol(_STATE_SYMBOL, _state.ctypes.data)

_i32, _i64 = types.int32, types.int64
_mmap: Any = types.ExternalFunction("mmap", _i64(_i64, _i64, _i32, _i32, _i32, _i64))
_sigaction: Any = types.ExternalFunction("sigaction", _i32(_i32, _i64, _i64))
_raise: Any = types.ExternalFunction("raise", _i32(_i32))
_errno_location: Any = types.ExternalFunction("__errno_location", _i64())

_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


@intrinsic
def _add(typingctx: Any, address: Any, number: Any) -> Any:
    """Add to the int64 at `address`, atomically; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _state_address(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        module = builder.module
        state = module.globals.get(_STATE_SYMBOL)
        state = state or ir.GlobalVariable(module, ir.IntType(64), _STATE_SYMBOL)
        return builder.ptrtoint(state, ir.IntType(64))

    return types.int64(), codegen


@kernel
def _word(address, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return np.int64(load_u64(address + index * 8))


@kernel
def _cover(fault):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Put zeros over the page of address `fault` if it is in a registered map."""
    for number in range(MAPS_MAX):
        entry = _state_address() + (_ENTRIES + number * _ENTRY_WORDS) * 8
        start = _word(entry, _START)
        if start <= fault < _word(entry, _END):
            page = fault - fault % _SYSTEM_PAGE
            if _mmap(page, _SYSTEM_PAGE, _PROT_READ, _COVER, -1, 0) != page:
                return False
            store_u8(_word(entry, _HOLES) + (page - start) // _SYSTEM_PAGE, np.uint8(1))
            _add(entry + _COUNT * 8, 1)
            return True
    return False


def _handle(number, info, context):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    errno = _errno_location()
    saved = load_u32(errno)
    code = np.int32(load_u32(info + _CODE_OFFSET))
    if code <= 0 or not _cover(np.int64(load_u64(info + _ADDRESS_OFFSET))):
        # If it comes back although the action before was restored, the default ends it.
        first = _add(_state_address() + 8 * _PASSED_ON, 1) == 0
        _sigaction(_SIGBUS, _state_address() + 8 * (_PREVIOUS if first else _DEFAULT), 0)
        if code <= 0:
            # Sent by a process, not caused by an instruction: it would not happen again.
            _raise(_SIGBUS)
    store_u32(errno, saved)


@cache
def _compiled() -> Any:
    return callback("void(int32, int64, int64)")(_handle)


def installed() -> bool:
    """Whether SIGBUS comes to the handler now."""
    action = np.zeros(_ACTION_WORDS, np.int64)
    _call_sigaction(None, action)
    return bool(action[0] and action[0] == _state[_ADDRESS])


def ensure() -> int:
    """Install the handler unless it is; returns its address.

    Whoever replaced it becomes the one that other SIGBUS signals are passed on to.

    Raises:
        StoreError: the system refuses; read without the guard then.
    """
    with _lock:
        _state[_ADDRESS] = _compiled().address
        if not installed():
            action = np.zeros(_ACTION_WORDS, np.int64)
            action[0] = _state[_ADDRESS]
            action[_FLAGS] = _SA_SIGINFO | _SA_ONSTACK | _SA_RESTART
            _call_sigaction(None, _state[_PREVIOUS:_DEFAULT])
            _state[_PASSED_ON] = 0
            _call_sigaction(action, None)
        return int(_state[_ADDRESS])


def _call_sigaction(new: npt.NDArray[np.int64] | None, old: npt.NDArray[np.int64] | None) -> None:
    pointers = [ctypes.c_void_p(None if each is None else each.ctypes.data) for each in (new, old)]
    if _libc.sigaction(_SIGBUS, *pointers) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise StoreError(f"the SIGBUS guard cannot be installed: {reason}; open with guard=False")


@dataclass(frozen=True, eq=False)
class GuardedMap:
    """A registered map; `unregister` it before unmapping.

    Attributes:
        hole_bytes: uint8, 1 for every system page of the map that was a hole.
    """

    entry: int
    hole_bytes: npt.NDArray[np.uint8]

    @property
    def holes(self) -> int:
        """Holes met so far; grows with each."""
        return int(_entries[self.entry, _COUNT])

    def hole_offsets(self) -> npt.NDArray[np.int64]:
        """int64: where in the map each hole begins, ascending; holes are system pages."""
        return np.flatnonzero(self.hole_bytes).astype(np.int64) * _SYSTEM_PAGE


def register(start: int, count: int) -> GuardedMap:
    """Guard the map of `count` bytes at address `start`, installing the handler if need be.

    Raises:
        StoreError: too many maps, or no handler can be installed.
    """
    ensure()
    hole_bytes = np.zeros(-(-count // _SYSTEM_PAGE), np.uint8)
    with _lock:
        free = np.flatnonzero(_entries[:, _END] == 0)
        if not free.size:
            raise StoreError(f"{MAPS_MAX} guarded tables are open already; close some")
        number = int(free[0])
        entry = _entries[number]
        entry[_HOLES], entry[_COUNT] = hole_bytes.ctypes.data, 0
        entry[_START], entry[_END] = start, start + count
        return GuardedMap(number, hole_bytes)


def unregister(guarded: GuardedMap) -> None:
    """Guard the map no more."""
    with _lock:
        _entries[guarded.entry, _END] = 0
        _entries[guarded.entry, _START] = 0
