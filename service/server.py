"""The sidecar process: build, start, run until told to stop, drain.

Nothing is served before every table is open, and every path is claimed before any is opened, so
that a second sidecar fails at once and touches nothing.
"""

from __future__ import annotations

import logging
import resource
import secrets
import signal
import sys
import threading
import time
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
from engram.ram.limits import DEFAULT_SHARE, check_budget, memory_allowed
from engram.ram.tier import RamTier, ram_tiers
from engram.rows import Rows
from engram.service._endpoint import Endpoint
from engram.service._fetch import Leases
from engram.service._handshake import OpenFiles
from engram.service._history import History
from engram.service._notify import Notifier, Watchdog
from engram.service._self_check import answers, place_to_ask
from engram.service._traffic import Traffic
from engram.service.attach import AttachServer
from engram.service.config import Config, Limits, TlsConfig
from engram.service.hot_set import HotSets
from engram.service.servicer import Servicer
from engram.service.sockets import Address, SocketClaim, require_free_port, socket_mode
from engram.sizes import format_size
from engram.ssd import SsdTier
from engram.tiers import Ngrams, Selection, Tier

SERVICE = pb.DESCRIPTOR.services_by_name["Engram"].full_name
UNARY_WORKERS = 8
"""Threads for everything but streams, which hold one each."""
STREAMS_OF_A_CLIENT = 3
"""Lookup, Fetch and Prefetch."""
REFLECTION_STREAMS_MAX = UNARY_WORKERS // 2
UNARY_S = 1.0
"""Time that calls which are no streams get at the end; watchers of the health do not hold it up."""

_SERVING = health_pb2.HealthCheckResponse.SERVING


