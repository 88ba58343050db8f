"""Whose a socket path or port is: claimed, taken over from the dead, and never shared."""

from __future__ import annotations

import os
import socket

import pytest
from sidecars import model_tier

from engram.errors import ConfigError


@pytest.fixture
def claim():
    from engram.service.sockets import SocketClaim

    claims = []

    def make(path):
        claims.append(SocketClaim(path))
        return claims[-1]

    yield make
    for each in claims:
        each.release()


def test_only_one_claims_a_path(tmp_path, claim):
    from engram.service.sockets import SocketClaim

    claim(tmp_path / "s")
    with pytest.raises(ConfigError, match="another server has"):
        SocketClaim(tmp_path / "s")


def test_a_dead_servers_socket_is_taken_over(tmp_path, claim):
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "s"))
    dead.close()
    claim(tmp_path / "s")


def test_what_is_not_a_dead_servers_socket_is_left_alone(tmp_path):
    from engram.service.sockets import SocketClaim

    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    alive = socket.socket(socket.AF_UNIX)
    alive.bind(str(tmp_path / "alive"))
    alive.listen()
    for name, word in (
        ("file", "not a socket"),
        ("folder", "not a socket"),
        ("link", "not a socket"),
        ("alive", "something else is serving"),
        ("missing/s", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=word):
            SocketClaim(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "alive").is_socket()
    alive.close()


def test_the_attach_socket_beside_it_is_claimed_too(tmp_path):
    from engram.service.sockets import SocketClaim

    beside = tmp_path / "s.attach"
    beside.write_text("mine")
    with pytest.raises(ConfigError, match=r"s\.attach exists and is not a socket"):
        SocketClaim(tmp_path / "s")
    assert beside.read_text() == "mine"
    beside.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(beside))
        other.listen()
        with pytest.raises(ConfigError, match=r"something else is serving .*s\.attach"):
            SocketClaim(tmp_path / "s")
    SocketClaim(tmp_path / "s").release()
    assert not beside.exists()


def test_a_lock_file_is_never_followed_elsewhere(tmp_path):
    from engram.service.sockets import SocketClaim

    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.symlink(victim, tmp_path / "s.lock")
    with pytest.raises(ConfigError, match=r"s\.lock cannot be opened"):
        SocketClaim(tmp_path / "s")
    assert victim.read_text() == "mine"


def test_a_taken_tcp_port_is_refused_and_grpc_adds_no_words(capfd):
    from engram.service.server import Server
    from engram.service.sockets import Address

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port {port} on 127.0.0.1 is in use; stop what"):
            Server({"one": model_tier()}, (Address(None, "127.0.0.1", port),))
    assert not capfd.readouterr().err


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_one_is_refused(host):
    from engram.service.server import Server
    from engram.service.sockets import Address

    with pytest.raises(ConfigError, match=f"cannot listen on tcp:{host}:0"):
        Server({"one": model_tier()}, (Address(None, host, 0),))


@pytest.mark.parametrize("probed", [True, False])
def test_two_servers_never_share_a_tcp_port(probed, monkeypatch):
    """Not even where both found it free: then the kernel must refuse the second."""
    from engram.service import server
    from engram.service.sockets import Address

    first = server.Server({"one": model_tier()}, (Address(None, "127.0.0.1", 0),))
    first.start()
    if not probed:
        monkeypatch.setattr(server, "require_free_port", lambda address: None)
    with pytest.raises(ConfigError, match="in use" if probed else "cannot listen on tcp"):
        server.Server({"two": model_tier()}, first.addresses)
    first.stop()


def test_the_port_of_a_server_that_ended_can_be_had_at_once():
    from engram.service import server
    from engram.service.config import Limits

    listen = (server.Address(None, "127.0.0.1", 0),)
    for _ in range(2):
        running = server.Server({"one": model_tier()}, listen, Limits(drain_seconds=0.1))
        running.start()
        listen = running.addresses
        with socket.create_connection(("127.0.0.1", listen[0].port)) as client:
            client.recv(1)
            # Whoever closes first keeps the port busy for a minute: here the server.
            running.stop()
            while client.recv(4096):
                pass
