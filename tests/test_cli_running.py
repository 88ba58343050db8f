"""`engram stats` and `engram health`, against sidecars that run, drain and are gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import suppress

import numpy as np
import pytest
from attaching import until
from sidecars import Sidecar, remote_table
from test_cli import engram

from engram.errors import UnavailableError


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "s.sock"
    tables = {"one": {}, "two": {"seed": 2}}
    with Sidecar(place, tables, http="127.0.0.1:0", listen=["tcp:127.0.0.1:0"]) as running:
        yield running


def _told(done):
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_stats_for_people_and_programs(sidecar):
    with remote_table(sidecar.address, "one") as table:
        table.lookup(np.arange(20))
    shown = engram("stats", sidecar.http)
    assert (shown.returncode, shown.stderr) == (0, "")
    (line,) = [line for line in shown.stdout.splitlines() if "served" in line and "ssd" in line][:1]
    assert line.split() == ["engram_ngrams_served_total", "table", "one,", "tier", "ssd", "40"]
    listed = engram("stats", sidecar.http, "--json")
    figures = json.loads(listed.stdout)
    wanted = {"table": "one", "tier": "ssd"}
    served = [f for f in figures if f["name"] == "engram_ngrams_served_total"]
    assert [f["value"] for f in served if f["labels"] == wanted] == [40]
    assert {"engram_build_info", "process_open_fds"} <= {figure["name"] for figure in figures}
    environment = {**os.environ, "ENGRAM_HTTP": sidecar.http}
    assert engram("stats", env=environment).returncode == 0


def test_stats_of_nobody(sidecar):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{silent.getsockname()[1]}"
        status, said = _told(engram("stats", gone))
    assert (status, f"no sidecar answers HTTP at {gone}" in said) == (1, True)
    for target, word in (("off", "--http"), (sidecar.address, "--http"), ("nowhere", "HOST:PORT")):
        status, said = _told(engram("stats", target))
        assert (status, word in said) == (2, True)
    place = sidecar.lines[0].partition("tcp:")[2].partition(";")[0]
    status, said = _told(engram("stats", place))
    assert (status, "is not engram" in said) == (1, True)


def test_health_of_all_and_of_one(sidecar):
    done = engram("health", sidecar.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["sidecar SERVING", "one SERVING", "two SERVING"]
    done = engram("health", sidecar.address, "--table", "two", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"two": "SERVING"})
    status, said = _told(engram("health", sidecar.address, "--table", "three"))
    assert (status, "no table 'three' is served" in said) == (1, True)
    tcp = sidecar.lines[0].partition("tcp:")[2].partition(";")[0]
    listening = {**os.environ, "ENGRAM_LISTEN": f"tcp:{tcp},unix:/nowhere"}
    assert engram("health", env=listening).returncode == 0


def test_health_of_nobody(tmp_path):
    status, said = _told(engram("health", f"unix:{tmp_path}/s"))
    assert (status, "is 'engram serve' running?" in said) == (1, True)
    assert _told(engram("health", "nowhere"))[0] == 2


def test_health_of_one_that_drains(tmp_path):
    with (
        Sidecar(tmp_path / "s.sock", {"one": {"delay_s": 12.0}}) as running,
        remote_table(running.address, timeout_s=60) as table,
    ):

        def work():
            with suppress(UnavailableError):
                table.lookup(np.arange(4))

        lookup = threading.Thread(target=work)
        lookup.start()
        until(lambda: len(table._tier._link.now.stream._pending))
        running.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in running.lines[-1])
        done = engram("health", running.address)
        assert done.stdout.splitlines() == ["sidecar NOT_SERVING", "one NOT_SERVING"]
        assert done.returncode == 1
        running.kill()
        lookup.join()
