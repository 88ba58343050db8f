"""Kinds of work that a client does, and how often each comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from engram.errors import EngramError
from engram.torture.reports import described

Work = Callable[[], tuple[int, int]]
"""Looks up and checks; rows checked and wrong. Its `__name__` names it in reports."""


class InThreadError(EngramError):
    """An error of another thread, as `described`."""


class Works:
    """Kinds of work of one client.

    Args:
        rng: of this client.
        kinds: each with its weight.

    Attributes:
        each: every kind once, which is how a rehearsal goes.
    """

    def __init__(self, rng: np.random.Generator, kinds: Sequence[tuple[float, Work]]) -> None:
        self._rng = rng
        self.each = [work for _, work in kinds]
        weights = np.array([weight for weight, _ in kinds], np.float64)
        self._weights = weights / weights.sum()

    def any(self) -> Work:
        """One of them, by weight."""
        return self.each[self._rng.choice(len(self.each), p=self._weights)]


def together(works: Sequence[Work]) -> tuple[int, int]:
    """Do some work in a thread each, at once.

    Raises:
        InThreadError: one of them failed.
    """
    found: list[tuple[int, int]] = []
    failed: list[str] = []

    def do(work: Work) -> None:
        try:
            found.append(work())
        except Exception as error:
            # Not the error itself: in this frame it would keep alive what its lookup held.
            failed.append(described(error))

    threads = [threading.Thread(target=do, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise InThreadError(failed[0])
    return sum(rows for rows, _ in found), sum(wrong for _, wrong in found)
