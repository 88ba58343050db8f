"""One client's Lookup stream: workers take requests and make replies, gRPC's thread sends them.

Workers take turns at reading the stream and then work side by side, so that a request that waits
for the disk does not hold up the next. Replies wait in a bounded queue: a client that does not
read them stops its own workers and nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from engram.proto.v1 import engram_pb2 as pb

WORKERS = 2
REPLIES_WAITING_MAX = 4

Answer = Callable[[pb.LookupRequest], Iterator[pb.LookupResponse]]


class LookupStream:
    """Replies to a stream of requests.

    Args:
        requests: of one client; raises or ends when it is gone.
        answer: makes a worker's answering function; never raises.
    """

    def __init__(self, requests: Iterator[pb.LookupRequest], answer: Callable[[], Answer]) -> None:
        self._requests = requests
        self._turn = threading.Lock()
        self._waiting: SimpleQueue[pb.LookupResponse | None] = SimpleQueue()
        self._room = threading.Semaphore(REPLIES_WAITING_MAX)
        self._closed = False
        self._working = WORKERS
        for _ in range(WORKERS):
            threading.Thread(
                target=self._work, args=(answer(),), name="engram-lookup", daemon=True
            ).start()

    def replies(self) -> Iterator[pb.LookupResponse]:
        """All replies, until the client half-closed and got its answers, or is gone."""
        try:
            while (reply := self._waiting.get()) is not None:
                yield reply
                self._room.release()
        finally:
            self.close()

    def say(self, reply: pb.LookupResponse) -> None:
        """Send something that is no answer."""
        self._waiting.put(reply)

    def close(self) -> None:
        """Stop working for a client that is gone; safe to call twice."""
        self._closed = True
        self._room.release(WORKERS)
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

    def _next(self) -> pb.LookupRequest | None:
        with self._turn:
            if self._closed:
                return None
            try:
                return next(self._requests, None)
            except Exception:  # gRPC raises an undocumented class when the client is gone
                return None
