"""The connection to a sidecar: made, described, and renewed after it broke."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import grpc

from engram._channel import Tls, absolute_target, open_channel, require_own_grpc
from engram._prefetches import PrefetchStream
from engram._stream import RequestStream
from engram._wire import error_of_call
from engram.errors import SpecMismatchError, UnavailableError, UnknownTableError
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramStub


class Connection:
    """A channel, what the sidecar said about the table and, once opened, a stream for requests."""

    stream: RequestStream

    def __init__(self, target: str, name: str | None, tls: Tls, timeout_s: float) -> None:
        self.target = target = absolute_target(target)
        self.timeout_s = timeout_s
        self.owner = require_own_grpc()
        self.channel = open_channel(target, tls)
        self.stub: Any = EngramStub(self.channel)  # type: ignore[no-untyped-call]
        self.prefetches = PrefetchStream(self.stub, target)
        try:
            self.table = self._describe(name)
        except BaseException:
            self.channel.close()
            raise

    def open(self, method: str, ended: Callable[[], None] | None = None) -> Connection:
        """Open the stream; its end ends the connection. Returns itself.

        Args:
            method: of the stub.
            ended: called at the end.
        """

        def over() -> None:
            self.channel.close()
            if ended is not None:
                ended()

        try:
            call = getattr(self.stub, method)
            self.stream = RequestStream(call, self.target, self.timeout_s, over)
        except BaseException:
            self.channel.close()
            raise
        return self

    def _describe(self, name: str | None) -> pb.GetTableResponse:
        try:
            if name is None:
                name = self._only_table()
            described: pb.GetTableResponse = self.stub.GetTable(
                pb.GetTableRequest(name=name), timeout=self.timeout_s
            )
        except grpc.RpcError as error:
            raise error_of_call(error, self.target) from None
        return described

    def _only_table(self) -> str:
        listed = self.stub.ListTables(pb.ListTablesRequest(), timeout=self.timeout_s)
        names: list[str] = [table.name for table in listed.tables]
        if len(names) != 1:
            raise UnknownTableError(
                f"the sidecar at {self.target} serves {len(names)} tables; "
                f"name one of: {', '.join(names)}"
            )
        return names[0]

    def close(self) -> None:
        # A forked child has none of gRPC's threads; closing there could wait for ever.
        if self.owner == os.getpid():
            self.prefetches.close()
            if hasattr(self, "stream"):
                self.stream.close()
            else:
                self.channel.close()


class Link:
    """The connection in use, renewed after it broke; what outlives a lost sidecar."""

    def __init__(self, connection: Connection, tls: Tls) -> None:
        self.now = connection
        self.reconnects = 0
        self._tls = tls
        self._lock = threading.Lock()
        self._attempts = 0
        self._failure = ""
        self._closed = False

    def connection(self) -> Connection:
        """A usable connection to the same table.

        Raises:
            UnavailableError: there is none, or this process is a fork of the one that connected.
            SpecMismatchError: the sidecar now serves another table under the name.
        """
        # Before the lock: a thread that the child does not have may hold it.
        require_own_grpc()
        seen = self._attempts
        with self._lock:
            self.require_open()
            if self.now.stream.usable:
                return self.now
            if self._attempts > seen:
                # Another thread just waited in vain; waiting once more each would add up.
                raise UnavailableError(self._failure)
            return self._renew()

    def _renew(self) -> Connection:
        before = self.now
        try:
            fresh = Connection(before.target, before.table.name, self._tls, before.timeout_s)
            fresh.open("Lookup")
        except UnavailableError as error:
            self._attempts += 1
            self._failure = str(error)
            raise
        if fresh.table.fingerprint != before.table.fingerprint:
            fresh.close()
            raise SpecMismatchError(
                f"{before.table.name} at {before.target} is now another table (fingerprint "
                f"{fresh.table.fingerprint}, was {before.table.fingerprint}); connect again",
                "fingerprint",
            )
        self.now = fresh
        self.reconnects += 1
        if self._closed:  # by another thread, which closed the one before
            fresh.close()
            self.require_open()
        return fresh

    def require_open(self) -> None:
        """Refuse to go on after `close`.

        Raises:
            UnavailableError: it was closed.
        """
        if self._closed:
            raise UnavailableError("the table is closed; connect again")

    def close(self) -> None:
        """End it for good; safe to call twice."""
        self._closed = True
        self.now.close()
