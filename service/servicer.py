"""`engram.v1.Engram`: what each call does."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from engram._failures import Failures
from engram._wire import ERROR_CODE_KEY, fault_of, pack_failures
from engram.errors import (
    EngramError,
    OverloadError,
    RowIntegrityError,
    SpecMismatchError,
    UnavailableError,
    UnknownTableError,
)
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramServicer
from engram.rows import Rows
from engram.service._fetch import FetchWorker, Leases
from engram.service._prefetch import Prefetches
from engram.service._requests import Piece, read_of
from engram.service._stream import Answer, AnswerStream
from engram.service._traffic import Traffic
from engram.tiers import Int64s, Tier

CHUNK_BYTES = 1 << 20
"""Row bytes of one reply."""
WORKERS = 2
"""Requests of one Lookup or Fetch stream that are answered at once."""


class Servicer(EngramServicer):
    """Serves tiers by name.

    Args:
        tiers: by the name under which each is served.
        rows_max: rows that one request may ask for.
        message_bytes_max: size of a request.
        streams_max: streams of each kind that may be open at once.
        leases: of clients that attached; None where none can.
        boot_id: of this server; made when None.
        traffic: where requests are counted; made when None.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        rows_max: int,
        message_bytes_max: int,
        streams_max: int,
        *,
        leases: Leases | None = None,
        boot_id: str | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = traffic or Traffic(tiers)
        self.boot_id = boot_id or secrets.token_hex(16)
        self._leases = leases
        self._tiers = dict(tiers)
        self.rows_max = rows_max
        self._streams_max = streams_max
        self._limits = pb.Limits(max_rows=rows_max, max_message_bytes=message_bytes_max)
        self._tables = {name: self._describe(name, tier) for name, tier in tiers.items()}
        self._lock = threading.Condition()
        self._streams: set[AnswerStream] = set()
        self._draining = False

    def _describe(self, name: str, tier: Tier) -> pb.GetTableResponse:
        spec, row_format = tier.spec, tier.row_format
        token_map = b"" if spec.token_map is None else spec.token_map.astype("<i4").tobytes()
        return pb.GetTableResponse(
            name=name,
            fingerprint=tier.fingerprint,
            boot_id=self.boot_id,
            spec=spec.to_json(),
            token_map=token_map,
            row_format=pb.RowFormat(**row_format.to_dict()),
            layers=[pb.Layer(layer=layer.layer, rows=layer.rows) for layer in spec.layers],
            limits=self._limits,
            attach=self._leases is not None,
        )

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    @property
    def clients(self) -> int:
        """Connections that lookups come over: open Lookup and Fetch streams."""
        with self._lock:
            return sum(stream.kind is not pb.PrefetchResponse for stream in self._streams)

    def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until all streams have ended, so long at most."""
        with self._lock:
            self._lock.wait_for(lambda: not self._streams, timeout_s)

    def drain(self) -> None:
        """Refuse new work, and ask the clients to finish what is in flight."""
        with self._lock:
            self._draining = True
            streams = list(self._streams)
        for stream in streams:
            stream.say(stream.kind(boot_id=self.boot_id, draining=True))

    def ListTables(self, request: pb.ListTablesRequest, context: Any) -> pb.ListTablesResponse:  # noqa: N802
        listed = [
            pb.ListTablesResponse.Table(name=name, fingerprint=tier.fingerprint)
            for name, tier in self._tiers.items()
        ]
        return pb.ListTablesResponse(tables=listed, boot_id=self.boot_id)

    def GetTable(self, request: pb.GetTableRequest, context: Any) -> pb.GetTableResponse:  # noqa: N802
        try:
            self._refuse_when_draining()
            self._named(request.name)
        except EngramError as error:
            self._abort(context, error)
        return self._tables[request.name]

    def Prefetch(  # noqa: N802
        self, requests: Iterator[pb.PrefetchRequest], context: Any
    ) -> Iterator[pb.PrefetchResponse]:
        prefetches = Prefetches(self.boot_id, self.tier, self.rows_max, self.traffic)
        try:
            yield from self._serve(
                requests, context, lambda: prefetches.answer, 1, pb.PrefetchResponse
            )
        finally:
            prefetches.cancel_all()

    def Lookup(  # noqa: N802
        self, requests: Iterator[pb.LookupRequest], context: Any
    ) -> Iterator[pb.LookupResponse]:
        yield from self._serve(
            requests, context, lambda: _Worker(self).answer, WORKERS, pb.LookupResponse
        )

    def Fetch(  # noqa: N802
        self, requests: Iterator[pb.FetchRequest], context: Any
    ) -> Iterator[pb.FetchResponse]:
        worker = FetchWorker(self.boot_id, self._leases or (lambda token: None), self.traffic)
        yield from self._serve(requests, context, lambda: worker.answer, WORKERS, pb.FetchResponse)

    def _serve(
        self,
        requests: Iterator[Any],
        context: Any,
        answer: Callable[[], Answer],
        workers: int,
        kind: type,
    ) -> Iterator[Any]:
        """Run a stream from its acceptance to its end."""
        try:
            stream = self._open_stream(requests, answer, workers, kind)
        except EngramError as error:
            self._abort(context, error)
        try:
            # Also wakes workers that wait for room in the queue of a client that is gone.
            context.add_callback(stream.close)
            # Tells the client that its stream was accepted.
            context.send_initial_metadata(())
            yield from stream.replies()
        finally:
            with self._lock:
                self._streams.discard(stream)
                self._lock.notify_all()

    def _open_stream(
        self, requests: Iterator[Any], answer: Callable[[], Answer], workers: int, kind: type
    ) -> AnswerStream:
        with self._lock:
            self._refuse_when_draining()
            if sum(stream.kind is kind for stream in self._streams) >= self._streams_max:
                raise OverloadError(
                    f"{self._streams_max} clients are connected already; "
                    "close one or raise limits.streams"
                )
            stream = AnswerStream(requests, answer, workers, kind)
            self._streams.add(stream)
        return stream

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise UnavailableError("the sidecar is shutting down; connect again later")

    def _named(self, name: str) -> Tier:
        if name not in self._tiers:
            raise UnknownTableError(
                f"no table {name[:80]!r} is served here; there are: {', '.join(self._tiers)}"
            )
        return self._tiers[name]

    def tier(self, name: str, fingerprint: str) -> Tier:
        """The tier that a request names.

        Raises:
            UnknownTableError: none of that name.
            SpecMismatchError: it holds another table than the request is for.
        """
        tier = self._named(name)
        if fingerprint != tier.fingerprint:
            raise SpecMismatchError(
                f"table {name} has fingerprint {tier.fingerprint}, the request is for "
                f"{fingerprint[:80]!r}; connect again",
                "fingerprint",
            )
        return tier

    def _abort(self, context: Any, error: EngramError) -> NoReturn:
        self.traffic.reject(error)
        fault = fault_of(error)
        context.set_trailing_metadata(((ERROR_CODE_KEY, str(int(fault.code))),))
        context.abort(fault.status, str(error))
        raise AssertionError("abort raises")


class _Worker:
    """Answers one request at a time, with buffers it keeps."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer
        self._buffers: dict[str, tuple[Rows, Int64s]] = {}
        self.answer: Answer = self._answer

    def _answer(self, request: pb.LookupRequest) -> Iterator[pb.LookupResponse]:
        try:
            yield from self._rows(request)
        except Exception as error:
            yield pb.LookupResponse(
                request_id=request.request_id,
                boot_id=self._servicer.boot_id,
                last=True,
                error=self._servicer.traffic.packed(error, f"a lookup of table {request.table}"),
            )

    def _rows(self, request: pb.LookupRequest) -> Iterator[pb.LookupResponse]:
        servicer = self._servicer
        tier = servicer.tier(request.table, request.fingerprint)
        chunk_rows = max(1, CHUNK_BYTES // tier.row_format.row_bytes)
        wanted = read_of(request, tier, servicer.rows_max, chunk_rows)
        if request.WhichOneof("rows_of") == "ngrams":
            ngrams = len(request.ngrams.ngrams.orders)
            servicer.traffic.asked(request.table, "lookup", ngrams)
        failures = Failures()
        sent = 0
        for piece in wanted.pieces:
            rows, places = self._room(request.table, tier, max(piece.rows, chunk_rows))
            _read(piece, rows, places, failures)
            for at in range(0, piece.rows, chunk_rows):
                end = min(at + chunk_rows, piece.rows)
                reply = pb.LookupResponse(
                    request_id=request.request_id,
                    boot_id=servicer.boot_id,
                    first_row=sent + at,
                    rows=end - at,
                    values=rows.values[at:end].tobytes(),
                    scales=b"" if rows.scales is None else rows.scales[at:end].tobytes(),
                )
                if sent + end == wanted.rows:
                    reply.last = True
                    reply.failed.extend(pack_failures(failures))
                yield reply
            sent += piece.rows
        if not wanted.rows:
            yield pb.LookupResponse(
                request_id=request.request_id, boot_id=servicer.boot_id, last=True
            )

    def _room(self, table: str, tier: Tier, rows: int) -> tuple[Rows, Int64s]:
        held = self._buffers.get(table)
        if held is None or len(held[1]) < rows:
            held = (Rows.empty((rows,), tier.row_format), np.arange(rows, dtype=np.int64))
            self._buffers[table] = held
        return held


def _read(piece: Piece, out: Rows, places: Int64s, failures: Failures) -> None:
    try:
        piece.read(out, places[: piece.rows])
    except RowIntegrityError as error:
        failures.add(error.failures, error.cause)
