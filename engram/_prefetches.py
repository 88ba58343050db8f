"""Prefetches sent to a sidecar, which drops them when they are cancelled or the client is gone."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from engram._counters import Counters
from engram._stream import RequestStream
from engram._wire import pack_ngrams
from engram.errors import ServiceError
from engram.proto.v1 import engram_pb2 as pb
from engram.tiers import Ngrams, Prefetch

UNANSWERED_MAX = 64
"""Requests in flight: a sidecar that falls behind would only warm what was needed long ago."""
_TIMEOUT_S = 3600.0


class RemotePrefetch(Prefetch):
    """What was asked of a sidecar in one call."""

    def __init__(
        self, stream: RequestStream | None = None, request_ids: Iterable[int] = ()
    ) -> None:
        super().__init__()
        self._stream = stream
        self._request_ids = tuple(request_ids)

    def cancel(self) -> None:
        super().cancel()
        request_ids, self._request_ids = self._request_ids, ()
        for request_id in request_ids:
            assert self._stream is not None
            try:
                pending = self._stream.send(pb.PrefetchRequest(cancel=request_id), _TIMEOUT_S)
            except ServiceError:  # the stream ended, and all its prefetches with it
                return
            self._stream.forget(pending)


class PrefetchStream:
    """The Prefetch stream of a connection, opened when first needed.

    Args:
        stub: of the connection.
        target: how messages name the sidecar.
    """

    def __init__(self, stub: Any, target: str) -> None:
        self._stub = stub
        self._target = target
        self._lock = threading.Lock()
        self._stream: RequestStream | None = None

    def send(
        self, table: pb.GetTableResponse, parts: Iterable[Ngrams], counters: Counters
    ) -> RemotePrefetch:
        """Ask for all parts; returns at once and never raises.

        Args:
            counters: `prefetches` and `prefetches_dropped` count parts.
        """

        def answered(outcome: Any) -> None:
            if isinstance(outcome, Exception) or outcome.HasField("error"):
                counters.add(prefetches_dropped=1)

        request_ids = []
        stream = self._opened()
        for part in parts:
            if stream is None or stream.unanswered >= UNANSWERED_MAX:
                counters.add(prefetches_dropped=1)
                continue
            request = pb.PrefetchRequest(
                table=table.name, fingerprint=table.fingerprint, ngrams=pack_ngrams(part)
            )
            try:
                pending = stream.send(request, _TIMEOUT_S)
            except ServiceError:
                counters.add(prefetches_dropped=1)
                continue
            counters.add(prefetches=1)
            request_ids.append(pending.request_id)
            stream.forget(pending, answered)
        return RemotePrefetch(stream, request_ids)

    def _opened(self) -> RequestStream | None:
        with self._lock:
            if self._stream is None or not self._stream.usable:
                try:
                    self._stream = RequestStream(
                        self._stub.Prefetch, self._target, None, lambda: None
                    )
                except (ServiceError, ValueError, RuntimeError):
                    # The channel was closed, or no thread can be started now.
                    return None
            return self._stream

    def close(self) -> None:
        """End it; the sidecar drops what it has not read."""
        with self._lock:
            if self._stream is not None:
                self._stream.close()
