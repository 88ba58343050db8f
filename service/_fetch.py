"""Fetches: n-grams that a client of this host missed, written into its staging memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from engram._failures import Failures
from engram._wire import pack_failures, unpack_ngrams
from engram.errors import RequestError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb
from engram.service._traffic import Traffic
from engram.tiers import Ngrams


class StagingLease(Protocol):
    """What a fetch needs of an attached client's lease."""

    table: str
    tier: Any
    staging: Any
    chunks: int
    entries_per_chunk: int


Leases = Callable[[bytes], StagingLease | None]
"""The lease of a token, while its client is attached."""


class FetchWorker:
    """Answers one request at a time.

    Args:
        boot_id: of this server.
        leases: looks up tokens.
        traffic: where requests are counted.
    """

    def __init__(self, boot_id: str, leases: Leases, traffic: Traffic) -> None:
        self._boot_id = boot_id
        self._leases = leases
        self._traffic = traffic

    def answer(self, request: pb.FetchRequest) -> Iterator[pb.FetchResponse]:
        """One reply; never raises."""
        reply = pb.FetchResponse(request_id=request.request_id, boot_id=self._boot_id)
        try:
            reply.failed.extend(pack_failures(self._fetch(request)))
        except Exception as error:
            reply.error.CopyFrom(self._traffic.packed(error, "a fetch"))
        yield reply

    def _fetch(self, request: pb.FetchRequest) -> Failures:
        lease = self._leases(request.token)
        if lease is None:
            raise UnavailableError("the client's lease has ended; attach again")
        ngrams = _ngrams_of(request, lease)
        self._traffic.asked(lease.table, "fetch", len(ngrams))
        # Until this returns, the lease keeps its memory mapped even if the client dies.
        chunk_bytes = lease.entries_per_chunk * lease.tier.bundle.staged_bytes
        failures: Failures = lease.tier.misses.read(
            ngrams,
            lease.staging.address + request.chunk * chunk_bytes,
            request_id=request.request_id,
            timeout_s=request.timeout_ms / 1000,
        )
        return failures


def _ngrams_of(request: pb.FetchRequest, lease: StagingLease) -> Ngrams:
    """Check a request against its lease.

    Raises:
        RequestError: it is malformed, or names memory that the lease does not have.
    """
    if request.request_id == 0 or request.timeout_ms == 0:
        raise RequestError("the request has no request_id or no timeout; number them from 1")
    if request.chunk >= lease.chunks:
        raise RequestError(
            f"staging chunk {request.chunk} does not exist; the lease has {lease.chunks}"
        )
    count = len(request.ngrams.orders)
    if count > lease.entries_per_chunk:
        raise RequestError(
            f"{count} n-grams do not fit a chunk of {lease.entries_per_chunk}; split the request"
        )
    spec = lease.tier.spec
    return unpack_ngrams(request.ngrams, spec.min_order, spec.max_order, spec.canonical_vocab_size)
