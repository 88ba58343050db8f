"""Attach sockets against clients and servers that do what they should not."""

from __future__ import annotations

import os
import random
import socket
import time
from contextlib import ExitStack

import numpy as np
import pytest
from attach_clients import STEPS, Client, go, memory, unharmed
from attach_hosts import HANG_S, host_of, until

from engram.errors import RequestError, ServiceError, UnavailableError
from engram.proto.v1 import attach_pb2 as pb
from engram.ram import frames
from engram.ram.layout import ABI
from engram.ram.memory import SEALS_OF_READER, SEALS_OF_WRITER
from engram.rows import Rows
from engram.service import attach as server_module
from engram.tiers import Ngrams, Selection

LEASES_MAX = 6


@pytest.fixture(scope="module")
def served(tmp_path_factory, v41_table):
    place = tmp_path_factory.mktemp("hostile") / "s"
    with host_of(place, {"v41": v41_table}, leases_max=LEASES_MAX) as host:
        host.attach().close()
        yield host


@pytest.fixture
def host(served):
    with unharmed(served, LEASES_MAX):
        yield served


@pytest.fixture
def client(host):
    with Client(host) as client:
        yield client


@pytest.fixture
def reader_bytes(served):
    return served.tiers["v41"].cache.layout.reader_bytes


