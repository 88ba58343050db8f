"""Frames of the attach socket: a length, a message, and descriptors that ride along.

Whoever sends cannot be trusted to send what it should, so lengths and numbers of descriptors are
bounded before anything is taken in, everything has a deadline, and descriptors that nobody asked
for are closed.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from engram.errors import ServiceError, UnavailableError

ATTACH_SUFFIX = ".attach"
DESCRIPTORS_PER_FRAME = 64
FRAME_BYTES_MAX = 1 << 16
_LENGTH_BYTES = 4
_DESCRIPTOR_BYTES = array("i").itemsize
_RETRY_S = 0.01
_LATE = "no answer on the attach socket in time; is the other side stopped, or overloaded?"
_MATCH = "use versions of engram that match"

_Message = TypeVar("_Message")


def attach_path(path: Path) -> Path:
    """The attach socket that belongs to the gRPC socket at `path`."""
    return path.with_name(path.name + ATTACH_SUFFIX)


class Deadline:
    """A point in time that all steps of a conversation share.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def apply(self, connection: socket.socket) -> None:
        """Let the next call on `connection` take no longer than what is left.

        Raises:
            UnavailableError: nothing is left.
        """
        left = self.left_s
        if not left:
            raise UnavailableError(_LATE)
        connection.settimeout(left)

    def wait(self) -> None:
        """Wait a little before the next try of what only needs patience.

        Raises:
            UnavailableError: no time is left for that.
        """
        if self.left_s < _RETRY_S:
            raise UnavailableError(_LATE)
        time.sleep(_RETRY_S)


class Descriptors:
    """Descriptors that came with a frame; closed when done, unless taken."""

    def __init__(self) -> None:
        self._waiting: list[int] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, arrived: Iterable[int]) -> None:
        self._waiting += arrived

    def take(self) -> int:
        """The next one, which the caller closes from here on."""
        return self._waiting.pop(0)

    def close(self) -> None:
        """Close those that nobody took; safe to call twice."""
        while self._waiting:
            os.close(self._waiting.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def send_frame(
    connection: socket.socket, message: Any, deadline: Deadline, descriptors: Sequence[int] = ()
) -> None:
    """Send a message, and copies of `descriptors`.

    Raises:
        UnavailableError: it cannot be sent in time, or the other side is gone.
    """
    packed: bytes = message.SerializeToString()
    frame = len(packed).to_bytes(_LENGTH_BYTES, "little") + packed
    sent = _in_time(deadline, connection, _send, frame, descriptors)
    while sent < len(frame):
        sent += _in_time(deadline, connection, _send, frame[sent:], ())


def _send(connection: socket.socket, frame: bytes, descriptors: Sequence[int]) -> int:
    if not descriptors:
        return connection.send(frame)
    return socket.send_fds(connection, [frame], list(descriptors))


def receive_frame(
    connection: socket.socket,
    kind: Callable[[], _Message],
    deadline: Deadline,
    descriptors: Descriptors,
) -> _Message:
    """Receive a message of `kind`; what rode along is added to `descriptors`.

    Raises:
        UnavailableError: it did not come in time, or the other side is gone.
        ServiceError: it is too long, malformed, or came with too many descriptors.
    """
    header = _receive(connection, _LENGTH_BYTES, deadline, descriptors)
    length = int.from_bytes(header, "little")
    if length > FRAME_BYTES_MAX:
        raise ServiceError(
            f"a frame of {length} bytes came on the attach socket, at most {FRAME_BYTES_MAX} are "
            f"read; {_MATCH}"
        )
    packed = _receive(connection, length, deadline, descriptors)
    message: Any = kind()
    try:
        message.ParseFromString(packed)
    except DecodeError:
        raise ServiceError(f"a malformed frame came on the attach socket; {_MATCH}") from None
    return message  # type: ignore[no-any-return]


def _receive(
    connection: socket.socket, count: int, deadline: Deadline, descriptors: Descriptors
) -> bytes:
    received = b""
    while len(received) < count:
        wanted = count - len(received)
        piece, arrived, flags = _in_time(deadline, connection, _receive_some, wanted)
        descriptors.add(arrived)
        if flags & socket.MSG_CTRUNC or len(descriptors) > DESCRIPTORS_PER_FRAME:
            raise ServiceError(
                "descriptors were lost on the attach socket: too many came, or this process has "
                "too many files open; raise its limit of open files"
            )
        if not piece:
            raise UnavailableError("the other side closed the attach socket; try again")
        received += piece
    return received


def _receive_some(connection: socket.socket, count: int) -> tuple[bytes, array[int], int]:
    # Not socket.recv_fds, which forgets its flags: programs started meanwhile would inherit.
    room = socket.CMSG_LEN(DESCRIPTORS_PER_FRAME * _DESCRIPTOR_BYTES)
    piece, extra, flags, _ = connection.recvmsg(count, room, socket.MSG_CMSG_CLOEXEC)
    arrived = array("i")
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            arrived.frombytes(data[: len(data) - len(data) % _DESCRIPTOR_BYTES])
    return piece, arrived, flags


def _in_time(
    deadline: Deadline, connection: socket.socket, call: Callable[..., Any], *arguments: Any
) -> Any:
    while True:
        deadline.apply(connection)
        try:
            return call(connection, *arguments)
        except OSError as error:
            # Many descriptors of one user are on their way: some will have arrived soon.
            if error.errno != errno.ETOOMANYREFS:
                raise _lost(error) from None
        deadline.wait()


def _lost(error: OSError) -> UnavailableError:
    if isinstance(error, TimeoutError):
        return UnavailableError(_LATE)
    return UnavailableError(f"the attach socket broke ({error.strerror or error}); try again")
