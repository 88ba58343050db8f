"""The status page: what it draws from, and that a browser shows it, wide and narrow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from scraping import ask
from sidecars import Sidecar

import engram
from engram.service import _history
from engram.service._history import History

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def sidecar(v41_table, tmp_path):
    with Sidecar(tmp_path / "s.sock", {"code": v41_table}, http="127.0.0.1:0") as sidecar:
        yield sidecar


def look_up(sidecar, times):
    with engram.connect(sidecar.address) as table:
        for _ in range(times):
            table.lookup(np.arange(64, dtype=np.int32))


def test_the_past_is_what_metrics_counted(sidecar):
    look_up(sidecar, 3)
    status, body, kind = ask(sidecar.http, "/history")
    assert (status, kind) == (200, "application/json")
    told = json.loads(body)
    readings = told["tables"]["code"]
    assert [reading[0] for reading in readings] == sorted((r[0] for r in readings), reverse=True)
    assert readings[-1][0] == 0.0
    gpu, ram, ssd = (
        now - then for now, then in zip(readings[-1][1:], readings[0][1:], strict=True)
    )
    assert gpu == 0
    assert ram > 0
    assert ssd > 0
    assert ram + ssd == 3 * 64 * 3


def test_readings_are_bounded(monkeypatch, v41_table):
    monkeypatch.setattr(_history, "EVERY_S", 0.001)
    with engram.open(v41_table, ram="1MiB") as table:
        history = History({"code": table._tier})
        try:
            while len(history._readings) < _history.KEPT:
                table.lookup(np.arange(8, dtype=np.int32))
            table.lookup(np.arange(8, dtype=np.int32))
            readings = json.loads(history.page({}).body)["tables"]["code"]
        finally:
            history.stop()
            history.stop()
    assert len(readings) == _history.KEPT + 1
    for tier in (1, 2, 3):
        counts = [reading[tier] for reading in readings]
        assert counts == sorted(counts)


def test_the_page_needs_nothing_from_elsewhere(sidecar):
    status, body, kind = ask(sidecar.http, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", body)
    assert set(re.findall(r"https?://[^\"']+", body)) == {"http://www.w3.org/2000/svg"}


def test_every_metric_of_the_page_exists(sidecar):
    _, body, _ = ask(sidecar.http, "/")
    _, metrics, _ = ask(sidecar.http, "/metrics")
    there = set(re.findall(r"^(\w+?)(?:_bucket)?(?:\{| )", metrics, re.M))
    assert set(re.findall(r'"((?:engram|process)_\w+)"', body)) <= there


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
@pytest.mark.parametrize("width", [380, 1200])
def test_a_browser_shows_it(sidecar, width, tmp_path):
    look_up(sidecar, 5)
    shown = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path}", f"--window-size={width},900"),
            *("--virtual-time-budget=4000", "--dump-dom", f"http://{sidecar.http}/"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    shown = shown[: shown.index("<script>")]
    assert ">ready<" in shown
    assert ">code<" in shown
    assert re.search(r"RAM \d+\.\d %", shown)
    assert ">960<" in shown  # n-grams served
    assert "NaN" not in shown
    assert "undefined" not in shown
