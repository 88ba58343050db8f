"""N-grams brought up to the device ahead of the step that needs them.

The RAM tier reads what it lacks; as n-grams arrive there, one thread queues small launches that
copy them on, on the same stream as the steps', so that a step waits for at most one of them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from engram.errors import EngramError
from engram.tiers import Ngrams, Prefetch

_log = logging.getLogger("engram.gpu")
CHUNK_NGRAMS = 256
"""Of one launch: a megabyte or so, some 20 us over PCIe."""
_POLL_S = 0.0005
_PATIENCE_S = 10.0


class DevicePrefetch(Prefetch):
    """A prefetch, and the one it stands on."""

    def __init__(self, below: Prefetch) -> None:
        super().__init__()
        self._below = below

    def cancel(self) -> None:
        super().cancel()
        self._below.cancel()


class Prefetcher:
    """Does prefetches one after the other, in a thread that lives while there are some.

    Args:
        keep: puts n-grams on the device that have arrived in the RAM tier; returns those that
            have not.
    """

    def __init__(self, keep: Callable[[Ngrams], Ngrams]) -> None:
        self._keep = keep
        self._due: queue.SimpleQueue[tuple[Ngrams, DevicePrefetch]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        self._closed = False

    def start(self, ngrams: Ngrams, below: Prefetch) -> DevicePrefetch:
        """Bring `ngrams` to the device once they arrive; returns at once."""
        handle = DevicePrefetch(below)
        with self._lock:
            if not self._open:
                thread = threading.Thread(target=self._run, name="engram-gpu-fill", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread can be started now; the RAM tier goes on
                    return handle
            self._open += 1
            self._due.put((ngrams, handle))
        return handle

    def _run(self) -> None:
        while True:
            ngrams, handle = self._due.get()
            try:
                self._bring(ngrams, handle)
            except EngramError:
                pass  # who looks up what did not come is told why
            except Exception:
                _log.exception("n-grams could not be brought to the device")
            finally:
                with self._lock:
                    self._open -= 1
                    last = not self._open
            if last:
                return

    def _bring(self, ngrams: Ngrams, handle: DevicePrefetch) -> None:
        until = time.monotonic() + _PATIENCE_S
        for first in range(0, len(ngrams), CHUNK_NGRAMS):
            left = ngrams.take(slice(first, first + CHUNK_NGRAMS))
            while len(left) and not (handle.cancelled or self._closed):
                waiting = self._keep(left)
                if len(waiting) == len(left):
                    if time.monotonic() > until:  # rows that cannot be read are left to lookups
                        break
                    time.sleep(_POLL_S)
                left = waiting

    def close(self) -> None:
        """Start nothing more."""
        self._closed = True
