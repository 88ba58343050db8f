"""Probes and metrics over HTTP: states of a life, and clients that are slow, many or hostile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import grpc
import numpy as np
import pytest
from attach_hosts import process
from attaching import until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scraping import OPEN_METRICS, ask
from sidecars import Sidecar, environment, remote_table

from engram.errors import ConfigError, StoreError
from engram.service import _http
from engram.service._http import Answer, HttpServer
from engram.service.sockets import bind_http, parse_http

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server():
    """Its place, and a page that waits until it is let go."""
    go = threading.Event()

    def slow(headers):
        go.wait(30)
        return Answer(HTTPStatus.OK, b"slow\n")

    def closed(headers):
        raise StoreError("the table is closed")

    def broken(headers):
        raise ZeroDivisionError

    def heard(headers):
        return Answer(HTTPStatus.OK, headers["x-said"].encode())

    pages = {"/slow": slow, "/closed": closed, "/broken": broken, "/heard": heard}
    listener = bind_http(parse_http("127.0.0.1:0"))
    place = f"127.0.0.1:{listener.getsockname()[1]}"
    server = HttpServer(listener, pages)
    yield place, go
    go.set()
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(place, "/heard")


def _raw(place, sent, timeout_s=10.0):
    """All that comes for these bytes."""
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port)), timeout_s) as client:
        client.sendall(sent)
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_pages_and_what_is_none(server):
    place, _ = server
    assert ask(place, "/heard", **{"X-Said": "hello"})[:2] == (200, "hello")
    assert ask(place, "/heard?a=b", **{"x-said": "x"})[:2] == (200, "x")
    assert ask(place, "/heard", "HEAD", **{"X-Said": "hello"})[:2] == (200, "")
    assert ask(place, "/other")[0] == 404
    assert ask(place, "/heard", "POST")[0] == 405
    assert ask(place, "/closed")[:2] == (503, "the table is closed\n")
    assert ask(place, "/broken")[0] == ask(place, "/heard")[0] == 500


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /heard\r\n\r\n", 400),
        (b"GET  /heard HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /heard HTTP/1.1\r\nX: " + 9000 * b"x" + b"\r\n\r\n", 431),
        (b"GET /\xff\x00 HTTP/1.1\r\n\r\n", 404),
    ],
)
def test_malformed_requests_are_refused(server, sent, status):
    place, _ = server
    assert _raw(place, sent).startswith(b"HTTP/1.1 %d " % status)


def test_a_client_that_leaves_or_never_ends_is_dropped(server, monkeypatch):
    place, _ = server
    monkeypatch.setattr(_http, "CONNECTION_S", 0.3)
    began = time.monotonic()
    assert _raw(place, b"") == b""
    assert _raw(place, b"GET /heard HTT") == b""
    assert 0.5 < time.monotonic() - began < 5
    host, _, port = place.rpartition(":")
    for _ in range(20):
        socket.create_connection((host, int(port))).close()
    assert ask(place, "/other")[0] == 404


def test_a_slow_page_delays_no_other(server):
    place, go = server
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(place, "/slow")[1])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert ask(place, "/heard", timeout_s=2.0, **{"X-Said": "y"})[1] == "y"
    assert answers == []
    go.set()
    for thread in threads:
        thread.join()
    assert answers == 3 * ["slow\n"]


def test_silent_connections_make_room_and_cost_no_threads(server):
    place, _ = server
    host, _, port = place.rpartition(":")
    ask(place, "/heard", **{"X-Said": "y"})
    threads = threading.active_count()
    held = []
    for n in range(3 * _http.CONNECTIONS_MAX):
        held.append(socket.create_connection((host, int(port))))
        held[-1].sendall(b"GET /he" if n % 2 else b"")
        if n % 40 == 0:
            assert ask(place, "/heard", timeout_s=2.0, **{"X-Said": "y"})[1] == "y"
    assert threading.active_count() == threads
    # The oldest were hung up on.
    held[0].settimeout(5)
    with suppress(ConnectionResetError):
        assert held[0].recv(1) == b""
    for each in held:
        each.close()


def _check(stub, service):
    try:
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
    except grpc.RpcError as error:
        return error.code()


def test_a_drain_is_told_at_once_and_everywhere(tmp_path):
    tables = {"one": {"delay_s": 1.5}, "two": {"seed": 2}}
    with Sidecar(tmp_path / "s.sock", tables, http="127.0.0.1:0") as running:
        place = running.http
        channel = grpc.insecure_channel(running.address)
        stub = health_pb2_grpc.HealthStub(channel)
        services = ("", "engram.v1.Engram", "one", "two")
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=each)) for each in services]
        assert [next(watch).status for watch in watches] == 4 * [SERVING]
        assert ask(place, "/readyz")[:2] == (200, "ready\n")
        with remote_table(running.address, "one") as table:
            answers = []
            lookup = threading.Thread(target=lambda: answers.append(table.lookup(np.arange(9))))
            lookup.start()
            until(lambda: len(table._tier._link.now.stream._pending))
            time.sleep(0.2)
            running.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            # Each is seen by whoever looks 100 ms later.
            time.sleep(0.1 - (time.monotonic() - began))
            assert [_check(stub, each) for each in services] == 4 * [NOT_SERVING]
            assert [next(watch).status for watch in watches] == 4 * [NOT_SERVING]
            assert ask(place, "/readyz")[:2] == (503, "draining\n")
            assert ask(place, "/livez")[0] == 200
            metrics = ask(place, "/metrics", Accept=OPEN_METRICS)[1]
            assert 'engram_table_state{state="draining",table="two"} 1.0' in metrics
            assert not answers, "it was drained before anybody could look"
            lookup.join()
            assert len(answers) == 1
        assert running.process.wait(timeout=20) == 0
        # Watchers did not hold it up for the whole time that a drain may take.
        assert time.monotonic() - began < 10
        channel.close()


_STARTING = """
import sys
from pathlib import Path
from engram.service.config import load_config
from engram.service.server import open_table, run

