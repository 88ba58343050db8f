"""Named counters that many threads add to, whole at every reading, usable after a fork."""

from __future__ import annotations

import os
import threading
import weakref


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


_ALL: weakref.WeakSet[Counters] = weakref.WeakSet()


def _renew_locks() -> None:
    # A thread that does not exist in the child may have held a lock when its parent forked.
    for counters in _ALL:
        counters._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
