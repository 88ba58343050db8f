"""Tables served by a sidecar: `connect`, and the tier that asks it over gRPC."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from engram._channel import Tls, require_own_grpc
from engram._counters import Counters
from engram._failures import Failures
from engram._link import Connection, Link
from engram._prefetches import RemotePrefetch
from engram._stream import Pending, StreamLostError
from engram._wire import pack_ngrams, scatter_rows, unpack_failures
from engram.errors import ServiceError, SpecMismatchError
from engram.proto.v1 import engram_pb2 as pb
from engram.rows import RowFormat, Rows
from engram.spec import NgramSpec
from engram.store.checks import digest
from engram.table import Table
from engram.tiers import Int64s, Ngrams, Selection, Tier

REQUEST_ROWS_MAX = 1 << 14
"""Rows asked for at once: enough to read at depth, few enough that several requests overlap."""
REQUESTS_IN_FLIGHT_MAX = 4


@dataclass(frozen=True)
class _Part:
    """One request of a lookup, and the rows of the lookup that it asks for."""

    request: pb.LookupRequest
    first_row: int
    rows: int


class RemoteTier(Tier):
    """Asks a sidecar for rows. See `connect` for the arguments and errors.

    A lookup is cut into requests within the sidecar's limits, several of them in flight. When the
    sidecar went away in between, the lookup is tried once more on a new connection.
    """

    def __init__(
        self,
        target: str,
        name: str | None = None,
        *,
        timeout_s: float = 30.0,
        tls: Tls | None = None,
    ) -> None:
        tls = tls or Tls()
        connection = Connection(target, name, tls, timeout_s)
        try:
            table = connection.table
            self.name = table.name
            self.fingerprint = table.fingerprint
            self.spec = _spec_of(table)
            self.row_format = _row_format_of(table, self.spec)
        except BaseException:
            connection.close()
            raise
        self._target = connection.target
        self._timeout_s = timeout_s
        self._link = Link(connection, tls)
        self._counters = Counters(
            "requests", "rows_read", "rows_failed", "prefetches", "prefetches_dropped"
        )
        self._finalizer = weakref.finalize(self, self._link.close)

    def read(self, ngrams: Ngrams, selection: Selection, out: Rows, places: Int64s) -> None:
        def parts(limits: pb.Limits) -> Iterator[_Part]:
            widths = len(selection.layers) * np.diff(selection.order_bounds)
            counts = widths[ngrams.orders - selection.min_order]
            step = _step(limits, int(widths.max()), 1 + 4 * self.spec.max_order)
            first_row = 0
            for at in range(0, len(ngrams), step):
                rows = int(counts[at : at + step].sum())
                lookup = pb.NgramLookup(
                    ngrams=pack_ngrams(_slice(ngrams, at, at + step)),
                    layers=selection.layers,
                    columns=selection.columns,
                )
                yield _Part(self._request(ngrams=lookup), first_row, rows)
                first_row += rows

        self._look_up(parts, out, places)

    def read_rows(self, layer: int, row_ids: Int64s, out: Rows, places: Int64s) -> None:
        def parts(limits: pb.Limits) -> Iterator[_Part]:
            step = _step(limits, 1, 8)
            for at in range(0, len(row_ids), step):
                ids = row_ids[at : at + step].astype("<i8", copy=False)
                lookup = pb.RowLookup(layer=layer, row_ids=ids.tobytes())
                yield _Part(self._request(rows=lookup), at, len(ids))

        self._look_up(parts, out, places)

    def _request(self, **rows_of: Any) -> pb.LookupRequest:
        return pb.LookupRequest(table=self.name, fingerprint=self.fingerprint, **rows_of)

    def _look_up(self, parts: Any, out: Rows, places: Int64s) -> None:
        connection = self._link.connection()
        try:
            failures = self._exchange(connection, parts(connection.table.limits), out, places)
        except StreamLostError:
            # Rows are immutable, so asking again is safe; a sidecar that restarted answers.
            connection = self._link.connection()
            failures = self._exchange(connection, parts(connection.table.limits), out, places)
        failed = failures.rows
        self._counters.add(rows_read=len(places), rows_failed=sum(map(len, failed.values())))
        failures.raise_any(self.name, served=True)

    def _exchange(
        self, connection: Connection, parts: Iterable[_Part], out: Rows, places: Int64s
    ) -> Failures:
        """Send every part, a few at a time; what failed."""
        stream = connection.stream
        failures = Failures()
        waiting: list[tuple[Pending, _Part]] = []
        todo = iter(parts)
        try:
            while True:
                while len(waiting) < REQUESTS_IN_FLIGHT_MAX and (part := next(todo, None)):
                    waiting.append((stream.send(part.request, self._timeout_s), part))
                    self._counters.add(requests=1)
                if not waiting:
                    return failures
                self._receive(*waiting[0], failures, out, places)
                waiting.pop(0)
        finally:
            for pending, _ in waiting:
                stream.forget(pending)

    def _receive(
        self,
        pending: Pending,
        part: _Part,
        failures: Failures,
        out: Rows,
        places: Int64s,
    ) -> None:
        got = 0
        for reply in pending.replies():
            end = got + reply.rows
            if (
                reply.first_row != got
                or end > part.rows
                or len(reply.values) != reply.rows * self.row_format.value_bytes
                or len(reply.scales) != reply.rows * self.row_format.scale_bytes
            ):
                self._refuse(f"rows {reply.first_row} to {reply.first_row + reply.rows}")
            scatter_rows(reply, places[part.first_row + got : part.first_row + end], out)
            unpack_failures(reply.failed, failures)
            got = end
        if got != part.rows:
            self._refuse(f"{got} rows")

    def _refuse(self, came: str) -> NoReturn:
        raise ServiceError(
            f"the sidecar at {self._target} sent {came} where others were due; "
            "use versions of engram that match"
        )

    def prefetch(self, ngrams: Ngrams) -> RemotePrefetch:
        require_own_grpc()
        self._link.require_open()
        try:
            connection = self._link.connection()
        except ServiceError:
            self._counters.add(prefetches_dropped=1)
            return RemotePrefetch(None)
        rows_each = len(self.spec.layers) * self.spec.heads
        step = _step(connection.table.limits, rows_each, 1 + 4 * self.spec.max_order)
        parts = (_slice(ngrams, at, at + step) for at in range(0, len(ngrams), step))
        return connection.prefetches.send(connection.table, parts, self._counters)

    def stats(self) -> dict[str, Any]:
        connection = self._link.now
        return {
            "tier": "remote",
            "target": self._target,
            "boot_id": connection.stream.boot_id or connection.table.boot_id,
            "reconnects": self._link.reconnects,
            **self._counters.read(),
        }

    def check_integrity(self) -> None:
        self._counters.check_integrity()

    def close(self) -> None:
        self._finalizer()


def _slice(ngrams: Ngrams, start: int, stop: int) -> Ngrams:
    return Ngrams(ngrams.windows[start:stop], ngrams.orders[start:stop])


def _step(limits: pb.Limits, rows_each: int, bytes_each: int) -> int:
    """How many items one request may name, each of at most so many rows and bytes."""
    rows = min(limits.max_rows, REQUEST_ROWS_MAX)
    # What is not items: table name, fingerprint, selection.
    room = limits.max_message_bytes - 65536
    return max(1, min(rows // max(1, rows_each), room // bytes_each))


def _spec_of(table: pb.GetTableResponse) -> NgramSpec:
    if len(table.token_map) % 4:
        raise SpecMismatchError(
            f"the token map of {table.name} came as {len(table.token_map)} bytes, which are not "
            "whole ids of 4; use versions of engram that match",
            "token_map",
        )
    token_map = np.frombuffer(table.token_map, "<i4").astype(np.int32) if table.token_map else None
    spec = NgramSpec.from_json(table.spec, token_map)
    if spec.digest != digest(table.spec.encode()):
        raise SpecMismatchError(
            f"the spec of {table.name} means something else here than at the sidecar; "
            "use versions of engram that match",
            "digest",
        )
    ours = [(layer.layer, layer.rows) for layer in spec.layers]
    if ours != [(layer.layer, layer.rows) for layer in table.layers]:
        raise SpecMismatchError(
            f"the layers of {table.name} are not those of its spec; import the table again",
            "layers",
        )
    return spec


def _row_format_of(table: pb.GetTableResponse, spec: NgramSpec) -> RowFormat:
    packed = table.row_format
    scale = packed.global_scale if packed.HasField("global_scale") else None
    if packed.dim != spec.dim:
        raise SpecMismatchError(
            f"the rows of {table.name} have {packed.dim} values, those of its spec {spec.dim}; "
            "import the table again",
            "dim",
        )
    return RowFormat(packed.name, packed.dim, scale)


def connect(
    target: str,
    name: str | None = None,
    *,
    timeout_s: float = 30.0,
    root_certificates: str | os.PathLike[str] | None = None,
    client_certificate: str | os.PathLike[str] | None = None,
    client_key: str | os.PathLike[str] | None = None,
) -> Table:
    """Open a table that a sidecar serves.

    Args:
        target: `unix:PATH`; or `HOST:PORT` or `dns:///HOST:PORT`, over TLS unless the host is
            this one (`localhost`, 127.0.0.0/8, ::1).
        name: of the table; may be left out where only one is served.
        timeout_s: longest wait for the answer to one request.
        root_certificates: PEM file of who signs the sidecar's certificate; the system's if None.
        client_certificate, client_key: PEM files that the sidecar asks for.

    Raises:
        UnavailableError: nothing answers at `target`, or not engram.
        UnknownTableError: no table of that name, or several and no name.
        SpecMismatchError: its spec means something else to this version of engram.
        ConfigError: a target or file that cannot be used.
    """
    return Table(
        RemoteTier(
            target,
            name,
            timeout_s=timeout_s,
            tls=Tls(root_certificates, client_certificate, client_key),
        )
    )
