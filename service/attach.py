"""Attach sockets: hand shared memory to clients, and hold their leases.

A lease is an open connection. One thread waits for new connections and for the end of leases. A
new connection gets a thread of its own until its lease holds, a few seconds at most, so that one
client's silence delays nobody. Leases, and connections on their way to one, are bounded together.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from engram.errors import ConfigError, EngramError, OverloadError, RequestError, UnavailableError
from engram.ram.frames import Deadline, attach_path
from engram.ram.tier import RamTier
from engram.service._handshake import (
    HANDSHAKE_S,
    Handshake,
    OpenFiles,
    ServedLease,
    confirm,
    peer_of,
    refuse,
)
from engram.service._traffic import Traffic
from engram.service.sockets import socket_mode

LEASES_MAX = 64
_BACKLOG = 1024
_EXHAUSTED_S = 0.1
COUNTS = ("attached", "refused", "ended_closed", "ended_protocol", "ended_stopped")

_log = logging.getLogger("engram.service")


class AttachServer:
    """Serves the attach sockets that belong to gRPC sockets.

    Args:
        paths: of the gRPC sockets, which must be claimed.
        tiers: by the name under which each is served; their caches share memory.
        files: opens the files of tables that clients may read directly, by name.
        uids: users that may attach, besides this process's own and root.
        leases_max: clients attached at once.
        traffic: where refusals are counted; made when None.

    Raises:
        ConfigError: a socket cannot be had.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        tiers: Mapping[str, RamTier],
        files: Mapping[str, OpenFiles],
        *,
        uids: Collection[int] = (),
        leases_max: int = LEASES_MAX,
        traffic: Traffic | None = None,
    ) -> None:
        self._traffic = traffic or Traffic(tiers)
        self._uids = {os.geteuid(), 0, *uids}
        self._leases_max = leases_max
        self._handshake = Handshake(tiers, files)
        self._lock = threading.Lock()
        self._places = leases_max
        self._tokens: dict[bytes, ServedLease] = {}
        self._held: dict[int, tuple[socket.socket, ServedLease]] = {}
        self._leases = 0
        self._handshakes: dict[threading.Thread, socket.socket] = {}
        self._counts: Counter[str] = Counter()
        self._draining = self._stopped = self._exhausted = False
        self._listeners: dict[int, socket.socket] = {}
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.EPOLLIN)
        try:
            for path in paths:
                self._listen(attach_path(path))
        except BaseException:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._serve, name="engram-attach", daemon=True)

    def start(self) -> None:
        """Accept clients."""
        self._thread.start()

    def lease(self, token: bytes) -> ServedLease | None:
        """The lease whose token this is; None if there is none any more."""
        return self._tokens.get(token)

    @property
    def leases_max(self) -> int:
        """Clients that may be attached at once."""
        return self._leases_max

    def stats(self) -> dict[str, int]:
        """`leases` now, those that end included until nothing is spared for them any more; since
        the start `attached`, `refused`, and leases that ended, by reason:
        `ended_closed` by the client or its death, `ended_protocol` because it said something,
        `ended_stopped` with the server."""
        with self._lock:
            return {"leases": self._leases, **{name: self._counts[name] for name in COUNTS}}

    def memory_stats(self) -> dict[str, int]:
        """Bytes of shared memory of all clients together, by purpose."""
        with self._lock:
            leases = [lease for _, lease in self._held.values()]
        return {
            "staging": sum(lease.staging.size for lease in leases),
            "reader": sum(lease.reader.size for lease in leases),
            "manifest": self._handshake.manifest_bytes,
        }

    @property
    def serving(self) -> bool:
        """Whether connections are being looked after, or there is no socket for any."""
        return self._thread.is_alive() or not self._listeners

    def drain(self) -> None:
        """Refuse new clients; those attached stay."""
        self._draining = True

    def stop(self) -> None:
        """End all leases and free the sockets. Safe to call twice."""
        with self._lock:
            if self._stopped:
                return
            self._draining = self._stopped = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            handshakes = dict(self._handshakes)
        for thread, connection in handshakes.items():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
        for descriptor in list(self._held):
            self._end(descriptor, "ended_stopped")
        self._close_sockets()

    def _listen(self, path: Path) -> None:
        listener = _listener(path)
        self._listeners[listener.fileno()] = listener
        self._poll.register(listener, select.EPOLLIN)

    def _close_sockets(self) -> None:
        self._poll.close()
        os.close(self._wake)
        for listener in self._listeners.values():
            Path(listener.getsockname()).unlink(missing_ok=True)
            listener.close()

    def _serve(self) -> None:
        while not self._stopped:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._listeners:
                    self._accept(self._listeners[descriptor])
                elif descriptor != self._wake:
                    self._end(descriptor, self._why_ended(descriptor))

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # No descriptor is free. Whoever waits in the queue is served once one is.
            if not self._exhausted:
                _log.error("clients cannot attach now: %s", error.strerror)
            self._exhausted = True
            time.sleep(_EXHAUSTED_S)
            return
        self._exhausted = False
        refusal = self._refusal(connection)
        if refusal is not None:
            self._refuse(connection, refusal)
            return
        thread = threading.Thread(
            target=self._attach, args=(connection,), name="engram-handshake", daemon=True
        )
        with self._lock:
            self._handshakes[thread] = connection
        try:
            thread.start()
        except RuntimeError:
            no_thread = OverloadError("the sidecar has no thread left; try again later")
            self._refuse(connection, no_thread)
            del self._handshakes[thread]

    def _refuse(self, connection: socket.socket, error: Exception) -> None:
        refuse(connection, self._traffic.packed(error, "attaching a client"))
        self._leave(connection, refused=True)

    def _refusal(self, connection: socket.socket) -> EngramError | None:
        """Why `connection` is turned away at once; a place is taken for it otherwise, too."""
        with self._lock:
            self._places -= 1
        _, uid = peer_of(connection)
        if uid not in self._uids:
            return RequestError(
                f"user {uid} may not attach, only {', '.join(map(str, sorted(self._uids)))}; run "
                "the client as one of these, or let the sidecar allow this one"
            )
        if self._draining:
            return UnavailableError("the sidecar is shutting down; attach again later")
        if self._places < 0:
            return OverloadError(
                f"{self._leases_max} clients are attached already; "
                "stop one or raise the sidecar's limits.leases"
            )
        return None

    def _attach(self, connection: socket.socket) -> None:
        """A new connection's own thread: leaves it as a lease, or closes it."""
        deadline = Deadline(HANDSHAKE_S)
        try:
            lease = self._handshake.agree(connection, deadline)
            self._hold(connection, lease)
        except Exception as error:
            self._refuse(connection, error)
        else:
            self._confirm(connection, deadline)
        finally:
            with self._lock:
                del self._handshakes[threading.current_thread()]

    def _hold(self, connection: socket.socket, lease: ServedLease) -> None:
        lease.tier.cache.add_reader(lease.tier.number, lease.reader)
        _log.debug("process %d of user %d attached to %s", lease.pid, lease.uid, lease.table)
        with self._lock:
            self._tokens[lease.token] = lease
            self._held[connection.fileno()] = (connection, lease)
            self._leases += 1
            self._counts["attached"] += 1

    def _confirm(self, connection: socket.socket, deadline: Deadline) -> None:
        descriptor = connection.fileno()
        try:
            confirm(connection, deadline)
        except UnavailableError:
            return self._end(descriptor, "ended_closed")
        # Whatever happens on it from now on is its end.
        self._poll.register(descriptor, select.EPOLLIN | select.EPOLLRDHUP)

    def _why_ended(self, descriptor: int) -> str:
        connection, _ = self._held[descriptor]
        try:
            said = connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            said = b""
        return "ended_protocol" if said else "ended_closed"

    def _end(self, descriptor: int, reason: str) -> None:
        with self._lock:
            connection, lease = self._held.pop(descriptor)
            del self._tokens[lease.token]
            self._counts[reason] += 1
        lease.closed = True
        # Before its slots are reused, so that a client that is not cut off knows they are whole.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        lease.tier.cache.remove_reader(lease.reader)
        with self._lock:
            self._leases -= 1
        self._leave(connection)

    def _leave(self, connection: socket.socket, *, refused: bool = False) -> None:
        # First, so that who sees the end of a lease may count on its place.
        with self._lock:
            self._places += 1
            self._counts["refused"] += refused
        connection.close()


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Only a dead server can have left it there: the path is claimed.
        path.unlink(missing_ok=True)
        with socket_mode():
            listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {path}: {error.strerror or error}; listen elsewhere"
        ) from None
    listener.setblocking(False)
    return listener
