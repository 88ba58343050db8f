# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Threads that help to copy large lookups, and cost small ones nothing.

A lookup too small to gain never looks here. A larger one offers its tokens in chunks; whoever is
free claims the next, the caller too, so it never waits for a helper that has not come. Helpers
stay awake for a moment after each job, because waking one up takes longer than copying 64 tokens,
and sleep in the kernel otherwise. Where processes compete for the cores, help only takes time from
other lookups, so none is asked for.

    lock       one lookup at a time has helpers; another that comes meanwhile works alone
    claimed    chunks of the job that somebody has claimed: the caller from the first on, helpers
               from the last on, so that each finds its part of a caller's buffer, which is used
               again and again, in its own cache
    from_last  those of the helpers
    state      of one helper: IDLE, OFFERED (by the caller), AT_WORK (by the helper), QUIT (at the
               interpreter's end, never while at work)

A helper works on a job only between its own OFFERED -> AT_WORK and its AT_WORK -> IDLE. The caller
takes back what is still OFFERED and waits for who is AT_WORK, so nobody touches a caller's memory
after its lookup ended.
"""

from __future__ import annotations

import atexit
import os
import resource
import threading
import time

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from engram._jit import (
    add_atomic,
    compare_exchange,
    fence_full,
    kernel,
    load_acquire,
    load_relaxed,
    load_u64,
    pause,
    store_relaxed,
    store_release,
    store_u64,
)
from engram.ram._probe import copy_range, count_lookup
from engram.ram.layout import unpack_view

CHUNK_TOKENS = 8
"""Tokens that are claimed at once."""
WORTHWHILE_BYTES = 1 << 17
"""Bytes of a lookup from which on help pays."""
HELPERS_MAX = 3
_AWAKE_NS = 300_000
"""How long a helper waits awake for the next job."""
_PAUSES = 32
"""Between two looks at the clock."""
_WATCH_S, _SWITCHES_MAX, _ALONE_S = 0.04, 1, 0.4
"""If a thread that looks up loses its core more often than this in such a while, others want the
cores, and it does without helpers for a time. Alone it was seen to lose it 3 times a second,
beside one or three processes like it 90 times and more."""
_IDLE, _OFFERED, _AT_WORK, _QUIT = (np.uint64(state) for state in range(4))
"""States of a helper."""

# Words of the crew's memory.
_LOCK, _HELPERS, _CLAIMED, _FROM_LAST = 0, 1, 8, 9
_JOB = 16
_FIRST_HELPER, _HELPER_WORDS = 32, 16
_ASLEEP, _CLOCK = 1, 8
"""Words of a helper after its state; the clock's two are on a line of their own."""

# Words of a job.
(
    _VIEW,
    _WINDOWS,
    _TOKENS,
    _WIDTH,
    _ORDER_USED,
    _ORDERS,
    _PIECES,
    _PIECE_COUNT,
    _BOUNDS,
    _VALUES,
    _VALUE_STRIDE,
    _SCALES,
    _SCALE_STRIDE,
    _SLOTS,
    _MISSES,
) = range(15)

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine)
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_CLOCK_MONOTONIC = 1
_i64 = types.int64
_syscall = types.ExternalFunction("syscall", _i64(_i64, _i64, _i64, _i64, _i64))
"""`syscall` of libc; whole words only, so that being variadic makes no difference."""
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, _i64))


@intrinsic
def _as_pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@kernel
def _job(crew, field):
    return np.int64(load_u64(crew + (_JOB + field) * 8))


@kernel
def _set_job(crew, field, number):
    store_u64(crew + (_JOB + field) * 8, np.uint64(number))


@kernel
def _array(crew, field, count, dtype):
    return numba.carray(_as_pointer(_job(crew, field)), count, dtype)