# What a client says first, as bytes, and what it hears.
GARBAGE = {
    "no length": (b"\xff", None),
    "half a length": (b"\x08\x00", None),
    "an empty message": (bytes(4), "said None with 0 descriptors instead of request"),
    "the greatest length": (b"\xff\xff\xff\xff", "4294967295 bytes came"),
    "one byte too many": ((frames.FRAME_BYTES_MAX + 1).to_bytes(4, "little"), "65537 bytes came"),
    "half a message": (b"\x20\x00\x00\x00abc", None),
    "a malformed message": (b"\x04\x00\x00\x00\xff\xff\xff\xff", "malformed frame"),
    "a wrong length inside": (b"\x03\x00\x00\x00\x0a\x7f\x00", "malformed frame"),
    "no UTF-8": (b"\x06\x00\x00\x00\x0a\x04\x12\x02\xff\xfe", "malformed frame"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "bytes came on the attach socket"),
    "zeros": (bytes(1 << 16), "said None"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused_by_name(host, what):
    sent, heard = GARBAGE[what]
    with Client(host) as client:
        client.socket.sendall(sent)
        if heard is None:
            client.socket.shutdown(socket.SHUT_WR)
            assert "closed the attach socket" in str(client.refusal())
        else:
            said = client.hear()
            assert heard in said.refusal.message


def test_random_bytes_never_attach(host):
    numbers = random.Random(5)
    for _ in range(150):
        with Client(host) as client:
            length = numbers.randrange(40)
            body = numbers.randbytes(length)
            if numbers.random() < 0.7:
                body = length.to_bytes(4, "little") + body
            client.socket.sendall(body)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.hear().WhichOneof("says") == "refusal"
    assert host.leases == 0


REQUESTS = {
    "another layout": ({"abi": ABI + 1}, f"version {ABI + 1}, the sidecar as version {ABI};"),
    "no layout": ({"abi": 0}, "lays out shared memory as version 0"),
    "no table": ({"table": ""}, "no table '' is served"),
    "a table by path": ({"table": "../v41"}, "no table '../v41' is served"),
    "a long name": ({"table": "x" * 60000}, "is served"),
    "another fingerprint": ({"fingerprint": "f" * 32}, "is another table"),
    "no fingerprint": ({"fingerprint": ""}, "is another table"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_is_wrong_is_refused_by_name(client, what):
    changes, words = REQUESTS[what]
    client.request(**changes)
    refusal = client.refusal()
    assert words in str(refusal)
    assert len(str(refusal)) < 300


def test_steps_out_of_order_are_refused(host, reader_bytes):
    readers = [memory(reader_bytes) for _ in range(2)]
    with Client(host) as client:
        client.reader(readers[0])
        assert "said reader with 1 descriptors instead of request" in str(client.refusal())
    with Client(host) as client:
        client.offered()
        client.request()
        assert "said request with 0 descriptors instead of reader" in str(client.refusal())
    for descriptor in readers:
        os.close(descriptor)


def test_a_request_with_descriptors_is_refused(host):
    request = pb.AttachRequest(abi=ABI, table="v41", fingerprint=host.tiers["v41"].fingerprint)
    for count in (1, 3, 200, 253):
        with Client(host) as client:
            client.say(pb.FromClient(request=request), count * [0])
            assert isinstance(client.refusal(), ServiceError)


def test_a_descriptor_with_every_byte_is_refused(host):
    with Client(host) as client:
        client.socket.sendall((1000).to_bytes(4, "little"))
        _until_hung_up(lambda: socket.send_fds(client.socket, [b"x"], 10 * [0]), 0.0005)


def _until_hung_up(send, pause_s):
    for _ in range(10000):
        try:
            send()
        except (BrokenPipeError, ConnectionResetError):
            return
        time.sleep(pause_s)
    pytest.fail("the server listened all the time")


READERS = {
    "none": lambda size: [],
    "two": lambda size: [memory(size), memory(size)],
    "as many as one message can carry": lambda size: [memory(size) for _ in range(253)],
    "a regular file": lambda size: [os.open(__file__, os.O_RDONLY)],
    "a socket": lambda size: [socket.socket().detach()],
    "too small": lambda size: [memory(size - 4096)],
    "too large": lambda size: [memory(size + 4096)],
    "empty": lambda size: [memory(0)],
    "unsealed": lambda size: [memory(size, 0)],
    "may shrink": lambda size: [memory(size, SEALS_OF_READER & ~0x02)],
    "may be sealed later": lambda size: [memory(size, SEALS_OF_READER & ~0x01)],
    "cannot be written": lambda size: [memory(size, SEALS_OF_READER | 0x08)],
    "cannot be mapped to write": lambda size: [memory(size, SEALS_OF_WRITER)],
}


@pytest.mark.parametrize("what", READERS)
def test_a_readers_memory_that_is_not_as_it_must_be_is_refused(host, reader_bytes, what):
    handed = READERS[what](reader_bytes)
    until(lambda: host.leases == 0)  # those of the tests before
    readers = len(host.tiers["v41"].cache._readers)
    with Client(host) as client:
        offer = client.offered()
        client.reader(*handed)
        assert isinstance(client.refusal(), ServiceError)
        assert host.server.lease(offer.token) is None
    assert len(host.tiers["v41"].cache._readers) == readers
    for descriptor in handed:
        os.close(descriptor)


def test_the_sidecars_own_memory_is_no_readers(host):
    """Clearing hits in there would change its directory."""
    with Client(host) as client:
        client.request()
        client.hear()
        own = client.descriptors.take()
        client.descriptors.close()
        client.hear()
        client.descriptors.close()
        client.reader(own)
        os.close(own)
        assert isinstance(client.refusal(), ServiceError)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_may_vanish_at_every_step(host, reader_bytes, step, reset):
    reader = memory(reader_bytes)
    for _ in range(LEASES_MAX + 2):
        until(lambda: host.server._places > 0)
        with Client(host) as client:
            go(client, STEPS.index(step), reader)
            if reset:  # with something unread, so that the other side gets an error
                client.socket.shutdown(socket.SHUT_RD)
    os.close(reader)
    until(lambda: host.server._places == LEASES_MAX)
    assert len(host.tiers["v41"].cache._readers) == 1


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_silent_client_is_given_up_in_time(host, step, reader_bytes, monkeypatch):
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.2)
    reader = memory(reader_bytes)
    with Client(host) as client:
        go(client, STEPS.index(step), reader)
        started = time.monotonic()
        while True:
            said = client.hear()
            if said.WhichOneof("says") == "refusal":
                break
        assert "in time" in said.refusal.message
        assert time.monotonic() - started < HANG_S
        client.hung_up()
    os.close(reader)


def test_a_client_that_sends_a_byte_now_and_then_is_given_up_in_time(host, monkeypatch):
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.3)
    with Client(host) as client:
        client.socket.sendall((60000).to_bytes(4, "little"))
        _until_hung_up(lambda: client.socket.sendall(b"x"), 0.01)


def test_whatever_a_client_says_later_ends_its_lease(host):
    for said in (b"x", bytes(100000)):
        before = host.server.stats()["ended_protocol"]
        lease = host.attach()
        other = host.attach()
        lease._connection.sendall(said[:1000])
        until(lambda lease=lease: not lease.alive)
        assert host.server.lease(lease.token) is None
        assert host.server.stats()["ended_protocol"] == before + 1
        assert other.alive
        other.close()
        lease.close()


def test_descriptors_sent_later_are_not_kept(host):
    lease = host.attach()
    until(lambda: host.leases == 1)
    socket.send_fds(lease._connection, [b"x"], 100 * [0])
    until(lambda: not lease.alive)
    lease.close()


def test_a_client_that_half_closes_has_no_lease(host):
    lease = host.attach()
    lease._connection.shutdown(socket.SHUT_WR)
    until(lambda: not lease.alive)
    assert host.server.lease(lease.token) is None
    lease.close()


def test_nothing_in_a_readers_memory_is_believed(host):
    """Hits and epochs that cannot be only cost what is cached, never a row."""
    tier = host.tiers["v41"]
    vocabulary, order = tier.spec.canonical_vocab_size, tier.spec.max_order
    numbers = np.random.default_rng(3)
    with ExitStack() as held:
        for byte in (0xFF, 0x80, 0x7F):
            lease = host.attach()
            held.callback(lease.close)
            lease.reader.bytes()[:] = byte
        for _ in range(40):
            windows = numbers.integers(0, vocabulary, (200, order), np.int32)
            ngrams = Ngrams(windows, np.full(200, order, np.int32))
            selection = Selection.of(tier.spec)
            places = np.arange(ngrams.row_count(selection))
            rows, expected = (Rows.empty((len(places),), tier.row_format) for _ in range(2))
            tier.read(ngrams, selection, rows, places)
            tier.backing.read(ngrams, selection, expected, places)
            assert np.array_equal(rows.packed(), expected.packed())
        tier.check_integrity()
    until(lambda: host.leases == 0)


def test_errors_are_of_the_documented_kinds(host):
    with Client(host) as client:
        client.request(abi=77)
        assert isinstance(client.refusal(), RequestError)
    with pytest.raises(UnavailableError, match="nothing answers there"):
        host.attach(path=host.place.with_name("none"))
