"""A client's lease on a sidecar's RAM tier: shared memory, got over the attach socket.

The open connection is the lease. It ends when either process dies, and never by a timer. The
memory outlives it: hits, and direct reads of the table's file, go on without the sidecar.

A forked child has the memory but no lease. Its copy of the connection is closed at once, so that
the parent's lease ends with the parent, and everything that needs the lease raises there.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from engram.errors import SpecMismatchError, UnavailableError
from engram.ram._handshake import Conversation, connect, peer_of
from engram.ram._terms import Offered, Terms, Wanted
from engram.ram.frames import Deadline, attach_path
from engram.ram.layout import WORD_SLABS, BundleLayout, pack_view
from engram.ram.memory import Memory
from engram.store.reader import StoreReader
from engram.tiers import Int64s

_SLAB_POLL_S = 0.05
_DYING_MS = 100
"""A process closes its connections a moment before it counts as gone."""

_connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_forks = [0]
"""How often this process, or one it comes from, was forked off."""


def _close_in_child() -> None:
    _forks[0] += 1
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)


class Lease:
    """Memory of a sidecar, and the right to have misses written into some of it.

    Addresses in `view` are valid as long as this object lives, also after `close`.

    Attributes:
        boot_id: of the sidecar, hexadecimal.
        token: 16 bytes that every Fetch carries.
        layout: of the arena.
        bundle: of the table.
        table_number, seed: of the table in the arena.
        directory, slabs, staging: mapped read-only.
        reader: counters, epoch and hits of this process, writable.
        chunks, entries_per_chunk: what `staging` is made of, in entries of `bundle.staged_bytes`.
        ended: set when the sidecar is gone or the lease is closed.
    """

    def __init__(
        self,
        connection: socket.socket,
        wanted: Wanted,
        terms: Terms,
        offered: Offered,
        slabs: Sequence[Memory],
        reader: Memory,
    ) -> None:
        self.boot_id, self.token = terms.boot_id, terms.token
        self.layout, self.bundle = terms.arena, wanted.bundle
        self.table_number, self.seed = terms.table_number, terms.seed
        self.chunks, self.entries_per_chunk = terms.chunks, terms.entries_per_chunk
        self.directory, self.staging = offered.directory, offered.staging
        self.slabs, self.reader = tuple(slabs), reader
        self._wanted = wanted
        self._slab_addresses = np.array([slab.address for slab in slabs] or [0], np.int64)
        self._view = pack_view(
            self.layout,
            self.bundle,
            wanted.min_order,
            directory=self.directory.address,
            seed=self.seed,
            table=self.table_number,
            slabs=self._slab_addresses.ctypes.data,
            reader=reader.address,
        )
        self._offered = offered
        self._direct: StoreReader | None = None
        self._direct_lock = threading.Lock()
        self._forks = _forks[0]
        self._connection = connection
        self._sidecar = peer_of(connection)
        self.ended = threading.Event()
        weakref.finalize(self, _hang_up, connection)
        self._watcher = _in_background("engram-lease", _watch, connection, self.ended)
        _in_background(
            "engram-populate", _populate, self.directory, self.staging, self.slabs, self.ended
        )

    @classmethod
    def open(
        cls,
        path: Path,
        table: str,
        fingerprint: str,
        bundle: BundleLayout,
        min_order: int,
        timeout_s: float,
    ) -> Lease:
        """Attach to a table.

        Args:
            path: the sidecar's gRPC socket; the attach socket is beside it.
            table, fingerprint: which table, and what it must hold.
            bundle, min_order: of the client's own spec.

        Raises:
            UnavailableError: no sidecar answers in time, or this process is at a limit.
            UnknownTableError: it serves no such table.
            SpecMismatchError: it serves another table under the name.
            RequestError: it refuses this user, or this version of engram.
            OverloadError: it has no room for another client.
            ServiceError: what it offers does not fit the spec, or cannot be mapped.
        """
        wanted = Wanted(table, fingerprint, bundle, min_order)
        place, deadline = attach_path(path), Deadline(timeout_s)
        connection = offered = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _connections.add(connection)
            connect(connection, place, deadline)
            with Conversation(connection, deadline) as talk:
                terms, offered = talk.ask(wanted)
                slabs = talk.slabs(terms)
                reader = talk.give_reader(terms)
            return cls(connection, wanted, terms, offered, slabs, reader)
        except BaseException as error:
            if connection is not None:
                _hang_up(connection)
                connection.close()
            if offered is not None:
                offered.close_data()
            if type(error) is UnavailableError:
                raise UnavailableError(f"{place}: {error}") from None
            if isinstance(error, OSError | RuntimeError):
                raise UnavailableError(
                    f"{place}: this process has no descriptor or thread left ({error}); "
                    "raise its limits, or have it keep fewer"
                ) from None
            raise

    @property
    def alive(self) -> bool:
        """Whether the sidecar that gave it still runs and this process still holds it."""
        return not self.ended.is_set() and self._forks == _forks[0]

    @property
    def view(self) -> Int64s:
        """The `View` of the table's part of the arena, as an array for kernels.

        Raises:
            UnavailableError: this process is a fork of the one that attached.
        """
        self._require_own()
        return self._view

    def direct(self) -> StoreReader:
        """The table's own file; it stays open and readable when the sidecar is gone.

        Raises:
            UnavailableError: the sidecar's table has no file, the lease is closed, or this process
                is a fork of the one that attached.
            StoreError: the file cannot be read.
        """
        self._require_own()
        with self._direct_lock:
            if self._direct is None:
                self._direct = self._open_direct()
            return self._direct

    def _open_direct(self) -> StoreReader:
        files = self._offered.files()
        if files is None:
            raise UnavailableError(
                f"the sidecar keeps {self._wanted.table} in no file that could be read directly, "
                "or the lease is closed; connect again"
            )
        reader = StoreReader(self._wanted.table, guard=False, files=files)
        if reader.manifest.fingerprint != self._wanted.fingerprint:
            reader.close()
            raise SpecMismatchError(
                f"the sidecar serves {self._wanted.table} with the file of another table "
                f"(fingerprint {reader.manifest.fingerprint}, needed is "
                f"{self._wanted.fingerprint}); restart it",
                "fingerprint",
            )
        return reader

    def _require_own(self) -> None:
        if self._forks != _forks[0]:
            raise UnavailableError(
                "a lease does not survive a fork: start this process with the 'spawn' or "
                "'forkserver' method, or call engram.connect only after forking"
            )

    def require_protection(self) -> None:
        """Make sure that slots found while holding an epoch have kept their bytes until now.

        The sidecar hangs up before it forgets a reader, and a dead one's memory nobody writes.

        Raises:
            UnavailableError: the lease ended, and its sidecar may be alive.
        """
        self._require_own()
        if not (self._connected() or _is_gone(self._sidecar)):
            raise UnavailableError(
                "the lease ended while its slots were read in place, so they may have changed; "
                "drop what was read, and look it up again"
            )

    def _connected(self) -> bool:
        try:
            return not self.ended.is_set() and bool(
                self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            )
        except OSError as error:
            return isinstance(error, BlockingIOError)

    def end(self) -> None:
        """End the lease, but keep memory and files; safe to call twice."""
        if self._forks == _forks[0]:
            _hang_up(self._connection)

    def close(self) -> None:
        """End the lease; the memory goes with the object. Safe to call twice."""
        if self._forks != _forks[0]:
            return
        _hang_up(self._connection)
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        with self._direct_lock:
            self._direct = None
            self._offered.close_data()


def _watch(connection: socket.socket, ended: threading.Event) -> None:
    # Nothing is ever said on a lease, so whatever comes is its end.
    with suppress(OSError):
        connection.settimeout(None)
        connection.recv(1)
    ended.set()
    connection.close()


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _is_gone(pid: int) -> bool:
    """Whether no such process runs; when in doubt, not."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    try:
        dying = select.poll()
        dying.register(descriptor, select.POLLIN)
        return bool(dying.poll(_DYING_MS))
    finally:
        os.close(descriptor)


def _populate(
    directory: Memory, staging: Memory, slabs: Sequence[Memory], ended: threading.Event
) -> None:
    """Map everything, so that no lookup has to; each slab once the sidecar took its memory."""
    directory.populate()
    staging.populate()
    words = directory.words(WORD_SLABS + 1)
    for number, slab in enumerate(slabs):
        while words[WORD_SLABS] <= number:
            if ended.wait(_SLAB_POLL_S):
                return
        if ended.is_set():
            return
        slab.populate()


def _in_background(name: str, work: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread
