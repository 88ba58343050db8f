"""Clients against attach sockets that offer what they should not."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from attach_clients import memory
from attach_hosts import HANG_S, TIMEOUT_S, descriptors, host_of, until

from engram.errors import ServiceError
from engram.proto.v1 import attach_pb2 as pb
from engram.ram.frames import Deadline, Descriptors, receive_frame, send_frame
from engram.ram.layout import ABI
from engram.ram.memory import SEALS_OF_WRITER, Memory
from engram.service import _handshake


@pytest.fixture(scope="module")
def host(tmp_path_factory, v41_table):
    """A real server, whose memory false ones hand over wrongly."""
    place = tmp_path_factory.mktemp("real") / "s"
    with host_of(place, {"v41": v41_table}) as host:
        yield host


class FalseServer:
    """A server that answers a client's request with whatever a test wants."""

    def __init__(self, place, answer):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{place}.attach")
        self.listener.listen(1)
        self.answer = answer
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(TIMEOUT_S)
            deadline = Deadline(TIMEOUT_S)
            with Descriptors() as descriptors:
                receive_frame(connection, pb.FromClient, deadline, descriptors)
            self.answer(lambda *frame: send_frame(connection, frame[0], deadline, frame[1:]))

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.thread.join(HANG_S)
        self.listener.close()


def _change(**changes):
    def change(offer):
        for name, value in changes.items():
            *path, field = name.split("__")
            target = offer
            for part in path:
                target = getattr(target, part)
            setattr(target, field, value)

    return change


OFFERS = {
    "another layout": (_change(abi=ABI + 1), f"ABI version {ABI + 1}"),
    "another slot size": (_change(arena__slot_bytes=64), "bytes of a slot 64"),
    "another bundle": (_change(bundle__heads=99), "bundles BundleLayout"),
    "slots beyond counting": (_change(arena__slots=1 << 63), "which cannot be"),
    "more slots than there are": (_change(arena__slots=1 << 16), "shared memory came with"),
    "slabs of no size": (_change(arena__slots_per_slab=0), "slots of a slab 0"),
    "slabs of an odd size": (_change(arena__slots_per_slab=3), "slots of a slab -1"),
    "too many slabs": (_change(arena__slots_per_slab=1, arena__slots=1 << 20), "slabs 1048576"),
    "no chunks": (_change(staging__chunks=0), "staging chunks 0"),
    "more chunks": (_change(staging__chunks=64), "shared memory came with"),
    "another table's number": (_change(table_number=5), "a directory whose word"),
    "another seed": (_change(seed=5), "a directory whose word"),
    "another life": (_change(boot_id="00" * 16), "a directory whose word"),
    "no life": (_change(boot_id="zz"), "bytes of the boot id 0"),
    "no token": (_change(token=b""), "bytes of the token 0"),
    "another manifest": (_change(manifest_bytes=7), "shared memory came with"),
    "a manifest beyond memory": (_change(manifest_bytes=1 << 60), "which cannot be"),
    "no manifest": (_change(manifest_bytes=0), "4 descriptors, needed are 2"),
}


@pytest.mark.parametrize("what", OFFERS)
def test_a_client_refuses_an_offer_that_does_not_add_up(host, tmp_path, what):
    change, words = OFFERS[what]
    tier = host.tiers["v41"]

    def answer(say):
        staging, entries = _handshake._staging(tier.bundle)
        offer = _handshake._offer(tier, bytes(16), entries)
        handed = [tier.cache.directories[tier.number].descriptor, staging.descriptor]
        with open(__file__, "rb") as data:
            manifest = Memory.shared("manifest", 100, SEALS_OF_WRITER)
            offer.manifest_bytes = manifest.size
            change(offer)
            say(pb.FromServer(offer=offer), *handed, manifest.descriptor, data.fileno())

    _refuses(host, tmp_path / "t", answer, words)


def _refuses(host, place, answer, words):
    before = descriptors()
    with (
        FalseServer(place, answer),
        pytest.raises(ServiceError) as caught,
    ):
        host.attach(path=place)
    assert words in str(caught.value)
    del caught
    until(lambda: descriptors() <= before)


def test_a_client_refuses_memory_that_could_change_under_it(host, tmp_path):
    tier = host.tiers["v41"]

    def answer(say):
        _, entries = _handshake._staging(tier.bundle)
        offer = _handshake._offer(tier, bytes(16), entries)
        loose = memory(tier.cache.layout.directory_bytes, 0)
        try:
            say(pb.FromServer(offer=offer), loose, loose)
        finally:
            os.close(loose)

    _refuses(host, tmp_path / "t", answer, "shared memory came with seals 0x0")


ANSWERS = {
    "slabs before the offer": (lambda say: say(pb.FromServer(slabs=pb.Slabs())), "said slabs"),
    "nothing": (lambda say: say(pb.FromServer()), "said None"),
    "the end": (lambda say: None, "closed the attach socket; try again"),
    "an unknown refusal": (
        lambda say: say(pb.FromServer(refusal={"code": 99, "message": "words"})),
        "words",
    ),
    "all descriptors there are": (
        lambda say: say(pb.FromServer(slabs=pb.Slabs()), *253 * [0]),
        "descriptors were lost",
    ),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_client_survives_a_server_that_says_what_it_should_not(host, tmp_path, what):
    answer, words = ANSWERS[what]
    _refuses(host, tmp_path / "t", answer, words)


def test_what_answers_on_the_socket_may_be_no_engram(host, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "t.attach"))
        listener.listen(1)

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ServiceError, match="bytes came on the attach socket"):
            host.attach(path=tmp_path / "t")
        thread.join()
