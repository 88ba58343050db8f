"""A sidecar process of the demo's own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engram.errors import UnavailableError

_START_SECONDS_MAX = 60.0


@contextmanager
def sidecar(
    socket: Path, tables: Mapping[str, Path], ram: str = "64MiB", http: str = "off"
) -> Iterator[str]:
    """Run `engram serve` over `tables` on a Unix socket; ends with SIGTERM.

    Args:
        ram: size of the RAM tier.
        http: where it serves its status page; see `status_page`.

    Yields the address to connect to.

    Raises:
        UnavailableError: it did not start, with its last words; or did not stop cleanly.
    """
    command = [sys.executable, "-m", "engram", "serve", "--listen", f"unix:{socket}"]
    command += ["--ram", ram, "--http", http]
    for name, path in tables.items():
        command += ["--table", f"{name}={path}"]
    log = _log_of(socket)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_serving(process, f"unix:{socket}", log)
        yield f"unix:{socket}"
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    if status:
        raise UnavailableError(f"the sidecar ended with status {status}: {_last_line(log)}")


def status_page(socket: Path) -> str:
    """Where the sidecar on this socket serves its status page, as it said when it started."""
    said = re.search(r"http://\S+/", _log_of(socket).read_text())
    return said.group() if said else ""


def _log_of(socket: Path) -> Path:
    return socket.with_suffix(".log")


def _wait_until_serving(process: subprocess.Popen[bytes], target: str, log: Path) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    deadline = time.monotonic() + _START_SECONDS_MAX
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2)
            except grpc.RpcError:
                time.sleep(0.05)
                continue
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
    raise UnavailableError(f"the sidecar did not start: {_last_line(log)}")


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
