"""One stream of a client: many requests in flight, their replies told apart.

A reader thread hands each reply to the call that waits for it, and does nothing else: rows are
copied by the thread that asked, so nothing writes into a caller's buffer after its call ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from engram._wire import error_of, error_of_call
from engram.errors import EngramError, ServiceError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb


class StreamLostError(UnavailableError):
    """The stream ended before the answer was complete; another one may serve the request."""


class Pending:
    """A request in flight.

    Attributes:
        over: whether nothing more will come for it.
    """

    def __init__(self, request_id: int, deadline: float) -> None:
        self.request_id = request_id
        self.over = False
        self.arrived: SimpleQueue[Any] = SimpleQueue()
        self._deadline = deadline

    def replies(self) -> Iterator[Any]:
        """Replies as they come, to the last.

        Raises:
            ServiceError: the request failed, or no reply came by the deadline.
        """
        while True:
            try:
                reply = self.arrived.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except Empty:
                raise UnavailableError(
                    "the sidecar did not answer in time; is it stopped, or its disk stuck?"
                ) from None
            if isinstance(reply, EngramError):
                try:
                    raise reply
                finally:
                    # Else frame and error would keep each other, and all that the callers hold.
                    del reply
            if reply.HasField("error"):
                raise error_of(reply.error.code, reply.error.message)
            yield reply
            if _is_last(reply):
                return


def _is_last(reply: Any) -> bool:
    """Whether nothing more comes for the request; only Lookup sends several replies to one."""
    return reply.last if isinstance(reply, pb.LookupResponse) else True


class RequestStream:
    """An open stream; use from any thread.

    Args:
        method: of the stub, takes requests and gives replies.
        target: how messages name the sidecar.
        timeout_s: longest wait for the sidecar to accept it; None not to wait.
        ended: called once nothing more will come.

    Raises:
        ServiceError: the sidecar refuses it, or does not answer in time.
    """

    def __init__(
        self,
        method: Callable[[Iterator[Any]], Any],
        target: str,
        timeout_s: float | None,
        ended: Callable[[], None],
    ) -> None:
        self._target = target
        self._on_end = ended
        self._answered = threading.Event()
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._last_id = 0
        self._ended: EngramError | None = None
        self._late: dict[int, Callable[[Any], None]] = {}
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._call = method(iter(self._requests.get, None))
        self.boot_id = ""
        reader = threading.Thread(target=self._receive, name="engram-stream", daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            self.close()
            raise UnavailableError(
                f"no thread can be had for {target} ({error}); raise this process's limits"
            ) from None
        if timeout_s is None:
            return
        if not self._answered.wait(timeout_s):
            self._end(UnavailableError(f"{target} did not answer in time; is it stopped?"))
            self._call.cancel()
        if self._ended is not None:
            raise _copy(self._ended)

    @property
    def usable(self) -> bool:
        """Whether new requests can be sent."""
        return self._ended is None

    @property
    def unanswered(self) -> int:
        """Requests whose final reply has not come."""
        return len(self._pending) + len(self._late)

    def send(self, request: Any, timeout_s: float) -> Pending:
        """Send `request` under an id of its own.

        Raises:
            ServiceError: the stream has ended.
        """
        with self._lock:
            if self._ended is not None:
                raise _copy(self._ended)
            self._last_id += 1
            pending = Pending(self._last_id, time.monotonic() + timeout_s)
            self._pending[self._last_id] = pending
            request.request_id = self._last_id
            self._requests.put(request)
        return pending

    def forget(self, pending: Pending, then: Callable[[Any], None] | None = None) -> None:
        """Wait no longer for `pending`, none of whose replies were taken.

        Args:
            then: called once, with its final reply or with the error that ended the stream; by
                this thread if that has come already, else by the stream's.
        """
        with self._lock:
            waiting = self._pending.pop(pending.request_id, None) is not None
            if waiting and then is not None:
                self._late[pending.request_id] = then
        if not waiting and then is not None:
            while not _is_last(outcome := pending.arrived.get()):
                pass
            then(outcome)

    def close(self) -> None:
        """End the stream; requests in flight fail."""
        self._end(UnavailableError(f"the connection to {self._target} was closed"))
        self._call.cancel()

    def _receive(self) -> None:
        reason: EngramError
        try:
            self._call.initial_metadata()
            self._answered.set()
            for reply in self._call:
                self._deliver(reply)
            reason = StreamLostError(f"the sidecar at {self._target} ended the connection; retry")
        except grpc.RpcError as error:
            reason = error_of_call(error, self._target)
            if isinstance(reason, UnavailableError):
                reason = StreamLostError(str(reason))
        except Exception as error:
            reason = ServiceError(f"the stream to {self._target} broke: {error!r}; connect again")
        self._end(reason)
        self._answered.set()
        on_end, self._on_end = self._on_end, _nothing
        on_end()

    def _deliver(self, reply: Any) -> None:
        if reply.draining:
            # What was sent is still answered; half-closing says that nothing follows.
            with self._lock:
                self._ended = StreamLostError(f"the sidecar at {self._target} is stopping; retry")
                self._requests.put(None)
            return
        self.boot_id = reply.boot_id
        last = _is_last(reply)
        late = None
        with self._lock:
            pending = self._pending.get(reply.request_id)
            if last:
                self._pending.pop(reply.request_id, None)
                late = self._late.pop(reply.request_id, None)
            if pending is not None:
                pending.over = last
                pending.arrived.put(reply)
        if late is not None:
            late(reply)

    def _end(self, reason: EngramError) -> None:
        with self._lock:
            self._ended = self._ended or reason
            pending, self._pending = self._pending, {}
            late, self._late = self._late, {}
            self._requests.put(None)
        for each in pending.values():
            each.over = True
            each.arrived.put(_copy(reason))
        for then in late.values():
            then(reason)


def _nothing() -> None:
    """What a stream calls that has ended: it keeps nothing alive any more."""


def _copy(error: EngramError) -> EngramError:
    """Another instance for another thread to raise."""
    return type(error)(str(error))
