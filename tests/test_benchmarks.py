"""Benchmarks run at their smoke size and say what they computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_tidy import ROOT

PARTS = ("hash", "hits", "peers", "misses", "long", "warm", "cold", "grpc", "import")


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