def open_late(path):
    sys.stdin.readline()
    return open_table(path)

listen, table, http = sys.argv[1:]
run(load_config(listen=[listen], tables=[table], ram="1MiB", http=http), open_late)
"""


def test_a_sidecar_that_starts_is_alive_and_not_ready(tmp_path, qwen_table):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    starting = process(_STARTING, f"unix:{tmp_path}/s", f"t={qwen_table}", place)
    try:
        until(lambda: _answers(place))
        assert ask(place, "/livez")[:2] == (200, "alive\n")
        for path in ("/readyz", "/metrics"):
            assert ask(place, path)[:2] == (503, "starting\n")
        starting.stdin.write("\n")
        starting.stdin.flush()
        until(lambda: ask(place, "/readyz")[0] == 200)
        assert ask(place, "/metrics")[0] == 200
    finally:
        starting.kill()
        starting.communicate()


def _answers(place):
    try:
        return ask(place, "/livez")[0]
    except OSError:
        return 0


def _serve(folder, *arguments):
    command = [sys.executable, "-m", "engram", "serve", "--listen", f"unix:{folder}/s.sock"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=folder,
    )


def test_a_taken_port_is_refused_before_anything_is_touched(tmp_path, qwen_table):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        serving = _serve(tmp_path, "--table", f"t={qwen_table}", "--http", place)
        _, said = serving.communicate(timeout=60)
    assert serving.returncode == 2
    (line,) = said.splitlines()
    assert f"port {place.rpartition(':')[2]} on 127.0.0.1 is in use" in line
    assert "--http" in line
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_is_not_this_one_is_refused():
    with pytest.raises(ConfigError, match=r"cannot listen on tcp:192\.0\.2\.1:1234"):
        bind_http(parse_http("192.0.2.1:1234"))


def test_without_http_nothing_listens(tmp_path):
    with Sidecar(tmp_path / "s.sock", {"one": {}}) as running:
        assert running.http == ""
        opened = {os.readlink(each) for each in _descriptors(running.process.pid)}
        tcp = Path(f"/proc/{running.process.pid}/net/tcp").read_text().splitlines()[1:]
        listening = {f"socket:[{line.split()[9]}]" for line in tcp if line.split()[3] == "0A"}
        assert not opened & listening


def _descriptors(pid):
    return list(Path(f"/proc/{pid}/fd").iterdir())
