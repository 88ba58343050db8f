"""One client's stream: workers take requests and make replies, gRPC's thread sends them.

Workers take turns at reading the stream and then work side by side, so that a request that waits
for the disk does not hold up the next. Replies wait in a bounded queue: a client that does not
read them stops its own workers and nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

REPLIES_WAITING_MAX = 4

Answer = Callable[[Any], Iterator[Any]]


class AnswerStream:
    """Replies to a stream of requests.

    Args:
        requests: of one client; raises or ends when it is gone.
        answer: makes a worker's answering function; never raises.
        workers: how many requests are answered at once.
        kind: class of the replies.
    """

    def __init__(
        self, requests: Iterator[Any], answer: Callable[[], Answer], workers: int, kind: type
    ) -> None:
        self.kind = kind
        self._requests = requests
        self._turn = threading.Lock()
        self._waiting: SimpleQueue[Any] = SimpleQueue()
        self._room = threading.Semaphore(REPLIES_WAITING_MAX)
        self._closed = False
        self._workers = self._working = workers
        for _ in range(workers):
            threading.Thread(
                target=self._work, args=(answer(),), name="engram-stream", daemon=True
            ).start()

    def replies(self) -> Iterator[Any]:
        """All replies, until the client half-closed and got its answers, or is gone."""
        try:
            while (reply := self._waiting.get()) is not None:
                yield reply
                self._room.release()
        finally:
            self.close()

    def say(self, reply: Any) -> None:
        """Send something that is no answer."""
        self._waiting.put(reply)

    def close(self) -> None:
        """Stop working for a client that is gone; safe to call twice."""
        self._closed = True
        self._room.release(self._workers)
        self._waiting.put(None)

    def _work(self, answer: Answer) -> None:
        try:
            while (request := self._next()) is not None:
                for reply in answer(request):
                    self._room.acquire()
                    if self._closed:
                        return
                    self._waiting.put(reply)
        finally:
            with self._turn:
                self._working -= 1
                if not self._working:
                    self._waiting.put(None)

    def _next(self) -> Any:
        with self._turn:
            if self._closed:
                return None
            try:
                return next(self._requests, None)
            except Exception:  # gRPC raises an undocumented class when the client is gone
                return None
