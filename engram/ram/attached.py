"""The RAM tier of a sidecar on this host: hits read here, misses fetched."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from engram._channel import require_own_grpc
from engram._counters import Counters
from engram._described import items_per_request, row_format_of, spec_of
from engram._failures import Failures
from engram._link import Connection
from engram._prefetches import RemotePrefetch
from engram._stream import StreamLostError
from engram.errors import RowIntegrityError, SpecMismatchError, UnavailableError
from engram.ram import _fill
from engram.ram.attachment import Attachment, attach
from engram.ram.bundle_tier import BundleTier, Deliver, InPlace
from engram.ram.direct import fetch_directly
from engram.ram.epochs import Epochs
from engram.ram.layout import BundleLayout
from engram.remote import RemoteTier
from engram.rows import Rows
from engram.store.reader import StoreReader
from engram.tiers import Int64s, Ngrams, Selection

ON_UNAVAILABLE = ("direct", "wait", "fail")

_Answer = TypeVar("_Answer")


class AttachedTier(BundleTier):
    """Reads a sidecar's RAM tier in shared memory. See `engram.connect`.

    A sidecar that goes away takes nothing along: hits go on, and what is missed is served as
    `on_unavailable` says, until the next sidecar on the same socket is attached to.

    Args:
        connection: to a Unix socket, without stream; becomes the tier's own.
        on_unavailable: one of `ON_UNAVAILABLE`.
        timeout_s: longest wait of one lookup for the sidecar.

    Raises: as `engram.connect`.
    """

    served = True

    def __init__(self, connection: Connection, on_unavailable: str, timeout_s: float) -> None:
        super().__init__()
        table = connection.table
        try:
            self.name, self.fingerprint = table.name, table.fingerprint
            self.spec = spec_of(table)
            self.row_format = row_format_of(table, self.spec)
        except BaseException:
            connection.close()
            raise
        self.bundle = BundleLayout.of(self.spec, self.row_format)
        self._on_unavailable = on_unavailable
        self._timeout_s = timeout_s
        self._attachments = attach(connection, self.bundle, self.spec.min_order)
        self._held = threading.local()
        self._row_lock = threading.Lock()
        self._row_tier: RemoteTier | None = None
        self._closed = False
        self._asked = Counters(
            "fetches", "read_directly", "waits", "prefetches", "prefetches_dropped"
        )
        self._finalizer = weakref.finalize(self, self._attachments.close)

    def _view(self) -> Int64s:
        attachment = self._attachment()
        # Before anything else: refuses a fork, where what follows may not be as it was.
        attachment.lease.view  # noqa: B018
        if self._closed:
            raise UnavailableError("the table is closed; connect again")
        if (other := self._attachments.other_table) is not None:
            raise SpecMismatchError(str(other), other.field)
        return attachment.view

    def in_place(self) -> InPlace:
        self._view()
        return self._attachment().in_place

    def _attachment(self) -> Attachment:
        """What is in use; while this thread holds an epoch, what it was then."""
        held: Attachment | None = getattr(self._held, "attachment", None)
        return held or self._attachments.now

    def _epochs(self) -> Epochs:
        return self._attachment().epochs

    @contextmanager
    def holding(self) -> Iterator[None]:
        """As `BundleTier.holding`.

        Raises:
            UnavailableError: at its end, if slots may have changed after all, because a sidecar
                that may be alive has ended the lease; drop what was read in place.
        """
        before = getattr(self._held, "attachment", None)
        attachment = self._held.attachment = before or self._attachments.now
        try:
            with super().holding():
                yield
                attachment.lease.require_protection()
        finally:
            self._held.attachment = before

    def fetch(self, ngrams: Ngrams, selection: Selection, deliver: Deliver) -> Failures:
        def ask(attachment: Attachment, left_s: float) -> Failures:
            failures = attachment.fetch(ngrams, deliver, left_s)
            self._asked.add(fetches=1)
            return failures

        def directly(reader: StoreReader) -> Failures:
            return fetch_directly(reader, self.spec, self.bundle, ngrams, selection, deliver)

        return self._served(ask, directly)

    def read_rows(self, layer: int, row_ids: Int64s, out: Rows, places: Int64s) -> None:
        self._view()

        def ask(attachment: Attachment, left_s: float) -> None:
            attachment.require_answers()
            try:
                self._rows(attachment).read_rows(layer, row_ids, out, places, left_s)
            except StreamLostError:
                raise
            except UnavailableError:
                attachment.doubt(self._any_ngram())
                raise

        def directly(reader: StoreReader) -> None:
            layers = np.full(len(row_ids), layer, np.int32)
            try:
                reader.gather(layers, row_ids, places, out)
            except RowIntegrityError as error:
                raise RowIntegrityError.of(
                    dict(error.failures), self.name, error.cause, served=True
                ) from None

        self._served(ask, directly)

    def _served(
        self,
        ask: Callable[[Attachment, float], _Answer],
        directly: Callable[[StoreReader], _Answer],
    ) -> _Answer:
        """Ask the sidecar or, if it is not there, do as `on_unavailable` says."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            attachment = self._attachments.now
            try:
                return ask(attachment, deadline - time.monotonic())
            except UnavailableError as error:
                if not attachment.usable:
                    self._attachments.lost()
                if self._on_unavailable == "fail":
                    raise
                # Kept whole it would keep this frame, and with it a table's open file.
                lost = str(error)
            if self._on_unavailable == "wait":
                self._asked.add(waits=1)
                self._attachments.wait(deadline, lost)
                continue
            try:
                reader = attachment.lease.direct()
            except UnavailableError:
                # Closed, if another has taken its place; else there is no file.
                if attachment is self._attachments.now:
                    raise UnavailableError(lost) from None
                continue
            self._asked.add(read_directly=1)
            return directly(reader)

    def _any_ngram(self) -> Ngrams:
        order = self.spec.min_order
        windows = np.full((1, self.spec.max_order), -1, np.int32)
        windows[:, :order] = 0
        return Ngrams(windows, np.array([order], np.int32))

    def _rows(self, attachment: Attachment) -> RemoteTier:
        """What serves single rows, connected when first needed."""
        if self._row_tier is not None:
            return self._row_tier
        # Several threads may get here, and none should wait for another's connection.
        target = attachment.connection.target
        tier = RemoteTier(target, self.name, timeout_s=self._timeout_s)
        if tier.fingerprint != self.fingerprint:
            tier.close()
            raise SpecMismatchError(
                f"{self.name} at {target} is now another table (fingerprint "
                f"{tier.fingerprint}, was {self.fingerprint}); connect again",
                "fingerprint",
            )
        with self._row_lock:
            kept = self._row_tier = self._row_tier or tier
        if kept is not tier or self._closed:  # `close` may have looked before there was one
            tier.close()
        return kept

    def prefetch(self, ngrams: Ngrams) -> RemotePrefetch:
        view = self._view()
        require_own_grpc()
        # A hint may be wrong, so this need not be as careful as a lookup.
        present = np.empty(len(ngrams), np.bool_)
        _fill.find_present(view, ngrams.windows, ngrams.orders, present)
        wanted = ngrams.take(np.flatnonzero(~present))
        attachment = self._attachments.now
        if not attachment.usable:
            self._attachments.lost()
            self._asked.add(prefetches_dropped=1)
            return RemotePrefetch()
        table = attachment.connection.table
        rows_each = len(self.spec.layers) * self.spec.heads
        step = items_per_request(table.limits, rows_each, 1 + 4 * self.spec.max_order)
        parts = (wanted.take(slice(at, at + step)) for at in range(0, len(wanted), step))
        return attachment.connection.prefetches.send(table, parts, self._asked)

    def stats(self) -> dict[str, Any]:
        return {"tier": "attached", **self._attachments.stats(), **self._asked.read()}

    def check_integrity(self) -> None:
        self._asked.check_integrity()

    def close(self) -> None:
        self._closed = True
        self._finalizer()
        if self._row_tier is not None:
            self._row_tier.close()
