"""One thread for work that nobody waits for, with a bounded queue."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from engram.errors import EngramError

_EXIT_SECONDS_MAX = 2.0
_log = logging.getLogger("engram")

_Work = tuple[int, Callable[..., Any], tuple[Any, ...]]


class Background:
    """Runs functions one after the other in a thread of its own, made when first needed.

    A forked child begins with an empty queue. The interpreter's end waits for no more than what
    is running then.

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
        _ALL.add(self)

    def _renew(self) -> None:
        self._owner = os.getpid()
        self._thread: threading.Thread | None = None
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()

    def submit(self, size: int, work: Callable[..., Any], *arguments: Any) -> bool:
        """Queue `work(*arguments)` of `size`; False if there is no room, or after `close`."""
        if self._owner != os.getpid():
            self._renew()
        with self._lock:
            if self._closed or (self._pending and self._pending + size > self._pending_max):
                return False
            if self._thread is None and not self._start():
                return False
            self._pending += size
            self._queue.put((size, work, arguments))
        return True

    def _start(self) -> bool:
        # A daemon, because else the interpreter would finish the whole queue before it ends.
        thread = threading.Thread(
            target=self._run, args=(self._queue,), name=self._name, daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no thread can be started now
            return False
        self._thread = thread
        return True

    def _run(self, queue: SimpleQueue[_Work | None]) -> None:
        while (item := queue.get()) is not None:
            size, work, arguments = item
            try:
                if not self._closed:
                    work(*arguments)
            except EngramError:
                pass  # whoever needs the outcome asks again, and is told
            except Exception:
                _log.exception("work in the background failed")
            with self._lock:
                self._pending -= size

    def check_integrity(self) -> None:
        """Assert that what is pending adds up."""
        with self._lock:
            assert self._pending >= 0

    def close(self, timeout_s: float | None = None) -> None:
        """Drop what waits and end the thread; safe to call twice.

        Args:
            timeout_s: longest wait for what runs.
        """
        self._closed = True
        if self._owner == os.getpid():
            with self._lock:
                thread, self._thread = self._thread, None
            if thread is not None:
                self._queue.put(None)
                thread.join(timeout_s)


_ALL: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Compiled code must not run on once the interpreter is gone.
    for background in list(_ALL):
        background.close(_EXIT_SECONDS_MAX)
