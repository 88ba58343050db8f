"""Whether a sidecar answers: the question that a client would ask, asked by itself."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engram._channel import Tls, open_channel
from engram.errors import ConfigError
from engram.service.sockets import Address


def place_to_ask(addresses: Iterable[Address], *, encrypted: bool) -> str:
    """Target of the first address that needs no certificate of a client.

    Args:
        encrypted: whether TCP addresses take TLS only.

    Raises:
        ConfigError: there is none.
    """
    for address in addresses:
        if address.path is not None:
            return f"unix:{address.path}"
        if not encrypted:
            return f"{address.host}:{address.port}"
    raise ConfigError(
        "the watchdog needs an address where the sidecar can ask itself without a certificate; "
        "listen on a Unix socket, too, or remove WatchdogSec from the unit"
    )


def answers(target: str, timeout_s: float) -> bool:
    """Whether a new connection to `target` gets an answer in time.

    Any answer will do, for one that drains says that it does not serve, and is no failure. Tables
    are not read: a slow disk is not mended by a new process, while clients have their hits.
    """
    with open_channel(target, Tls()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return True
