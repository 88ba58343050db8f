"""Mutual TLS: who shows no certificate, or a stranger's, gets nothing. The keys are for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sidecars import Sidecar, model_tier

import engram
from engram.errors import ConfigError, UnavailableError
from engram.table import Table

PEMS = Path(__file__).parent / "data" / "tls"
OURS = {
    "root_certificates": PEMS / "ca.pem",
    "client_certificate": PEMS / "client.pem",
    "client_key": PEMS / "client.key",
}
TOKENS = np.arange(20)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    tls = {
        "certificate": PEMS / "server.pem",
        "key": PEMS / "server.key",
        "client_ca": PEMS / "ca.pem",
    }
    place = tmp_path_factory.mktemp("run") / "s.sock"
    with Sidecar(place, {"one": {}}, listen=["tcp:0.0.0.0:0"], tls=tls) as running:
        port = running.lines[0].rpartition("tcp:0.0.0.0:")[2].partition(";")[0]
        yield f"localhost:{port}"


@pytest.mark.parametrize("scheme", ["", "dns:///"])
def test_known_clients_are_served(address, scheme):
    with engram.connect(scheme + address, **OURS) as table:
        assert np.array_equal(
            table.lookup(TOKENS).values, Table(model_tier()).lookup(TOKENS).values
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"client_certificate": None, "client_key": None},
        {"client_certificate": PEMS / "stranger.pem", "client_key": PEMS / "stranger.key"},
        {"root_certificates": PEMS / "stranger.pem"},
        {"root_certificates": None},
        dict.fromkeys(OURS),
    ],
    ids=["no certificate", "a stranger's", "other roots", "the system's roots", "in the clear"],
)
def test_others_are_not(address, changes):
    with pytest.raises(UnavailableError) as caught:
        engram.connect(address, timeout_s=5, **(OURS | changes))
    assert "\n" not in str(caught.value)


def test_a_damaged_certificate_is_refused_in_one_line(tmp_path):
    from engram.service.config import TlsConfig
    from engram.service.server import Server
    from engram.service.sockets import Address

    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    tls = TlsConfig(certificate=broken, key=PEMS / "server.key", client_ca=PEMS / "ca.pem")
    with pytest.raises(ConfigError, match="cannot listen on"):
        Server({"one": model_tier()}, (Address(None, "127.0.0.1", 0),), tls=tls)
