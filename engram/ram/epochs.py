"""Epochs: who holds one finds slots that keep their bytes; who writes knows how long it waited."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable

from engram._jit import fence_full, kernel, load_acquire, store_release
from engram.ram import _policy
from engram.ram.layout import WORD_EPOCH
from engram.ram.memory import Memory


@kernel
def _publish(reader, directory):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    epoch = load_acquire(directory + WORD_EPOCH * 8)
    # Released: the writer that sees it takes what was held before for read.
    store_release(reader + WORD_EPOCH * 8, epoch)
    # Against the writer's fence between unlinking slots and looking at this word.
    fence_full()
    return epoch


@kernel
def _now(directory):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    # The older epoch that is published protects this one too; the fence is for the probe.
    fence_full()
    return load_acquire(directory + WORD_EPOCH * 8)


@kernel
def _set(reader, epoch):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    store_release(reader + WORD_EPOCH * 8, epoch)


class Epochs:
    """Epochs that the threads of one reader hold; the oldest is what the writer sees.

    A forked child holds none of its parent's, and lets go of none in memory that both share.

    Args:
        reader: this reader's memory.
        directory: of its table.
    """

    def __init__(self, reader: Memory, directory: Memory) -> None:
        self._reader = reader
        self._directory = directory
        self._renew()
        _ALL.add(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._held: list[int] = []
        self._when_free: list[Callable[[], None]] = []

    def enter(self) -> int:
        """Hold the epoch that is now; probe only afterwards. Returns it, for `leave`."""
        with self._lock:
            if self._held:
                epoch = int(_now(self._directory.address))
            else:
                epoch = int(_publish(self._reader.address, self._directory.address))
            self._held.append(epoch)
        return epoch

    def leave(self, epoch: int) -> None:
        """Let go of one, after the last read of what was found."""
        with self._lock:
            if epoch not in self._held:  # held before a fork
                return
            self._held.remove(epoch)
            _set(self._reader.address, min(self._held, default=0))
            if self._held:
                return
            due, self._when_free = self._when_free, []
        for then in due:
            then()

    def when_free(self, then: Callable[[], None]) -> None:
        """Call `then` once no epoch is held: now, or by the thread that leaves the last one."""
        with self._lock:
            if self._held:
                self._when_free.append(then)
                return
        then()


class OldestEpoch:
    """How long readers have kept slots that were evicted from being used again. For the writer,
    under its lock.
    """

    def __init__(self) -> None:
        self._now = self._oldest = 0
        self._since_s = 0.0

    def note(self, writer: _policy.Writer) -> None:
        """Look at the readers' epochs, if a new one has begun."""
        now = int(writer.numbers[_policy.EPOCH])
        if now == self._now:
            return
        self._now, oldest = now, int(_policy.oldest_epoch(writer.readers, now))
        if oldest != self._oldest:
            self._oldest, self._since_s = oldest, time.monotonic()

    def age_s(self, writer: _policy.Writer) -> float:
        """Seconds since the oldest epoch that is held was first in the way; 0 if none is."""
        now = int(writer.numbers[_policy.EPOCH])
        oldest = int(_policy.oldest_epoch(writer.readers, now))
        waits = oldest < now and oldest == self._oldest
        return time.monotonic() - self._since_s if waits else 0.0


_ALL: weakref.WeakSet[Epochs] = weakref.WeakSet()


def _renew_after_fork() -> None:
    for epochs in _ALL:
        epochs._renew()


os.register_at_fork(after_in_child=_renew_after_fork)
