"""A client's attachment to a sidecar, and its renewal after the sidecar went away.

An attachment is a lease, the connection beside it and the staging memory that both share. It ends
as a whole. Its memory goes on serving hits until the next attachment is there: a thread of its
own tries for one, a few times a second, until it succeeds or the table is closed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engram._channel import Tls
from engram._failures import Failures
from engram._link import Connection
from engram._stream import StreamLostError
from engram.errors import EngramError, ServiceError, SpecMismatchError, UnavailableError
from engram.ram.attach import Lease
from engram.ram.bundle_tier import Deliver, InPlace
from engram.ram.epochs import Epochs
from engram.ram.fetch import Fetcher
from engram.ram.layout import WORD_SLABS, BundleLayout
from engram.ram.reader_counts import read_counts
from engram.tiers import Int64s, Ngrams

RETRY_S = 0.1
_ATTACH_TIMEOUT_S = 5.0


class Attachment:
    """A lease, and a connection with a Fetch stream to the same sidecar.

    Args:
        lease, connection: become the attachment's own.
        ended: called when the connection ends.

    Attributes:
        view: as `Lease.view`; keeps the lease's memory alive.
        epochs: of this reader.
        in_place: for a device that reads the arena.
        counted: counts of all attachments before.

    Raises:
        ServiceError: the sidecar refuses the stream, or was restarted since the lease began.
    """

    def __init__(self, lease: Lease, connection: Connection, ended: Callable[[], None]) -> None:
        self.lease = lease
        self.connection = connection
        self.epochs = Epochs(lease.reader, lease.directory)
        try:
            connection.open("Fetch", ended)
            if connection.table.boot_id != lease.boot_id:
                raise UnavailableError(f"{connection.target} was restarted just now; connect again")
        except BaseException:
            self.close()
            raise
        self.view: Int64s = np.asarray(_Kept(lease))
        self.counted: dict[str, int] = {}
        words = lease.directory.words(WORD_SLABS + 1)
        self.in_place = InPlace(
            self.view,
            lease.slabs,
            self.epochs,
            lambda: int(words[WORD_SLABS]),
            lease.require_protection,
        )
        self._fetcher = Fetcher(lease, connection.stream)

    @property
    def usable(self) -> bool:
        """Whether the sidecar that it belongs to is there."""
        return self.lease.alive and self.connection.stream.usable

    @property
    def stalled(self) -> bool:
        """Whether that sidecar has stopped answering."""
        return self._fetcher.stalled

    def fetch(self, ngrams: Ngrams, deliver: Deliver, timeout_s: float) -> Failures:
        """As `Fetcher.fetch`; without waiting if the sidecar does not answer others."""
        self.require_answers()
        try:
            return self._fetcher.fetch(ngrams, deliver, timeout_s)
        except UnavailableError:
            if not self.stalled:
                self.end()
            raise

    def require_answers(self) -> None:
        """Ask no further where nobody would answer.

        Raises:
            UnavailableError: the sidecar is gone, or has stopped answering.
        """
        if not self.usable:
            raise StreamLostError(f"the sidecar at {self.connection.target} is gone; restart it")
        if self.stalled:
            raise UnavailableError(
                f"the sidecar at {self.connection.target} has stopped answering; is it stopped?"
            )

    def doubt(self, ngrams: Ngrams) -> None:
        """Ask for `ngrams` without waiting, so that `stalled` holds until the sidecar answers."""
        with suppress(ServiceError):
            self._fetcher.fetch(ngrams, lambda first, addresses: None, 0.0)

    def counts(self) -> dict[str, int]:
        """`engram.ram.reader_counts.read_counts` of this attachment and all before."""
        read = read_counts(self.lease.reader)
        return {name: count + self.counted.get(name, 0) for name, count in read.items()}

    def end(self) -> None:
        """End connection and lease, but keep memory and files; safe to call twice.

        The lease ends once no epoch is held, for only so long the sidecar spares held slots.
        """
        self.connection.close()
        self.epochs.when_free(self.lease.end)

    def close(self) -> None:
        """End everything, the lease as in `end`; memory goes with its last user; idempotent."""
        self.connection.close()
        self.epochs.when_free(self.lease.close)


class _Kept:
    """A lease's view as an array that keeps the lease."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.__array_interface__ = lease.view.__array_interface__


