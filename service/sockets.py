"""Addresses to listen on, and who owns a Unix socket's path.

gRPC binds a Unix path whoever holds it: a second server would take it over without a word. So
whoever serves PATH, and PATH.attach beside it, holds a lock on `PATH.lock` first, as long as it
lives. The lock file stays when the server ends: removing it would let two servers lock two files
of one name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram._channel import SOCKET_PATH_BYTES_MAX, is_loopback, split_port
from engram.errors import ConfigError
from engram.ram.frames import attach_path

SOCKET_MODE = 0o660
HTTP_DEFAULT = "127.0.0.1:9471"


@dataclass(frozen=True)
class Address:
    """Where to listen: a Unix socket's absolute path, or a TCP host and port.

    Port 0 is any free one.
    """

    path: Path | None = None
    host: str = ""
    port: int = 0

    @property
    def leaves_host(self) -> bool:
        """Whether other machines can reach it."""
        return self.path is None and not is_loopback(self.host)

    def __str__(self) -> str:
        return f"tcp:{self.host}:{self.port}" if self.path is None else f"unix:{self.path}"


def parse_address(text: str | Address) -> Address:
    """Parse `unix:PATH` or `tcp:HOST:PORT`.

    Raises:
        ConfigError: of another form, or a path too long for a socket.
    """
    if isinstance(text, Address):
        return text
    kind, _, rest = str(text).partition(":")
    if kind == "tcp":
        return Address(None, *split_port(rest))
    if kind != "unix" or not rest:
        raise ConfigError(f"{text!r} is no address to listen on; use unix:PATH or tcp:HOST:PORT")
    path = Path(os.path.abspath(rest))
    longest = attach_path(path)
    if len(os.fsencode(longest)) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"{longest} has {len(os.fsencode(longest))} bytes, but a socket's path at most "
            f"{SOCKET_PATH_BYTES_MAX}; use a shorter one"
        )
    return Address(path)


def parse_http(text: str | Address | None) -> Address | None:
    """Parse `HOST:PORT`; None for `off`.

    Raises:
        ConfigError: of another form.
    """
    if text is None or isinstance(text, Address):
        return text
    if str(text) == "off":
        return None
    try:
        return Address(None, *split_port(str(text)))
    except ConfigError as error:
        raise ConfigError(f"{error}; 'off' is for no HTTP") from None


def bind_http(address: Address) -> socket.socket:
    """A socket that listens at `address`.

    Raises:
        ConfigError: as `require_free_port`.
    """
    try:
        require_free_port(address)
        family, place = _places(address)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror}; choose another"
            ) from None
    except ConfigError as error:
        raise ConfigError(f"{error} with --http ('off' for none)") from None
    return listener


def require_free_port(address: Address) -> None:
    """Refuse a TCP address that cannot be bound, before gRPC tries and logs lines of its own.

    Raises:
        ConfigError: something listens there, the host is unknown or not this one, or the port
            needs privileges.
    """
    found = _places(address)
    tried = [_try_bind(family, place) for family, place in found]
    refused = [reason for reason in tried if reason is not None]
    if any(reason.errno == errno.EADDRINUSE for reason in refused):
        raise ConfigError(
            f"port {address.port} on {address.host} is in use; "
            "stop what listens there or choose another"
        )
    # A name may have addresses of a kind that this machine has not; one that works will do.
    if len(refused) == len(found):
        raise ConfigError(
            f"cannot listen on {address}: {refused[0].strerror}; choose another host or port"
        )


def _places(address: Address) -> list[tuple[int, tuple[Any, ...]]]:
    """Families and addresses of a host and port."""
    host = address.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}; check the host's name"
        ) from None
    return [(family, place) for family, *_, place in found]


def _try_bind(family: int, place: tuple[Any, ...]) -> OSError | None:
    """Why `place` cannot be bound; None if it can."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections that a server before left behind are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error
    return None


class SocketClaim:
    """The right to serve a path and its attach socket, from construction to `release`.

    Raises:
        ConfigError: another server has it, something else is there, or the directory is missing
            or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} does not exist; create it, or listen elsewhere")
        self._lock = _lock(path)
        try:
            for each in self._sockets():
                _require_free(each)
        except BaseException:
            os.close(self._lock)
            raise

    def release(self) -> None:
        """Remove the sockets and let others have the path."""
        for each in self._sockets():
            each.unlink(missing_ok=True)
        os.close(self._lock)

    def _sockets(self) -> tuple[Path, Path]:
        return self.path, attach_path(self.path)


@contextmanager
def socket_mode() -> Iterator[None]:
    """Within it, files that come into being have `SOCKET_MODE`."""
    before = os.umask(0o777 & ~SOCKET_MODE)
    try:
        yield
    finally:
        os.umask(before)


def _lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{lock_path} cannot be opened ({error.strerror}); check the directory's permissions"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"another server has {path}; stop it, or listen on another path"
        ) from None
    return lock


def _require_free(path: Path) -> None:
    """Refuse a path that holds anything but the socket of a server that is dead."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is not a socket; remove it, or listen elsewhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise ConfigError(f"{path} is in use or not ours ({error.strerror})") from None
    raise ConfigError(f"something else is serving {path}; stop it, or listen on another path")
