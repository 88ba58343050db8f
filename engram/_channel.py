"""Addresses of sidecars, and channels to them: plaintext stays on this host, TLS goes beyond."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from engram.errors import ConfigError, UnavailableError

SOCKET_PATH_BYTES_MAX = 107
"""What fits `sockaddr_un` on Linux, without the final zero."""

_OPTIONS = (
    # Replies are chunks of about 1 MiB, but a table's token map comes whole.
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", -1),
    # A connection of its own: one broken or slow connection never delays another table.
    ("grpc.use_local_subchannel_pool", 1),
)

_first_user: list[int] = []
"""The process that first used gRPC here; forks inherit it."""


@dataclass(frozen=True)
class Tls:
    """PEM files for a connection to another host.

    Attributes:
        root_certificates: who may have signed the server's certificate; the system's when None.
        client_certificate, client_key: what the client shows, together or not at all.
    """

    root_certificates: str | os.PathLike[str] | None = None
    client_certificate: str | os.PathLike[str] | None = None
    client_key: str | os.PathLike[str] | None = None

    def __bool__(self) -> bool:
        return any((self.root_certificates, self.client_certificate, self.client_key))

    def credentials(self) -> Any:
        """Credentials for gRPC.

        Raises:
            ConfigError: a file cannot be read, or only one of certificate and key is given.
        """
        if (self.client_certificate is None) != (self.client_key is None):
            raise ConfigError("client_certificate and client_key must be given together")
        return grpc.ssl_channel_credentials(
            read_pem(self.root_certificates),
            read_pem(self.client_key),
            read_pem(self.client_certificate),
        )


def read_pem(path: str | os.PathLike[str] | None) -> bytes | None:
    """Content of a PEM file; None for None.

    Raises:
        ConfigError: it cannot be read or is not PEM.
    """
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{path} is not a PEM file")
    return content


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without port, never leaves this machine."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_port(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 host stands in brackets.

    Raises:
        ConfigError: of another form.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and host and port.isdecimal() and int(port) < 2**16) or (
        ":" in host and not bracketed
    ):
        raise ConfigError(f"{address!r} is not HOST:PORT; an IPv6 host goes in brackets")
    return host, int(port)


def require_own_grpc() -> int:
    """Refuse to use gRPC in a fork of a process that used it: its threads and locks are gone.

    A child that tries may work, abort or wait for ever, depending on what its parent was doing.

    Returns:
        The id of this process.

    Raises:
        UnavailableError: this process is such a fork.
    """
    process = os.getpid()
    if not _first_user:
        _first_user.append(process)
    if _first_user[0] != process:
        raise UnavailableError(
            "gRPC does not survive a fork: start this process with the 'spawn' or 'forkserver' "
            "method, or call engram.connect only after forking"
        )
    return process


def absolute_target(target: str) -> str:
    """`target` with the path of a Unix socket made absolute, so that it outlives a chdir."""
    path = target.removeprefix("unix:")
    return f"unix:{os.path.abspath(path)}" if path and path != target else target


def open_channel(target: str, tls: Tls) -> Any:
    """Channel to an absolute `unix:PATH`, to `HOST:PORT` or `dns:///HOST:PORT`; connects late.

    Raises:
        ConfigError: a target of another form, or TLS files for one that needs none or cannot be
            read.
    """
    if target.startswith("unix:"):
        path = target.removeprefix("unix:")
        if tls:
            raise ConfigError("a Unix socket needs no TLS; leave the certificates out")
        if not path or len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"{target}: a socket path has 1 to {SOCKET_PATH_BYTES_MAX} bytes; use a shorter one"
            )
        return grpc.insecure_channel(target, options=_OPTIONS)
    address = target.removeprefix("dns:///")
    if "/" in address:
        raise ConfigError(
            f"{target!r} is not an address; use unix:PATH, HOST:PORT or dns:///HOST:PORT"
        )
    host, _ = split_port(address)
    if is_loopback(host) and not tls:
        return grpc.insecure_channel(target, options=_OPTIONS)
    return grpc.secure_channel(target, tls.credentials(), options=_OPTIONS)
