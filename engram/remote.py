"""Tables served by a sidecar: `connect`, and the tier that asks it over gRPC."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from engram._channel import Tls, require_own_grpc
from engram._counters import Counters
from engram._described import items_per_request, row_format_of, spec_of
from engram._failures import Failures
from engram._link import Connection, Link
from engram._prefetches import RemotePrefetch
from engram._stream import Pending, StreamLostError
from engram._wire import pack_ngrams, scatter_rows, unpack_failures
from engram.errors import ConfigError, ServiceError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb
from engram.rows import Rows
from engram.table import Table
from engram.tiers import Int64s, Ngrams, Selection, Tier

REQUESTS_IN_FLIGHT_MAX = 4
RETRY_S = 0.1


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
        waits: bool = False,
    ) -> None:
        tls = tls or Tls()
        connection = Connection(target, name, tls, timeout_s)
        try:
            table = connection.table
            self.name = table.name
            self.fingerprint = table.fingerprint
            self.spec = spec_of(table)
            self.row_format = row_format_of(table, self.spec)
            connection.open("Lookup")
        except BaseException:
            connection.close()
            raise
        self._target = connection.target
        self._timeout_s = timeout_s
        self._waits = waits
        self._link = Link(connection, tls)
        self._counters = Counters(
            "requests", "rows_read", "rows_failed", "prefetches", "prefetches_dropped"
        )
        self._finalizer = weakref.finalize(self, self._link.close)

    def read(self, ngrams: Ngrams, selection: Selection, out: Rows, places: Int64s) -> None:
        def parts(limits: pb.Limits) -> Iterator[_Part]:
            widths = len(selection.layers) * np.diff(selection.order_bounds)
            counts = widths[ngrams.orders - selection.min_order]
            step = items_per_request(limits, int(widths.max()), 1 + 4 * self.spec.max_order)
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

    def read_rows(
        self,
        layer: int,
        row_ids: Int64s,
        out: Rows,
        places: Int64s,
        timeout_s: float | None = None,
    ) -> None:
        """As `Tier.read_rows`; waits no longer than `timeout_s` for an answer, if given."""

        def parts(limits: pb.Limits) -> Iterator[_Part]:
            step = items_per_request(limits, 1, 8)
            for at in range(0, len(row_ids), step):
                ids = row_ids[at : at + step].astype("<i8", copy=False)
                lookup = pb.RowLookup(layer=layer, row_ids=ids.tobytes())
                yield _Part(self._request(rows=lookup), at, len(ids))

        self._look_up(parts, out, places, timeout_s)

    def _request(self, **rows_of: Any) -> pb.LookupRequest:
        return pb.LookupRequest(table=self.name, fingerprint=self.fingerprint, **rows_of)

    def _look_up(
        self, parts: Any, out: Rows, places: Int64s, timeout_s: float | None = None
    ) -> None:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                failures = self._ask(parts, out, places, timeout_s)
                break
            except UnavailableError:
                self._link.require_open()
                if not self._waits or time.monotonic() >= deadline:
                    raise
            time.sleep(RETRY_S)
        failed = failures.rows
        self._counters.add(rows_read=len(places), rows_failed=sum(map(len, failed.values())))
        failures.raise_any(self.name, served=True)

    def _ask(self, parts: Any, out: Rows, places: Int64s, timeout_s: float) -> Failures:
        connection = self._link.connection()
        try:
            return self._exchange(
                connection, parts(connection.table.limits), out, places, timeout_s
            )
        except StreamLostError:
            # Rows are immutable, so asking again is safe; a sidecar that restarted answers.
            connection = self._link.connection()
            return self._exchange(
                connection, parts(connection.table.limits), out, places, timeout_s
            )

    def _exchange(
        self,
        connection: Connection,
        parts: Iterable[_Part],
        out: Rows,
        places: Int64s,
        timeout_s: float,
    ) -> Failures:
        """Send every part, a few at a time; what failed."""
        stream = connection.stream
        failures = Failures()
        waiting: list[tuple[Pending, _Part]] = []
        todo = iter(parts)
        try:
            while True:
                while len(waiting) < REQUESTS_IN_FLIGHT_MAX and (part := next(todo, None)):
                    waiting.append((stream.send(part.request, timeout_s), part))
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
            return RemotePrefetch()
        rows_each = len(self.spec.layers) * self.spec.heads
        step = items_per_request(connection.table.limits, rows_each, 1 + 4 * self.spec.max_order)
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


def connect(
    target: str,
    name: str | None = None,
    *,
    timeout_s: float = 30.0,
    on_unavailable: str | None = None,
    root_certificates: str | os.PathLike[str] | None = None,
    client_certificate: str | os.PathLike[str] | None = None,
    client_key: str | os.PathLike[str] | None = None,
) -> Table:
    """Open a table that a sidecar serves.

    On a Unix socket the sidecar's RAM tier is shared memory, and only what it lacks is asked for.

    Args:
        target: `unix:PATH`; or `HOST:PORT` or `dns:///HOST:PORT`, over TLS unless the host is
            this one (`localhost`, 127.0.0.0/8, ::1).
        name: of the table; may be left out where only one is served.
        timeout_s: longest wait for the answer to one request.
        on_unavailable: while the sidecar is gone: `"direct"`, the default on a Unix socket, reads
            the table's file; `"wait"` waits for it to come back, as long as `timeout_s` allows;
            `"fail"`, the default elsewhere, raises. It is reconnected to in any case.
        root_certificates: PEM file of who signs the sidecar's certificate; the system's if None.
        client_certificate, client_key: PEM files that the sidecar asks for.

    Raises:
        UnavailableError: nothing answers at `target`, or not engram.
        UnknownTableError: no table of that name, or several and no name.
        SpecMismatchError: its spec means something else to this version of engram.
        RequestError: the sidecar does not share its memory with this user.
        OverloadError: it has no room for another client.
        ConfigError: a target, file or `on_unavailable` that cannot be used.
    """
    tls = Tls(root_certificates, client_certificate, client_key)
    if on_unavailable not in (None, "direct", "wait", "fail"):
        raise ConfigError(f"on_unavailable is {on_unavailable!r}; use 'direct', 'wait' or 'fail'")
    if target.startswith("unix:"):
        connection = Connection(target, name, tls, timeout_s)
        if connection.table.attach:
            from engram.ram.attached import AttachedTier

            return Table(AttachedTier(connection, on_unavailable or "direct", timeout_s))
        connection.close()
    if on_unavailable == "direct":
        raise ConfigError(
            f"the file of a table at {target} cannot be read from here; "
            "use on_unavailable='wait' or 'fail'"
        )
    waits = on_unavailable == "wait"
    return Table(RemoteTier(target, name, timeout_s=timeout_s, tls=tls, waits=waits))
