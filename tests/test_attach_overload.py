"""Attach sockets with too many clients, too few descriptors, no memory, or no time left."""

from __future__ import annotations

import resource
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from attach_clients import Client, go, unharmed
from attach_hosts import HANG_S, descriptors, host_of, until

from engram.errors import EngramError, OverloadError, ServiceError, UnavailableError
from engram.service import _handshake
from engram.service import attach as server_module

LEASES_MAX = 6


@pytest.fixture(scope="module")
def served(tmp_path_factory, v41_table):
    place = tmp_path_factory.mktemp("busy") / "s"
    with host_of(place, {"v41": v41_table}, leases_max=LEASES_MAX) as host:
        host.attach().close()
        yield host


@pytest.fixture
def host(served):
    with unharmed(served, LEASES_MAX):
        yield served


def test_silent_clients_hold_places_only_for_a_time(host, monkeypatch):
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 1.0)
    with ExitStack() as held:
        for _ in range(LEASES_MAX):
            held.enter_context(Client(host))
        until(lambda: host.server._places == 0)
        with pytest.raises(OverloadError, match=f"{LEASES_MAX} clients are attached already"):
            host.attach()
        until(lambda: host.server._places == LEASES_MAX)
        host.attach().close()


def test_two_hundred_clients_at_once(tmp_path, v41_table):
    fates = []

    def attach(host):
        try:
            lease = host.attach(timeout_s=HANG_S)
            fates.append("attached")
            while len(fates) < 200:
                time.sleep(0.01)
            lease.close()
        except EngramError as error:
            fates.append(type(error))

    with host_of(tmp_path / "s", {"v41": v41_table}, 1 << 20, leases_max=50) as host:
        serving = descriptors()
        threads = [threading.Thread(target=attach, args=(host,)) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        assert len(fates) == 200
        # Nobody is left waiting: each is attached, or told that there is no room.
        assert set(fates) == {"attached", OverloadError}
        assert fates.count("attached") == 50
        until(lambda: host.leases == 0)
        until(lambda: descriptors() <= serving)
        host.attach().close()


def test_more_connections_than_descriptors(host):
    """The server waits until some are free again; nobody that is attached notices."""
    lease = host.attach()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as held:
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for each in waiting:
            held.callback(each.close)
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() - 1, limits[1]))
        for each in waiting:
            each.connect(f"{host.place}.attach")
        until(lambda: host.server._exhausted)
        assert lease.alive
        assert host.server.lease(lease.token) is not None
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        until(lambda: not host.server._exhausted)
    lease.close()


def test_a_client_with_too_few_descriptors_says_so_and_keeps_none(host):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    refused = 0
    for spare in range(0, 16):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, limits[1]))
            host.attach(timeout_s=0.5).close()
        except EngramError:
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        until(lambda: descriptors() <= before)
    assert refused > 3


def test_no_memory_for_a_client_is_overload(host, monkeypatch):
    def none(*arguments):
        raise ServiceError("no memory")

    monkeypatch.setattr(_handshake.Memory, "shared", none)
    with pytest.raises(OverloadError, match="has no memory for another client: no memory"):
        host.attach()


def test_no_thread_for_a_client_is_overload(host, monkeypatch):
    start = threading.Thread.start

    def none(thread):
        if thread.name == "engram-handshake":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(OverloadError, match="has no thread left"):
        host.attach()


def test_a_defect_of_the_server_is_told_and_logged(host, monkeypatch, caplog):
    def fail(*arguments):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(_handshake, "_staging", fail)
    with pytest.raises(ServiceError, match="its log says more"):
        host.attach()
    assert "a defect" in caplog.text


def test_the_server_stops_amid_handshakes(tmp_path, v41_table):
    before = descriptors()
    with host_of(tmp_path / "s", {"v41": v41_table}) as host:
        serving = descriptors()
        lease = host.attach()
        clients = [Client(host) for _ in range(4)]
        for steps, client in enumerate(clients):
            go(client, steps, None)
        host.server.stop()
        until(lambda: not lease.alive)
        assert host.server._places == server_module.LEASES_MAX
        lease.close()
        for client in clients:
            client.__exit__()
        until(lambda: descriptors() < serving)
    del host, client, clients
    until(lambda: descriptors() <= before)


def test_no_thread_for_a_lease_is_said(host, monkeypatch):
    start, before = threading.Thread.start, descriptors()

    def none(thread):
        if thread.name == "engram-populate":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(UnavailableError, match="no descriptor or thread left"):
        host.attach()
    until(lambda: descriptors() <= before)
    until(lambda: host.leases == 0)
