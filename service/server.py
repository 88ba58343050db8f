"""The sidecar process: build, start, run until told to stop, drain.

Nothing is served before every table is open, and every path is claimed before any is opened, so
that a second sidecar fails at once and touches nothing.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from engram._channel import read_pem
from engram.errors import ConfigError, RowIntegrityError
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import add_EngramServicer_to_server
from engram.rows import Rows
from engram.service.config import Config, Limits, TlsConfig
from engram.service.servicer import Servicer
from engram.service.sockets import Address, SocketClaim, require_free_port, socket_mode
from engram.sizes import format_size
from engram.tiers import Ngrams, Selection, Tier

SERVICE = pb.DESCRIPTOR.services_by_name["Engram"].full_name
UNARY_WORKERS = 8
"""Threads for everything but streams, which hold one each."""
STREAMS_OF_A_CLIENT = 3
"""Lookup, Fetch and Prefetch."""
REFLECTION_STREAMS_MAX = UNARY_WORKERS // 2

_SERVING = health_pb2.HealthCheckResponse.SERVING


class Server:
    """A gRPC server of tiers. `start` it, then `stop` it; the tiers stay open.

    Args:
        tiers: by the name under which each is served.
        listen: where; Unix paths must be claimed (`SocketClaim`).
        limits: what clients may ask for.
        tls: for TCP addresses; None for plaintext.

    Raises:
        ConfigError: an address cannot be had.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        listen: tuple[Address, ...],
        limits: Limits | None = None,
        tls: TlsConfig | None = None,
    ) -> None:
        self._limits = limits = limits or Limits()
        self._names = tuple(tiers)
        threads = STREAMS_OF_A_CLIENT * limits.streams + UNARY_WORKERS
        self._grpc = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="engram-grpc"),
            maximum_concurrent_rpcs=threads,
            options=(
                ("grpc.max_receive_message_length", limits.request_bytes),
                ("grpc.max_send_message_length", -1),
                # Else a second server on a TCP port would silently get half of its connections.
                ("grpc.so_reuseport", 0),
            ),
        )
        self.servicer = Servicer(tiers, limits.request_rows, limits.request_bytes, limits.streams)
        add_EngramServicer_to_server(self.servicer, self._grpc)  # type: ignore[no-untyped-call]
        self._health = health.HealthServicer(experimental_non_blocking=True)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            _BoundedReflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)),
            self._grpc,
        )
        self.addresses = tuple(self._bind(address, tls) for address in listen)

    def _bind(self, address: Address, tls: TlsConfig | None) -> Address:
        """Bind one address; with the port that was taken, where any would do."""
        try:
            if address.path is not None:
                with socket_mode():
                    self._grpc.add_insecure_port(f"unix:{address.path}")
                return address
            require_free_port(address)
            place = f"{address.host}:{address.port}"
            if tls is None:
                return Address(None, address.host, self._grpc.add_insecure_port(place))
            port = self._grpc.add_secure_port(place, _credentials(tls))
            return Address(None, address.host, port)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None

    def start(self) -> None:
        """Accept connections; healthy from here on."""
        self._grpc.start()
        for name in ("", SERVICE, *self._names):
            self._health.set(name, _SERVING)

    def stop(self) -> None:
        """Refuse new work, let running requests end within the limit, then end all."""
        self._health.enter_graceful_shutdown()
        self.servicer.drain()
        self._grpc.stop(self._limits.drain_seconds).wait()


class _BoundedReflection(reflection.ReflectionServicer):  # type: ignore[misc]
    """Reflection that can never hold all threads: each stream of it keeps one while it is open."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._room = threading.BoundedSemaphore(REFLECTION_STREAMS_MAX)

    def ServerReflectionInfo(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        if not self._room.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{REFLECTION_STREAMS_MAX} reflection streams are open already; close one",
            )
        try:
            yield from super().ServerReflectionInfo(requests, context)
        finally:
            self._room.release()


def _credentials(tls: TlsConfig) -> Any:
    key, certificate = read_pem(tls.key), read_pem(tls.certificate)
    return grpc.ssl_server_credentials(
        [(key, certificate)], read_pem(tls.client_ca), require_client_auth=True
    )


def warm(tier: Tier) -> None:
    """Read one n-gram and one row, so that no client waits for code to be compiled."""
    selection = Selection.of(tier.spec)
    windows = np.full((1, tier.spec.max_order), tier.spec.blocked_id, np.int32)
    ngrams = Ngrams(windows, np.full(1, tier.spec.max_order, np.int32))
    rows = ngrams.row_count(selection)
    out, places = Rows.empty((rows,), tier.row_format), np.arange(rows, dtype=np.int64)
    try:
        tier.read(ngrams, selection, out, places)
        tier.read_rows(0, places[:1], out, places[:1])
    except RowIntegrityError as error:
        logging.getLogger("engram.service").error("%s", error)


def open_table(path: Path) -> Tier:
    """The SSD tier of the table at `path`, its map guarded against I/O errors."""
    from engram.ssd import SsdTier

    return SsdTier(path, guard=True)


def run(config: Config, open_tier: Callable[[Path], Tier] = open_table) -> int:
    """Serve until SIGTERM or SIGINT; 0 when everything ended in order.

    Args:
        open_tier: makes the tier of a table from its path.

    Raises:
        ConfigError: an address or file cannot be used.
        StoreError: a table cannot be opened.
    """
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    logging.basicConfig(stream=sys.stderr, format="engram: %(levelname)s: %(message)s")
    with ExitStack() as held:
        for address in config.listen:
            if address.path is not None:
                held.callback(SocketClaim(address.path).release)
        tiers: dict[str, Tier] = {}
        for table in config.table:
            tiers[table.name] = tier = open_tier(table.path)
            held.callback(tier.close)
            warm(tier)
        server = Server(tiers, config.listen, config.limits, config.tls)
        held.callback(server.stop)
        server.start()
        _say(f"serving {_listing(tiers)} on {', '.join(map(str, server.addresses))}; ready")
        stopping.wait()
        _say("stopping; running requests are finished first")
    return 0


def _listing(tiers: Mapping[str, Tier]) -> str:
    return ", ".join(
        f"{name} ({tier.spec.family}, {sum(layer.rows for layer in tier.spec.layers):,} rows, "
        f"{format_size(sum(layer.rows for layer in tier.spec.layers) * tier.row_format.row_bytes)})"
        for name, tier in tiers.items()
    )


def _say(line: str) -> None:
    print(f"engram: {line}", file=sys.stderr, flush=True)
