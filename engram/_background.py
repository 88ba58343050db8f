"""One thread for work that nobody waits for, with a bounded queue."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Background:
    """Runs functions one after the other in a thread of its own, made when first needed.

    A forked child begins with an empty queue.

    Args:
        name: of the thread.
        pending_max: total size of the work that may wait or run; more is refused, unless nothing
            else is there.
    """

    def __init__(self, name: str, pending_max: int) -> None:
        self._name = name
        self._pending_max = pending_max
        self._closed = False
        self._renew()

    def _renew(self) -> None:
        self._owner = os.getpid()
        self._executor: ThreadPoolExecutor | None = None
        self._pending = 0
        self._lock = threading.Lock()

    def submit(self, size: int, work: Callable[..., Any], *arguments: Any) -> bool:
        """Queue `work(*arguments)` of `size`; False if there is no room, or after `close`."""
        if self._owner != os.getpid():
            self._renew()
        with self._lock:
            if self._closed or (self._pending and self._pending + size > self._pending_max):
                return False
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            try:
                future = self._executor.submit(work, *arguments)
            except RuntimeError:  # no thread can be started now
                return False
            self._pending += size
        future.add_done_callback(lambda _: self._done(size))
        return True

    def _done(self, size: int) -> None:
        with self._lock:
            self._pending -= size

    def check_integrity(self) -> None:
        """Assert that what is pending adds up."""
        with self._lock:
            assert self._pending >= 0

    def close(self) -> None:
        """Drop what waits and end the thread; safe to call twice."""
        self._closed = True
        if self._owner == os.getpid():
            with self._lock:
                executor, self._executor = self._executor, None
            if executor is not None:
                executor.shutdown(cancel_futures=True)
