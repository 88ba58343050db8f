"""Rows over gRPC on a Unix socket, taking turns with the same lookup embedded; nothing cached."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from report import Line, Samples

import engram
from engram.bench import checksum, random_tokens
from engram.demo.sidecar import sidecar
from engram.remote import RemoteTier
from engram.table import Table

CLIENTS = 4


def run(path: Path, smoke: bool) -> list[Line]:
    """One row, 64 and 2,048 tokens from one client; 64 tokens from four processes at once."""
    runs = 5 if smoke else 301
    with (
        tempfile.TemporaryDirectory() as folder,
        sidecar(Path(folder) / "engram.sock", {"table": path}, ram="0") as target,
        engram.open(path, ram=0, guard=True) as embedded,
        Table(RemoteTier(target)) as remote,
    ):
        lines = [_one_row(remote, embedded, runs)]
        lines += _tokens(remote, embedded, 64, runs)
        lines += _tokens(remote, embedded, 2048, max(3, runs // 10))
        lines.append(_clients(target, embedded, 64, runs))
    return lines


def _one_row(remote: Table, embedded: Table, runs: int) -> Line:
    layer = remote.layers[0]
    ours, peers = _turns(
        lambda: remote.lookup_rows(layer, [5]), lambda: embedded.lookup_rows(layer, [5]), runs
    )
    return Line(
        "gRPC round trip, one row",
        "us",
        Samples.of(ours),
        peer="embedded",
        peer_measured=Samples.of(peers),
        ratio=_ratio(ours, peers),
        checksum=checksum(remote.lookup_rows(layer, [5]).packed()),
    )


def _tokens(remote: Table, embedded: Table, count: int, runs: int) -> list[Line]:
    tokens = random_tokens(remote.spec, count, seed=4)
    out, out_embedded = remote.lookup(tokens), embedded.lookup(tokens)
    ours, peers = _turns(
        lambda: remote.lookup(tokens, out=out),
        lambda: embedded.lookup(tokens, out=out_embedded),
        runs,
    )
    found = checksum(out.values, out.scales)
    if found != checksum(out_embedded.values, out_embedded.scales):
        raise SystemExit("the sidecar's rows differ from the embedded table's")
    rows = out.values[..., 0].size
    what = f"gRPC lookup, {count:,} tokens, {rows:,} rows"
    lines = [
        Line(
            f"{what}, one client",
            "us",
            Samples.of(ours),
            peer="embedded",
            peer_measured=Samples.of(peers),
            ratio=_ratio(ours, peers),
            checksum=found,
        )
    ]
    if runs >= 100:
        lines.append(Line(f"{what}, one client, p99", "us", _percentile(ours, 99)))
    return lines


def _clients(target: str, embedded: Table, count: int, runs: int) -> Line:
    """Each process looks up tokens of its own; they start together."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, target, str(count), str(runs), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(CLIENTS)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    answers = [json.loads(process.communicate("go\n")[0]) for process in processes]
    for seed, answer in enumerate(answers):
        rows = embedded.lookup(random_tokens(embedded.spec, count, seed))
        if answer["checksum"] != checksum(rows.values, rows.scales):
            raise SystemExit("the sidecar's rows differ from the embedded table's")
    times = [seconds for answer in answers for seconds in answer["times"]]
    p99 = _percentile(times, 99)
    return Line(
        f"gRPC lookup, {count} tokens, {CLIENTS} client processes at once (p99 {p99.median:,.0f})",
        "us",
        Samples.of(times),
        checksum=checksum(*(answer["checksum"] for answer in answers)),
    )


def client(target: str, count: int, runs: int, seed: int) -> None:
    """One of several client processes: says when it is ready, and waits for a line."""
    with Table(RemoteTier(target)) as table:
        tokens = random_tokens(table.spec, count, seed)
        out = table.lookup(tokens)
        print("ready", flush=True)
        sys.stdin.readline()
        times = [_time(lambda: table.lookup(tokens, out=out)) for _ in range(runs)]
    print(json.dumps({"times": times, "checksum": checksum(out.values, out.scales)}))


def _turns(
    ours: Callable[[], object], peer: Callable[[], object], runs: int
) -> tuple[list[float], list[float]]:
    """Microseconds of each call, one after the other."""
    for _ in range(3):
        ours()
        peer()
    pairs = [(_time(ours), _time(peer)) for _ in range(runs)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _time(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def _ratio(ours: list[float], peers: list[float]) -> float:
    return float(np.median(ours) / np.median(peers))


def _percentile(times: list[float], percent: float) -> Samples:
    value = float(np.percentile(times, percent))
    return Samples(value, min(times), max(times), len(times))


if __name__ == "__main__":
    client(sys.argv[1], *map(int, sys.argv[2:]))