class Attachments:
    """The attachment in use.

    Args:
        lease, connection: of the first.
        min_order: of the spec.

    Attributes:
        other_table: why lookups must fail: the sidecar has another table under the name.
    """

    def __init__(self, lease: Lease, connection: Connection, min_order: int) -> None:
        self._renewals = 0
        self.other_table: SpecMismatchError | None = None
        self._min_order = min_order
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._renewing = False
        self._last_stats: dict[str, Any] = {}
        self._now: Attachment | None = None  # while it is made, its end is not yet its loss
        self._now = Attachment(lease, connection, self.lost)

    @property
    def now(self) -> Attachment:
        """In use; after the sidecar is gone, the last one.

        Raises:
            UnavailableError: it was closed.
        """
        now = self._now
        if now is None:
            raise UnavailableError("the table is closed; connect again")
        return now

    def stats(self) -> dict[str, Any]:
        """Of all attachments; once closed, what they were then."""
        now = self._now
        if now is None:
            return dict(self._last_stats)
        return {
            "target": now.connection.target,
            "boot_id": now.lease.boot_id,
            "attached": int(now.usable),
            "reattached": self._renewals,
            **now.counts(),
        }

    def lost(self) -> None:
        """Begin to renew what is in use, unless it is usable or that has begun already."""
        with self._changed:
            if self._renewing or self._closing.is_set() or self._now is None:
                return
            self._renewing = True
        thread = threading.Thread(target=self._renew, name="engram-reattach", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be started now; the next lookup tries again
            self._renewing = False

    def _renew(self) -> None:
        while not self._renewed():
            try:
                self._replace(self._attach())
            except Exception as error:  # whatever it is, nobody else would try again
                self._refused(error)
                self._closing.wait(RETRY_S)

    def _renewed(self) -> bool:
        with self._changed:
            self._renewing = self._now is not None and not self._now.usable
            return not self._renewing

    def _refused(self, error: Exception) -> None:
        other = isinstance(error, SpecMismatchError)
        self.other_table = SpecMismatchError(str(error), "fingerprint") if other else None

    def _attach(self) -> Attachment:
        before = self.now
        target, table = before.connection.target, before.connection.table
        lease = Lease.open(
            socket_path(target),
            table.name,
            table.fingerprint,
            before.lease.bundle,
            self._min_order,
            _ATTACH_TIMEOUT_S,
        )
        try:
            connection = Connection(target, table.name, Tls(), before.connection.timeout_s)
        except BaseException:
            lease.close()
            raise
        return Attachment(lease, connection, self.lost)

    def _replace(self, fresh: Attachment) -> None:
        with self._changed:
            before = self._now
            if before is not None:
                fresh.counted = before.counts()
                self._now = fresh
                self.other_table = None
                self._renewals += 1
                self._changed.notify_all()
        (before or fresh).close()

    def wait(self, deadline: float, lost: str) -> None:
        """Wait until there is an attachment that answers.

        Args:
            deadline: by `time.monotonic`.
            lost: what an error in the end says.

        Raises:
            UnavailableError: there is none in time.
            SpecMismatchError: the sidecar has another table under the name.
        """
        # At least a moment, so that a sidecar that only refuses is not asked in a busy loop.
        self._closing.wait(min(RETRY_S, max(0.0, deadline - time.monotonic())))
        with self._changed:
            while not self._closing.is_set():
                if self.other_table is not None:
                    raise SpecMismatchError(str(self.other_table), self.other_table.field)
                if self.now.usable and not self.now.stalled:
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(RETRY_S, left))
        raise UnavailableError(lost)

    def close(self) -> None:
        """End the attachment and its renewal; safe to call twice."""
        # A forked child has no lease of its own; gRPC, and locks that another thread may have held
        # at the fork, must not be touched there.
        if self._owner != os.getpid():
            return
        self._closing.set()
        with self._changed:
            self._last_stats = self.stats() | {"attached": 0}
            last, self._now = self._now, None
        if last is not None:
            last.close()


def attach(connection: Connection, bundle: BundleLayout, min_order: int) -> Attachments:
    """Attach to the table of a connection without stream, which is closed if that fails.

    Raises: as `Lease.open` and `Attachment`.
    """
    try:
        table = connection.table
        lease = Lease.open(
            socket_path(connection.target),
            table.name,
            table.fingerprint,
            bundle,
            min_order,
            min(_ATTACH_TIMEOUT_S, connection.timeout_s),
        )
    except BaseException:
        with suppress(EngramError):
            connection.close()
        raise
    return Attachments(lease, connection, min_order)


def socket_path(target: str) -> Path:
    """The socket's path of an absolute `unix:PATH`."""
    return Path(target.removeprefix("unix:"))