@kernel
def _work(crew, is_caller):
    """Do chunks of the job on offer until none is left; adds its misses to the job's."""
    view = unpack_view(_array(crew, _VIEW, 32, np.int64))
    tokens, width, orders, pieces = (
        _job(crew, _TOKENS),
        _job(crew, _WIDTH),
        _job(crew, _ORDERS),
        _job(crew, _PIECE_COUNT),
    )
    windows = _array(crew, _WINDOWS, tokens * width, np.int32).reshape(tokens, width)
    order_used = _array(crew, _ORDER_USED, orders, np.bool_)
    copies = _array(crew, _PIECES, pieces * 4, np.int64).reshape(pieces, 4)
    bounds = _array(crew, _BOUNDS, orders + 1, np.int64)
    slots = _array(crew, _SLOTS, tokens * orders, np.int64).reshape(tokens, orders)
    chunks = (tokens + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    misses = done = 0
    while np.int64(add_atomic(crew + _CLAIMED * 8, np.uint64(1))) < chunks:
        if is_caller:
            chunk = done
        else:
            chunk = chunks - 1 - np.int64(add_atomic(crew + _FROM_LAST * 8, np.uint64(1)))
        first = chunk * CHUNK_TOKENS
        done += 1
        misses += copy_range(
            view,
            windows,
            order_used,
            copies,
            bounds,
            _job(crew, _VALUES),
            _job(crew, _VALUE_STRIDE),
            _job(crew, _SCALES),
            _job(crew, _SCALE_STRIDE),
            first,
            min(first + CHUNK_TOKENS, tokens),
            slots,
        )
    add_atomic(crew + (_JOB + _MISSES) * 8, np.uint64(misses))


@kernel
def _now_ns(room):
    """The time; `room` is 16 bytes for it."""
    _clock_gettime(np.int32(_CLOCK_MONOTONIC), room)
    return np.int64(load_u64(room)) * 1_000_000_000 + np.int64(load_u64(room + 8))


@kernel
def help_out(crew, helper):
    """What a helper does for all its life."""
    state = crew + (_FIRST_HELPER + helper * _HELPER_WORDS) * 8
    asleep, clock = state + _ASLEEP * 8, state + _CLOCK * 8
    until = _now_ns(clock) + _AWAKE_NS
    while True:
        now = load_acquire(state)
        if now == _QUIT:
            return
        if now == _OFFERED:
            if compare_exchange(state, _OFFERED, _AT_WORK):
                _work(crew, False)
                store_release(state, _IDLE)
            until = _now_ns(clock) + _AWAKE_NS
        elif _now_ns(clock) < until:
            for _ in range(_PAUSES):
                if load_relaxed(state) != _IDLE:
                    break
                pause()
        else:
            # The kernel compares the state once more before it puts this thread to sleep, and
            # who offers looks whether to wake it only after it has changed the state.
            store_relaxed(asleep, np.uint64(1))
            fence_full()
            _syscall(_FUTEX, state, _FUTEX_WAIT_PRIVATE, np.int64(_IDLE), 0)
            store_relaxed(asleep, np.uint64(0))
            until = _now_ns(clock) + _AWAKE_NS


@kernel
def _offer(crew):
    for helper in range(np.int64(load_relaxed(crew + _HELPERS * 8))):
        state = crew + (_FIRST_HELPER + helper * _HELPER_WORDS) * 8
        if compare_exchange(state, _IDLE, _OFFERED):
            fence_full()
            if load_relaxed(state + _ASLEEP * 8):
                _syscall(_FUTEX, state, _FUTEX_WAKE_PRIVATE, 1, 0)


@kernel
def _take_back(crew):
    """Nobody touches the job's memory any more once this returns."""
    for helper in range(np.int64(load_relaxed(crew + _HELPERS * 8))):
        state = crew + (_FIRST_HELPER + helper * _HELPER_WORDS) * 8
        if not compare_exchange(state, _OFFERED, _IDLE):
            while load_acquire(state) == _AT_WORK:
                pause()


@kernel
def copy_hits_together(
    crew, packed_view, windows, order_used, pieces, bounds, values, scales, slots
):
    """`copy_hits` with the help of the crew at an address; -1 if it is busy: nothing was done."""
    if not compare_exchange(crew + _LOCK * 8, np.uint64(0), np.uint64(1)):
        return -1
    tokens = len(windows)
    _set_job(crew, _VIEW, packed_view.ctypes.data)
    _set_job(crew, _WINDOWS, windows.ctypes.data)
    _set_job(crew, _TOKENS, tokens)
    _set_job(crew, _WIDTH, windows.shape[1])
    _set_job(crew, _ORDER_USED, order_used.ctypes.data)
    _set_job(crew, _ORDERS, len(order_used))
    _set_job(crew, _PIECES, pieces.ctypes.data)
    _set_job(crew, _PIECE_COUNT, len(pieces))
    _set_job(crew, _BOUNDS, bounds.ctypes.data)
    _set_job(crew, _VALUES, values.ctypes.data)
    _set_job(crew, _VALUE_STRIDE, values.size // tokens)
    _set_job(crew, _SCALES, scales.ctypes.data)
    _set_job(crew, _SCALE_STRIDE, scales.size // tokens)
    _set_job(crew, _SLOTS, slots.ctypes.data)
    _set_job(crew, _MISSES, 0)
    store_relaxed(crew + _CLAIMED * 8, np.uint64(0))
    store_relaxed(crew + _FROM_LAST * 8, np.uint64(0))
    _offer(crew)
    _work(crew, True)
    _take_back(crew)
    misses = _job(crew, _MISSES)
    store_release(crew + _LOCK * 8, np.uint64(0))
    count_lookup(unpack_view(packed_view), tokens, order_used, misses)
    return misses


class Crew:
    """The helpers of this process; made when first needed, anew after a fork.

    Args:
        helpers: how many to start; fewer if the system has no room for threads.
    """

    def __init__(self, helpers: int) -> None:
        self._words = np.zeros(_FIRST_HELPER + _HELPER_WORDS * (helpers + 1) + 8, np.uint64)
        # Words of a line of their own each: from a multiple of 64 on.
        self.address = -(-self._words.ctypes.data // 64) * 64
        self._threads = []
        for helper in range(helpers):
            # Each keeps the words alive, whatever becomes of this object.
            thread = threading.Thread(
                target=_help_out, args=(self._words, helper), name="engram-copy", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no thread can be started now
                break
            self._threads.append(thread)
        at = (self.address - self._words.ctypes.data) // 8
        self._words[at + _HELPERS] = len(self._threads)

    def quit(self) -> None:
        """End the helpers: compiled code is gone once the interpreter ends."""
        for helper in range(len(self._threads)):
            _dismiss(self.address, helper)
        for thread in self._threads:
            thread.join(timeout=1.0)


def _help_out(words, helper):
    help_out(-(-words.ctypes.data // 64) * 64, helper)


@kernel
def _dismiss(crew, helper):
    state = crew + (_FIRST_HELPER + helper * _HELPER_WORDS) * 8
    # Never over AT_WORK, which a caller waits for to end.
    while not (compare_exchange(state, _IDLE, _QUIT) or compare_exchange(state, _OFFERED, _QUIT)):
        pause()
    _syscall(_FUTEX, state, _FUTEX_WAKE_PRIVATE, 1, 0)


_crew: Crew | None = None
_making = threading.Lock()


class _Competition(threading.local):
    """Whether others compete for the cores, from how often this thread loses its own."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._alone_until = 0.0
        self._switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw

    def now(self) -> bool:
        now = time.monotonic()
        if now - self._looked > _WATCH_S:
            switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
            rate = (switches - self._switches) / (now - self._looked)
            if rate > _SWITCHES_MAX / _WATCH_S:
                self._alone_until = now + _ALONE_S
            self._looked, self._switches = now, switches
        return now < self._alone_until


_competition = _Competition()


def crew() -> int:
    """Address of this process's crew, or 0 if it has none, or does better without it now."""
    if _competition.now():
        return 0
    global _crew  # noqa: PLW0603 - one for the process, whatever it opens
    if _crew is None:
        with _making:
            if _crew is None:
                spare = len(os.sched_getaffinity(0)) - 1
                _crew = Crew(min(HELPERS_MAX, spare) if _FUTEX else 0)
                if _crew._threads:
                    atexit.register(_crew.quit)
    return _crew.address if _crew._threads else 0


def _forget() -> None:
    # Its threads are the parent's.
    global _crew, _making
    if _crew is not None:
        atexit.unregister(_crew.quit)
    _crew, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
