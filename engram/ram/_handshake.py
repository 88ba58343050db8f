"""A client's side of the conversation on the attach socket, until the lease holds."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path

from engram._wire import error_of
from engram.errors import ServiceError, UnavailableError
from engram.proto.v1 import attach_pb2 as pb
from engram.ram._terms import Offered, Terms, Wanted, map_offered
from engram.ram.frames import Deadline, Descriptors, receive_frame, send_frame
from engram.ram.layout import ABI
from engram.ram.memory import SEALS_OF_READER, Memory


def connect(connection: socket.socket, place: Path, deadline: Deadline) -> None:
    """Connect to the attach socket at `place`.

    Raises:
        UnavailableError: nobody listens there, this process may not, or not in time.
    """
    while True:
        deadline.apply(connection)
        try:
            return connection.connect(str(place))
        except BlockingIOError:
            # Its queue of connections is full, which passes.
            deadline.wait()
        except OSError as error:
            raise UnavailableError(
                f"nothing answers there ({error.strerror or error}); is 'engram serve' running?"
            ) from None


def peer_of(connection: socket.socket) -> int:
    """The pid of the sidecar; 0 if it is of another pid namespace."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", packed)[0])


class Conversation:
    """Its steps, in order; closes descriptors that were not used when done.

    Each raises UnavailableError when there is no answer in time, ServiceError when what comes
    does not fit, and the error behind a refusal.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._deadline = deadline
        self._descriptors = Descriptors()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *unused: object) -> None:
        self._descriptors.close()

    def ask(self, wanted: Wanted) -> tuple[Terms, Offered]:
        """Name the table; get its terms, directory, staging memory and files."""
        request = pb.AttachRequest(abi=ABI, table=wanted.table, fingerprint=wanted.fingerprint)
        # Who has no room refuses without listening, and its refusal can still be read.
        with suppress(UnavailableError):
            send_frame(self._connection, pb.FromClient(request=request), self._deadline)
        terms = Terms.of(self._receive("offer").offer, wanted)
        return terms, Offered.of(terms, wanted, self._descriptors)

    def slabs(self, terms: Terms) -> list[Memory]:
        """Get all slabs."""
        arena, mapped = terms.arena, list[Memory]()
        while len(mapped) < arena.slabs:
            self._receive("slabs")
            if not len(self._descriptors):
                raise ServiceError("the sidecar sent no slabs; use versions of engram that match")
            while len(self._descriptors) and len(mapped) < arena.slabs:
                mapped.append(map_offered(self._descriptors, arena.slab_bytes(len(mapped))))
        return mapped

    def give_reader(self, terms: Terms) -> Memory:
        """Make this client's own memory, and share it; the lease holds from here on."""
        reader = Memory.shared("engram-reader", terms.arena.reader_bytes, SEALS_OF_READER)
        said = pb.FromClient(reader=pb.Reader())
        send_frame(self._connection, said, self._deadline, [reader.descriptor])
        reader.close_descriptor()
        self._receive("attached")
        return reader

    def _receive(self, kind: str) -> pb.FromServer:
        said = receive_frame(self._connection, pb.FromServer, self._deadline, self._descriptors)
        found = said.WhichOneof("says")
        if found == "refusal":
            raise error_of(said.refusal.code, said.refusal.message)
        if found != kind:
            raise ServiceError(
                f"the sidecar said {found} on the attach socket instead of {kind}; "
                "use versions of engram that match"
            )
        return said
