"""Clients of the attach socket that can stop, or go wrong, at every step."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from contextlib import contextmanager, suppress

from attach_hosts import TIMEOUT_S, Host, descriptors, until

from engram._wire import error_of
from engram.proto.v1 import attach_pb2 as pb
from engram.ram.frames import Deadline, Descriptors, receive_frame, send_frame
from engram.ram.layout import ABI
from engram.ram.memory import SEALS_OF_READER


class Client:
    """One of them, connected."""

    def __init__(self, host: Host):
        self.host = host
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(f"{host.place}.attach")
        self.descriptors = Descriptors()
        self.deadline = Deadline(TIMEOUT_S)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.descriptors.close()
        self.socket.close()

    def request(self, **changes):
        fingerprint = self.host.tiers["v41"].fingerprint
        fields = {"abi": ABI, "table": "v41", "fingerprint": fingerprint} | changes
        self.say(pb.FromClient(request=pb.AttachRequest(**fields)))

    def reader(self, *handed):
        self.say(pb.FromClient(reader=pb.Reader()), handed)

    def say(self, message, handed=()):
        send_frame(self.socket, message, self.deadline, handed)

    def hear(self):
        return receive_frame(self.socket, pb.FromServer, self.deadline, self.descriptors)

    def offered(self):
        """Everything up to the last slab; the offer."""
        self.request()
        offer = self.hear().offer
        self.descriptors.close()
        slabs = self.host.tiers["v41"].cache.layout.slabs
        while slabs:
            assert self.hear().WhichOneof("says") == "slabs"
            slabs -= len(self.descriptors)
            self.descriptors.close()
        return offer

    def hung_up(self):
        # A reset, where it had not read everything.
        with suppress(ConnectionResetError):
            assert self.socket.recv(1) == b""

    def refusal(self):
        said = self.hear()
        assert said.WhichOneof("says") == "refusal", said
        self.hung_up()
        return error_of(said.refusal.code, said.refusal.message)


def memory(size, seals=SEALS_OF_READER, flags=0):
    """A memory file, as a client would make it."""
    descriptor = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


STEPS = ("connected", "half a frame", "requested", "offered", "all slabs", "reader sent")


def go(client, steps, reader):
    """Take so many of `STEPS`, the last one with `reader`."""
    if steps == 1:
        client.socket.sendall(b"\x10\x00")
    if steps >= 2:
        client.request()
    if steps >= 3:
        client.hear()
    if steps >= 4:
        while not len(client.descriptors) or client.hear().WhichOneof("says") != "slabs":
            pass
    if steps >= 5:
        client.reader(reader)


@contextmanager
def unharmed(host, leases_max):
    """Whatever happens within, a server has its descriptors, threads and places back, and works."""
    until(lambda: host.leases == 0)
    before, threads = descriptors(), threading.active_count()
    yield
    until(lambda: descriptors() <= before)
    until(lambda: threading.active_count() <= threads)
    until(lambda: host.server._places == leases_max)
    lease = host.attach()
    assert host.server.lease(lease.token) is not None
    lease.close()
