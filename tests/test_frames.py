"""Frames: whole messages and their descriptors, or an error in time."""

from __future__ import annotations

import errno
import os
import socket
import threading

import pytest
from attach_hosts import descriptors

from engram.errors import ServiceError, UnavailableError
from engram.proto.v1 import attach_pb2 as pb
from engram.ram import frames
from engram.ram.frames import (
    DESCRIPTORS_PER_FRAME,
    FRAME_BYTES_MAX,
    Deadline,
    Descriptors,
    receive_frame,
    send_frame,
)


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    before = descriptors()
    with left, right:
        yield left, right
        assert descriptors() <= before


@pytest.fixture
def deadline():
    return Deadline(20.0)


def _named(table):
    return pb.FromClient(request=pb.AttachRequest(table=table))


def _receive(connection, deadline, arrived):
    return receive_frame(connection, pb.FromClient, deadline, arrived)


def test_frames_keep_their_order_and_their_descriptors(pair, deadline):
    left, right = pair
    files = [os.memfd_create(f"file {number}") for number in range(3)]
    send_frame(left, _named("none"), deadline)
    send_frame(left, _named("two"), deadline, files[:2])
    send_frame(left, _named("one"), deadline, files[2:])
    left.close()
    with Descriptors() as arrived:
        for table, names in (("none", []), ("two", ["file 0", "file 1"]), ("one", ["file 2"])):
            assert _receive(right, deadline, arrived).request.table == table
            found = []
            while len(arrived):
                taken = arrived.take()
                found.append(os.readlink(f"/proc/self/fd/{taken}"))
                assert not os.get_inheritable(taken)
                os.close(taken)
            assert found == [f"/memfd:{name} (deleted)" for name in names]
        with pytest.raises(UnavailableError, match="the other side closed"):
            _receive(right, deadline, arrived)
    for file in files:
        os.close(file)


def test_as_many_descriptors_as_a_frame_may_have(pair, deadline):
    left, right = pair
    send_frame(left, _named("x"), deadline, DESCRIPTORS_PER_FRAME * [0])
    send_frame(left, _named("x"), deadline, (DESCRIPTORS_PER_FRAME + 1) * [0])
    with Descriptors() as arrived:
        _receive(right, deadline, arrived)
        assert len(arrived) == DESCRIPTORS_PER_FRAME
    with Descriptors() as arrived, pytest.raises(ServiceError, match="descriptors were lost"):
        _receive(right, deadline, arrived)


@pytest.mark.parametrize("buffer", [4096, 1 << 18])
def test_a_long_frame_comes_in_pieces_with_its_descriptors(pair, deadline, buffer):
    left, right = pair
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    table = "x" * (FRAME_BYTES_MAX - 20)
    sending = threading.Thread(target=send_frame, args=(left, _named(table), deadline, [0, 1]))
    sending.start()
    with Descriptors() as arrived:
        assert _receive(right, deadline, arrived).request.table == table
        assert len(arrived) == 2
    sending.join()


def test_a_frame_that_is_too_long_is_refused_by_its_receiver(pair, deadline):
    left, right = pair
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    send_frame(left, _named("x" * FRAME_BYTES_MAX), deadline)
    with pytest.raises(ServiceError, match=rf"\d+ bytes came .*, at most {FRAME_BYTES_MAX} are"):
        _receive(right, deadline, Descriptors())


def test_nobody_waits_beyond_the_deadline(pair):
    left, right = pair
    with pytest.raises(UnavailableError, match="in time"):
        _receive(right, Deadline(0.05), Descriptors())
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with pytest.raises(UnavailableError, match="in time"):
        send_frame(left, _named("x" * FRAME_BYTES_MAX), Deadline(0.05))
    for call in (_receive, send_frame):
        with pytest.raises(UnavailableError, match="in time"):
            call(left, _named("x") if call is send_frame else Deadline(0), *_last(call))


def _last(call):
    return (Deadline(0),) if call is send_frame else (Descriptors(),)


def test_descriptors_wait_while_too_many_are_on_their_way(pair, deadline, monkeypatch):
    """Linux bounds those of one user that were sent and not yet received."""
    left, right = pair
    send, tries = socket.send_fds, []

    def crowded(*arguments):
        tries.append(arguments)
        if len(tries) < 3:
            raise OSError(errno.ETOOMANYREFS, "crowded")
        return send(*arguments)

    monkeypatch.setattr(frames.socket, "send_fds", crowded)
    send_frame(left, _named("x"), deadline, [0])
    with Descriptors() as arrived:
        _receive(right, deadline, arrived)
        assert (len(tries), len(arrived)) == (3, 1)
    tries.clear()
    with pytest.raises(UnavailableError, match="in time"):
        send_frame(left, _named("x"), Deadline(0.005), [0])


def test_descriptors_are_closed_unless_taken():
    before = descriptors()
    with Descriptors() as arrived:
        arrived.add([os.eventfd(0), os.eventfd(0)])
        taken = arrived.take()
        assert len(arrived) == 1
    assert descriptors() == before + 1
    arrived.close()
    os.close(taken)
