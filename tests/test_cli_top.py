"""`engram top`: rates that are right and never negative, at 80 columns; sidecars come and go."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from attaching import until
from rich.console import Console
from sidecars import Sidecar, remote_table
from test_cli import engram

from engram.cli import top
from engram.cli._readings import Reading, between, quantile, view
from engram.cli._screen import screen
from engram.errors import UnavailableError

WIDTH = 80


def _reading(at, life=1.0, table="t", **served):
    samples = {("process_start_time_seconds", ()): life}
    samples["engram_table_info", (("fingerprint", "f"), ("table", table))] = 1.0
    for tier, count in served.items():
        samples["engram_ngrams_served_total", (("table", table), ("tier", tier))] = count
    return Reading(at, samples)


@contextmanager
def _traffic(address):
    """Ever new n-grams, looked up over gRPC, from the first one answered on."""
    begun, over = threading.Event(), threading.Event()

    def work():
        tokens = np.random.default_rng(1)
        with remote_table(address, "one") as table:
            while not over.wait(0.01):
                table.lookup(tokens.integers(3, 500, 20))
                begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_rates_and_shares_of_an_interval():
    shown = view(_reading(1.0, ram=10, ssd=10), _reading(3.0, ram=16, ssd=12))
    (table,) = shown["tables"]
    assert table["ngrams_per_second"] == {"ram": 3.0, "ssd": 1.0}
    assert table["share"] == {"ram": 0.75, "ssd": 0.25}
    assert (shown["interval_seconds"], shown["restarted"]) == (2.0, False)


@pytest.mark.parametrize("life", [1.0, 2.0])
def test_counters_that_went_back_give_no_negative_rates(life):
    shown = view(_reading(1.0, ram=1000, ssd=5), _reading(2.0, life, ram=4, ssd=6))
    (table,) = shown["tables"]
    assert table["ngrams_per_second"] == {"ram": 4.0, "ssd": 1.0 if life == 1.0 else 6.0}
    assert shown["restarted"] == (life == 2.0)


def test_a_table_that_is_new_or_gone():
    shown = view(_reading(1.0, table="old", ram=7), _reading(2.0, table="new", ram=3))
    assert [(t["name"], t["ngrams_per_second"]) for t in shown["tables"]] == [("new", {"ram": 3.0})]


def test_nothing_counted_has_no_share_and_no_latency():
    same = _reading(1.0, ram=5)
    (table,) = view(same, same)["tables"]
    assert table["share"] == {"ram": None}
    assert set(table["miss_seconds"].values()) == {None}
    assert all(value >= 0 for value in between(same, same).samples.values())


def test_a_quantile_is_the_bound_that_holds_it():
    buckets = {"0.1": 98.0, "1.0": 99.0, "+Inf": 100.0}
    assert [quantile(buckets, part) for part in (0.5, 0.99, 1.0)] == [0.1, 1.0, None]
    assert quantile({}, 0.5) is None


def test_80_columns_hold_great_figures():
    names = ("engram_ngrams_served_total", "engram_prefetch_ngrams_total")
    samples = dict(_reading(1.0, table="n" * 64).samples)
    for tier in ("gpu", "ram", "ssd"):
        samples[names[0], (("table", "n" * 64), ("tier", tier))] = 999.94e6
        samples["engram_tier_used_bytes", (("table", "n" * 64), ("tier", tier))] = 1023.9 * 2**30
    for result in ("useful", "late", "wasted"):
        samples[names[1], (("result", result), ("table", "n" * 64))] = 999.94e6
    samples["engram_ssd_read_bytes_total", (("table", "n" * 64),)] = 1023.9 * 2**20
    samples["engram_ssd_read_duration_seconds_sum", (("table", "n" * 64),)] = 999.94
    samples["engram_ssd_read_duration_seconds_count", (("table", "n" * 64),)] = 999.94e6
    samples["engram_evictions_total", (("reason", "once"), ("table", "n" * 64))] = 999.94e6
    samples["engram_tier_capacity_bytes", (("tier", "ram"),)] = 1023.9 * 2**30
    out = io.StringIO()
    shown = view(_reading(0.0, table="n" * 64), Reading(1.0, samples))
    Console(file=out, width=WIDTH).print(screen("h:1", shown))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    for figure in ("999.9M", "1023.9MiB", "1023.9GiB", "33.3"):
        assert figure in out.getvalue(), out.getvalue()
    assert out.getvalue().count("…") == 3, "only the table's name is cut"


def test_once_for_people_and_programs(tmp_path):
    with Sidecar(tmp_path / "s.sock", {"one": {}}, http="127.0.0.1:0") as running:
        with _traffic(running.address):
            done = engram("top", running.http, "--once", "--json", "--interval", "0.5")
            assert (done.returncode, done.stderr) == (0, "")
            narrow = {**os.environ, "COLUMNS": str(WIDTH)}
            seen = engram("top", running.http, "--once", "--interval", "0.5", env=narrow)
        shown = json.loads(done.stdout)
        (table,) = shown["tables"]
        assert 0.5 <= shown["interval_seconds"] < 5
        assert table["ngrams_per_second"]["ssd"] > 0
        assert sum(table["share"].values()) == pytest.approx(1)
        assert table["miss_seconds"]["mean"] > 0
        assert (shown["clients"], shown["restarted"]) == (1, False)
        assert shown["tiers"]["ram"]["capacity_bytes"] > 3 << 20
        lines = seen.stdout.splitlines()
        assert (seen.returncode, seen.stderr) == (0, "")
        assert max(map(len, lines)) <= WIDTH
        assert any(line.startswith("one ") and line.endswith("serving") for line in lines)
    gone = engram("top", running.http, "--once")
    assert (gone.returncode, gone.stderr.count("\n"), gone.stdout) == (1, 1, "")
    for wrong in (["off", "--once"], ["nowhere"], [running.http, "--json"]):
        done = engram("top", *wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_a_sidecar_that_dies_and_comes_back(tmp_path, free_port):
    sidecar = Sidecar(tmp_path / "s.sock", {"one": {}}, http=f"127.0.0.1:{free_port}")
    try:
        seen = top.views(sidecar.http, 0.1)
        assert next(seen) == (None, "")
        with remote_table(sidecar.address, "one") as table:
            table.lookup(np.arange(20))
        before, trouble = next(seen)
        assert (before["tables"][0]["ngrams_per_second"]["ssd"] > 0, trouble) == (True, "")
        sidecar.kill()
        shown, trouble = next(seen)
        assert shown is before
        assert "no sidecar answers HTTP" in trouble
        time.sleep(0.02)  # lives are told apart by when they began, to a hundredth of a second
        sidecar.start()
        shown, trouble = next(seen)
        assert (shown["restarted"], trouble) == (True, "")
        assert shown["tables"][0]["ngrams_per_second"]["ssd"] == 0
        assert next(seen)[0]["restarted"] is False
    finally:
        sidecar.kill()


def test_a_sidecar_that_hangs_is_shown_as_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(top, "_PATIENCE_S", 0.3)
    with Sidecar(tmp_path / "s.sock", {"one": {}}, http="127.0.0.1:0") as running:
        running.process.send_signal(signal.SIGSTOP)
        try:
            shown, trouble = next(top.views(running.http, 0.1))
            assert shown is None
            assert "timed out" in trouble
            with pytest.raises(UnavailableError):
                top._show_once(running.http, 0.1, False)
        finally:
            running.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupt_ends_it_in_order(free_port, terminal):
    """With nobody to watch: what is gone is shown until somebody comes."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "engram", "top", f"127.0.0.1:{free_port}", "--interval", "0.1"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    try:
        while b"no sidecar answers" not in seen:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        until(lambda: os.read(ours, 65536) == b"" if not terminal else _drained(ours))
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        os.close(ours)


def _drained(descriptor):
    try:
        return os.read(descriptor, 65536) == b""
    except OSError:
        return True  # a terminal whose other end is closed