class Server:
    """A gRPC server of tiers. `start` it, then `stop` it; the tiers stay open.

    Args:
        tiers: by the name under which each is served.
        listen: where; Unix paths must be claimed (`SocketClaim`).
        limits: what clients may ask for.
        tls: for TCP addresses; None for plaintext.
        leases: of clients that attached; None where none can.
        boot_id: of the tiers' shared memory; made when None.
        traffic: where requests are counted; made when None.

    Raises:
        ConfigError: an address cannot be had.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        listen: tuple[Address, ...],
        limits: Limits | None = None,
        tls: TlsConfig | None = None,
        *,
        leases: Leases | None = None,
        boot_id: str | None = None,
        traffic: Traffic | None = None,
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
        self.servicer = Servicer(
            tiers,
            limits.request_rows,
            limits.request_bytes,
            limits.streams,
            leases=leases,
            boot_id=boot_id,
            traffic=traffic,
        )
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
        deadline = time.monotonic() + self._limits.drain_seconds
        self._health.enter_graceful_shutdown()
        self.servicer.drain()
        # gRPC takes no calls once it stops, and probes are to be told that this is no failure.
        self.servicer.wait_until_idle(self._limits.drain_seconds)
        self._grpc.stop(max(0.0, min(UNARY_S, deadline - time.monotonic()))).wait()


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
        if isinstance(tier, RamTier):
            tier.misses.warm(ngrams)
        tier.read_rows(0, places[:1], out, places[:1])
    except RowIntegrityError as error:
        logging.getLogger("engram.service").error("%s", error)


def open_table(path: Path) -> Tier:
    """The SSD tier of the table at `path`, its map guarded against I/O errors."""
    return SsdTier(path, guard=True)


def run(config: Config, open_tier: Callable[[Path], Tier] = open_table) -> int:
    """Serve until SIGTERM or SIGINT; 0 when everything ended in order.

    Args:
        open_tier: makes the tier of a table from its path.

    Raises:
        ConfigError: an address or file cannot be used, or there is not enough memory.
        StoreError: a table cannot be opened.
    """
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    logging.basicConfig(stream=sys.stderr, format="engram: %(levelname)s: %(message)s")
    notifier = Notifier()
    with ExitStack() as held:
        _allow_many_files()
        endpoint = Endpoint(config.http)
        held.callback(endpoint.stop)
        for path in config.sockets:
            held.callback(SocketClaim(path).release)
        served = _start(config, open_tier, endpoint, notifier, held)
        _say(f"serving {served}; ready")
        notifier.ready(served)
        stopping.wait()
        notifier.stopping()
        _say("stopping; running requests are finished first")
    return 0


def _ram(config: Config, opened: Mapping[str, Tier]) -> tuple[int, str]:
    """Bytes of the RAM tier, and words for them.

    Raises:
        ConfigError: this machine cannot give so much.
    """
    if config.ram is not None:
        ram, why = config.ram, ""
    else:
        allowed, tables = memory_allowed(), sum(map(_table_bytes, opened.values()))
        ram, why = allowed // DEFAULT_SHARE, f", a quarter of the {format_size(allowed)} allowed"
        if tables < ram:
            ram, why = tables, ", as large as the tables"
    check_budget(ram)
    return ram, f"RAM tier {format_size(ram)}{why}"


def _open_tables(
    config: Config,
    boot_id: bytes,
    open_tier: Callable[[Path], Tier],
    held: ExitStack,
) -> tuple[dict[str, RamTier], dict[str, OpenFiles], str]:
    """RAM tiers above all tables, how to open the files of those that have one, and the RAM tier
    in words."""
    opened: dict[str, Tier] = {}
    for table in config.table:
        opened[table.name] = open_tier(table.path)
        held.callback(opened[table.name].close)
    ram, said = _ram(config, opened)
    tiers = ram_tiers(opened, ram, shared=bool(config.sockets), boot_id=boot_id)
    for tier in tiers.values():
        held.callback(tier.close)
        warm(tier)
    files = {name: tier.files for name, tier in opened.items() if isinstance(tier, SsdTier)}
    return tiers, files, said


def _start(
    config: Config,
    open_tier: Callable[[Path], Tier],
    endpoint: Endpoint,
    notifier: Notifier,
    held: ExitStack,
) -> str:
    """Open and serve everything; what must be stopped and closed is `held`. What is served."""
    boot_id = secrets.token_bytes(16)
    tiers, files, said = _open_tables(config, boot_id, open_tier, held)
    hot_sets = None if config.hotset is None else HotSets(tiers, config.hotset)
    traffic = Traffic(tiers)
    attach = AttachServer(
        config.sockets,
        tiers,
        files,
        uids=config.attach_uids,
        leases_max=config.limits.leases,
        traffic=traffic,
    )
    held.callback(attach.stop)
    server = Server(
        tiers,
        config.listen,
        config.limits,
        config.tls,
        leases=attach.lease if config.sockets else None,
        boot_id=boot_id.hex(),
        traffic=traffic,
    )
    # Stopped after the server, whose end may take longer than a period.
    watchdog = _watchdog(config, notifier, attach, server)
    held.callback(watchdog.stop)
    held.callback(server.stop)
    held.callback(attach.drain)
    held.callback(endpoint.drain)
    if endpoint.url:
        # Only here, because it takes a while and not everybody wants it.
        from engram.service.metrics import Metrics

        endpoint.ready(Metrics(tiers, attach, server.servicer).text, History(tiers))
        said += f"; status and metrics at {endpoint.url}"
    server.start()
    attach.start()
    watchdog.start()
    if hot_sets is not None:
        hot_sets.start()
        held.callback(hot_sets.stop)
    return f"{_listing(tiers)} on {', '.join(map(str, server.addresses))}; {said}"


def _watchdog(config: Config, notifier: Notifier, attach: AttachServer, server: Server) -> Watchdog:
    """What tells that new clients get an answer.

    Raises:
        ConfigError: it is wanted, but there is no way to find out.
    """
    target = ""
    if notifier.period_s:
        target = place_to_ask(server.addresses, encrypted=config.tls is not None)

    def check(timeout_s: float) -> bool:
        return attach.serving and answers(target, timeout_s)

    return Watchdog(notifier, check)


def _allow_many_files() -> None:
    """Every slab of the RAM tier is a descriptor, and every client some: take all there may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listing(tiers: Mapping[str, Tier]) -> str:
    return ", ".join(
        f"{name} ({tier.spec.family}, {_table_bytes(tier) // tier.row_format.row_bytes:,} rows, "
        f"{format_size(_table_bytes(tier))})"
        for name, tier in tiers.items()
    )


def _table_bytes(tier: Tier) -> int:
    return sum(layer.rows for layer in tier.spec.layers) * tier.row_format.row_bytes


def _say(line: str) -> None:
    print(f"engram: {line}", file=sys.stderr, flush=True)
