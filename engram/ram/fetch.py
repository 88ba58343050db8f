"""Misses of a client: fetched into its staging memory, a few chunks at a time.

A chunk belongs to a request from when it is sent until its reply came. Until then the sidecar may
write there, so the chunk of a request that nobody waits for any more is not used again before its
late reply. When the connection is lost, staging memory and lease go with it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from engram._failures import Failures
from engram._stream import Pending, RequestStream
from engram._wire import pack_ngrams, unpack_failures
from engram.errors import OverloadError, ServiceError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb
from engram.ram.attach import Lease
from engram.ram.bundle_tier import Deliver
from engram.ram.staged import Staged
from engram.tiers import Ngrams

_STALL_POLL_S = 0.1
REQUESTS_IN_FLIGHT_MAX = 4
"""Of one fetch; the sidecar reads one at depth while others are delivered or on their way."""


@dataclass(frozen=True)
class _Part:
    """A request, and the n-grams of the fetch that it asks for."""

    pending: Pending
    chunk: int
    first: int
    ngrams: Ngrams


class Fetcher:
    """Fetches over one stream into one lease's staging memory; use from any thread."""

    def __init__(self, lease: Lease, stream: RequestStream) -> None:
        self._lease = lease
        self._stream = stream
        self._chunk_bytes = lease.entries_per_chunk * lease.bundle.staged_bytes
        self._free: SimpleQueue[int] = SimpleQueue()
        self._late: set[int] = set()
        for chunk in range(lease.chunks):
            self._free.put(chunk)

    @property
    def stalled(self) -> bool:
        """Whether a request went unanswered for longer than somebody was ready to wait."""
        return bool(self._late)

    def fetch(self, ngrams: Ngrams, deliver: Deliver, timeout_s: float) -> Failures:
        """Have bundles written by the sidecar.

        Args:
            ngrams: each once.
            deliver: given the position of the first n-gram of a part, and the int64 addresses
                of the part's bundles, which stay as they are until it returns.
            timeout_s: longest wait for all.

        Returns:
            Rows that failed; all others in the bundles are valid.

        Raises:
            StreamLostError: the connection ended.
            UnavailableError: the sidecar does not answer in time, or has forgotten the lease.
            OverloadError: it has no room or time.
            ServiceError: what it wrote is not what was asked for.
        """
        deadline = time.monotonic() + timeout_s
        failures = Failures()
        waiting: deque[_Part] = deque()
        step = self._lease.entries_per_chunk
        first = 0
        try:
            while first < len(ngrams) or waiting:
                room = first < len(ngrams) and len(waiting) < REQUESTS_IN_FLIGHT_MAX
                chunk = self._chunk(deadline, wait=not waiting) if room else None
                if chunk is not None:
                    some = ngrams.take(slice(first, first + step))
                    waiting.append(self._send(some, first, chunk, deadline))
                    first += step
                    continue
                self._receive(waiting[0], deliver, failures)
                self._free.put(waiting.popleft().chunk)
        finally:
            for part in waiting:
                self._abandon(part)
        return failures

    def _chunk(self, deadline: float, *, wait: bool) -> int | None:
        while True:
            left_s = deadline - time.monotonic()
            try:
                return self._free.get(wait, max(0.0, min(left_s, _STALL_POLL_S)))
            except Empty:
                if not wait:
                    return None
            if self.stalled:
                raise UnavailableError(
                    "the sidecar does not answer, and holds all staging memory of this client; "
                    "is it stopped, or its disk stuck?"
                )
            if left_s <= 0:
                raise OverloadError(
                    "all staging memory of this client is in use; send fewer lookups at once"
                )

    def _send(self, ngrams: Ngrams, first: int, chunk: int, deadline: float) -> _Part:
        left_s = max(0.001, deadline - time.monotonic())
        request = pb.FetchRequest(
            token=self._lease.token,
            chunk=chunk,
            ngrams=pack_ngrams(ngrams),
            timeout_ms=int(1000 * left_s),
        )
        try:
            pending = self._stream.send(request, left_s)
        except BaseException:
            self._free.put(chunk)
            raise
        return _Part(pending, chunk, first, ngrams)

    def _receive(self, part: _Part, deliver: Deliver, failures: Failures) -> None:
        for reply in part.pending.replies():
            lease = self._lease
            staged = Staged(
                part.ngrams,
                lease.table_number,
                lease.bundle,
                lease.staging.address + part.chunk * self._chunk_bytes,
                part.pending.request_id,
            )
            whole = staged.whole()
            if whole:
                deliver(part.first, staged.bundles)
            if not (whole and staged.unchanged()):
                raise ServiceError(
                    "the sidecar wrote other n-grams than it was asked for; restart it, and use "
                    "versions of engram that match"
                )
            unpack_failures(reply.failed, failures)

    def _abandon(self, part: _Part) -> None:
        """Give a part's chunk back, now or when its reply comes."""
        if part.pending.over:
            self._free.put(part.chunk)
            return
        self._late.add(part.chunk)

        def answered(outcome: Any) -> None:
            self._late.discard(part.chunk)
            self._free.put(part.chunk)

        self._stream.forget(part.pending, answered)
