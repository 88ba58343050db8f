"""Benchmarks run at their smoke size and say what they computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_tidy import ROOT

PARTS = (
    *("hash", "hits", "peers", "misses", "long", "sizing", "running"),
    *("warm", "cold", "grpc", "import"),
)


@pytest.mark.parametrize("part", PARTS)
def test_smoke(part, tmp_path):
    if part in ("cold", "misses") and shutil.which("fio") is None:
        pytest.skip("fio, the peer of cold lookups, is not installed here")
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--smoke", "--out", str(tmp_path / "out"), part],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["lines"]
    assert any(line["checksum"] for line in results["lines"])
    assert results["environment"]["commit"]


@pytest.mark.parametrize(
    "command",
    [["bench_gather.py", "--how", "embedded"], ["bench_gather.py"], ["bench_decode.py"]],
    ids=" ".join,
)
def test_gpu_smoke(command, tmp_path):
    """On the CPU, with the twin of what a GPU does."""
    name, *options = command
    done = subprocess.run(
        [
            *(sys.executable, f"benchmarks/gpu/{name}", "--smoke", "--device", "cpu", *options),
            *("--place", str(tmp_path), "--out", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["lines"]
    assert results["environment"]["torch"]


def test_the_picture_is_of_the_results():
    folder = ROOT / "benchmarks/results/h200_2026-11-22_decode"
    drawn = subprocess.run(
        [sys.executable, "benchmarks/gpu/draw_decode.py", str(folder), "/dev/stdout"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert drawn.stdout == (ROOT / "docs/decode.svg").read_text()
