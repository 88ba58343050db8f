"""One client's prefetches: queued, cancelled on request, and dropped when the client is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from engram.errors import RequestError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb
from engram.service._requests import prefetch_of
from engram.service._traffic import Traffic
from engram.tiers import Tier

HANDLES_MAX = 1024
"""Prefetches of one stream that can still be cancelled; older ones run to their end."""


class Prefetches:
    """Answers one request at a time.

    Args:
        boot_id: of this server.
        tier_of: the tier of a table's name and fingerprint.
        rows_max: rows that one request may ask for.
        traffic: where requests are counted.
    """

    def __init__(
        self,
        boot_id: str,
        tier_of: Callable[[str, str], Tier],
        rows_max: int,
        traffic: Traffic,
    ) -> None:
        self._boot_id = boot_id
        self._tier_of = tier_of
        self._rows_max = rows_max
        self._traffic = traffic
        self._lock = threading.Lock()
        self._handles: dict[int, Any] = {}
        self._closed = False

    def answer(self, request: pb.PrefetchRequest) -> Iterator[pb.PrefetchResponse]:
        """One reply; never raises."""
        reply = pb.PrefetchResponse(request_id=request.request_id, boot_id=self._boot_id)
        try:
            self._obey(request)
        except Exception as error:
            doing = f"a prefetch of table {request.table}"
            reply.error.CopyFrom(self._traffic.packed(error, doing))
        yield reply

    def _obey(self, request: pb.PrefetchRequest) -> None:
        if request.request_id == 0:
            raise RequestError("the request has no request_id; number requests from 1")
        if request.WhichOneof("what") == "cancel":
            with self._lock:
                handle = self._handles.pop(request.cancel, None)
            if handle is not None:
                handle.cancel()
            return
        tier = self._tier_of(request.table, request.fingerprint)
        ngrams = prefetch_of(request.ngrams, tier, self._rows_max)
        self._traffic.asked(request.table, "prefetch", len(ngrams))
        handle = tier.prefetch(ngrams)
        if handle is not None:
            self._keep(request.request_id, handle)

    def _keep(self, request_id: int, handle: Any) -> None:
        with self._lock:
            if not self._closed:
                self._handles[request_id] = handle
                if len(self._handles) > HANDLES_MAX:
                    del self._handles[next(iter(self._handles))]
                return
        handle.cancel()
        raise UnavailableError("the stream has ended; connect again")

    def cancel_all(self) -> None:
        """Drop whatever is not done: the client is gone."""
        with self._lock:
            self._closed = True
            handles, self._handles = list(self._handles.values()), {}
        for handle in handles:
            handle.cancel()
