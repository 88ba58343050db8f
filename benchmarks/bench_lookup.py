"""Lookups from a table on disk: warm out of the page cache, cold beside fio."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
from report import Line, Samples

import engram
from engram.bench import checksum, cold_rate, random_tokens
from engram.store.manifest import DATA_FILE

WARM_BAR_NS = 250
COLD_BAR = 0.8


def warm(path: Path, smoke: bool) -> list[Line]:
    """3,072 rows (64 tokens) again and again, check included."""
    runs = 5 if smoke else 301
    lines = []
    for guard, how in ((True, "map under the guard"), (False, "pread")):
        with engram.open(path, ram=0, guard=guard) as table:
            tokens = random_tokens(table.spec, 64, seed=3)
            out = table.lookup(tokens)
            rows = out.values[..., 0].size
            samples = []
            for _ in range(runs):
                began = time.perf_counter()
                table.lookup(tokens, out=out)
                samples.append((time.perf_counter() - began) / rows * 1e9)
            measured = Samples.of(samples)
            lines.append(
                Line(
                    f"warm lookup, {rows:,} rows, {how}, hashing and checks included",
                    "ns/row",
                    measured,
                    bar=f"at most {WARM_BAR_NS} ns" if guard else "",
                    reached=measured.median <= WARM_BAR_NS if guard else None,
                    checksum=checksum(out.values, out.scales),
                )
            )
    return lines


def cold(path: Path, smoke: bool) -> list[Line]:
    """Fresh random n-grams after the caches were dropped, alternating with fio."""
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed: apt install fio")
    # Few enough tokens that hardly two rows share a block: 98,304 rows over a million blocks.
    runs, tokens, seconds = (1, 256, 1) if smoke else (9, 2048, 3)
    lines = []
    for guard, batch in ((True, 64), (True, 1024), (False, 1024)):
        ours, peers, sums = [], [], []
        for run in range(runs):
            rate, found = cold_rate(path, tokens, min(batch, tokens), run, guard=guard)
            ours.append(rate)
            sums.append(found)
            peers.append(_fio(path / DATA_FILE, seconds))
        ratio = float(np.median(np.array(ours) / np.array(peers)))
        judged = batch == 1024
        lines.append(
            Line(
                f"cold lookup, {batch:,} tokens each, {'map' if guard else 'pread'}",
                "rows/s",
                Samples.of(ours),
                "fio 4 KiB random, direct, QD64",
                Samples.of(peers),
                ratio,
                f"at least {COLD_BAR} of fio" if judged else "",
                ratio >= COLD_BAR if judged else None,
                checksum(*sums),
            )
        )
    return lines


def _fio(path: Path, seconds: int) -> float:
    """4 KiB random reads a second, at queue depth 64, past the page cache."""
    command = [
        "fio",
        "--name=random",
        f"--filename={path}",
        "--readonly",
        "--rw=randread",
        "--bs=4k",
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=64",
        "--time_based",
        f"--runtime={seconds}",
        "--output-format=json",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(answer.stdout)["jobs"][0]["read"]["iops"])
