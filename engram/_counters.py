"""Counters and histograms that many threads add to, whole at every reading, usable after a fork."""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf

SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Bounds of a histogram of reads: from a few cached rows to a device that hangs."""


class Counters:
    """Counters by name, each from 0 on.

    Several added in one call change together.
    """

    def __init__(self, *names: str) -> None:
        self._counts = dict.fromkeys(names, 0)
        self._lock = threading.Lock()
        _ALL.add(self)

    def add(self, **increments: int) -> None:
        counts = self._counts
        with self._lock:
            for name, increment in increments.items():
                counts[name] += increment

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def check_integrity(self) -> None:
        """Assert that nothing was ever taken off."""
        assert all(count >= 0 for count in self.read().values())


class Histogram:
    """Values counted by size.

    Args:
        bounds: largest value of each bucket, ascending; one more takes what is above.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()
        _ALL.add(self)

    def add(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def read(self) -> tuple[list[tuple[float, int]], float]:
        """(bound, values up to it) of each bucket, the last one's infinite; sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        return list(zip((*self._bounds, inf), accumulate(counts), strict=True)), total


_ALL: weakref.WeakSet[Counters | Histogram] = weakref.WeakSet()


def _renew_locks() -> None:
    # A thread that does not exist in the child may have held a lock when its parent forked.
    for counters in _ALL:
        counters._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
