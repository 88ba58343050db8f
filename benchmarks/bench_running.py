"""What being watched costs lookups, and how soon a restarted sidecar hits as before."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from bench_hits import Text, _fill, _room
from machine import microseconds
from report import Line, Samples

import engram
from engram.bench import checksum
from engram.demo.corpus import source_tokens
from engram.demo.sidecar import sidecar, status_page
from engram.table import Table

METRICS_BAR, BACK_BAR_S, BACK_SHARE = 0.98, 60.0, 0.9
SCRAPED_EVERY_S = 1.0
RAM = "1GiB"


def run(path: Path, smoke: bool) -> list[Line]:
    """Both."""
    text = Text(np.concatenate(source_tokens(8_000 if smoke else 60_000)))
    return [_watched(path, text, smoke), *_restarted(path, text, smoke)]


def _watched(path: Path, text: Text, smoke: bool) -> Line:
    """Lookups through two sidecars in turns, one of which serves metrics and is scraped."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sockets = {"off": folder / "off.sock", "on": folder / "on.sock"}
        tables = {}
        for name, socket in sockets.items():
            http = "off" if name == "off" else "127.0.0.1:0"
            target = stack.enter_context(sidecar(socket, {"table": path}, RAM, http))
            tables[name] = stack.enter_context(engram.connect(target))
            _fill(tables[name], text)
        stack.enter_context(_scraped(status_page(sockets["on"]) + "metrics"))
        time.sleep(0 if smoke else 2)
        out, times, sums = _room(tables["on"], 64), {"off": [0.0], "on": [0.0]}, []
        for step in islice(text.steps(64, seed=3), 20 if smoke else 20_000):
            for name, table in tables.items():
                times[name].append(microseconds(partial(table.lookup, *step, out=out)))
        sums.append(checksum(out.values, out.scales))
    found = {name: Samples.of(some[len(some) // 10 :]) for name, some in times.items()}
    ratio = found["off"].median / found["on"].median
    return Line(
        f"hits of 64 tokens, metrics served and scraped every {SCRAPED_EVERY_S:.0f} s",
        "us",
        found["on"],
        "no metrics served",
        found["off"],
        ratio,
        f"at least {METRICS_BAR} of the rate without",
        ratio >= METRICS_BAR,
        checksum(*sums),
    )


@contextmanager
def _scraped(url: str) -> Iterator[None]:
    """Ask for a page again and again meanwhile."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(SCRAPED_EVERY_S):
            with urllib.request.urlopen(url) as answer:
                answer.read()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _restarted(path: Path, text: Text, smoke: bool) -> list[Line]:
    """Seconds from a sidecar's being ready to hits as before, with its list and without."""
    lines = []
    for listed in (True, False):
        seconds, hits = [], []
        for _ in range(1 if smoke else 3):
            with tempfile.TemporaryDirectory() as folder:
                took, before = _back(path, text, Path(folder), listed=listed, smoke=smoke)
            seconds.append(took)
            hits.append(before)
        how = "that reads its list" if listed else "that begins with nothing"
        median = float(np.median(seconds))
        lines.append(
            Line(
                f"a restarted sidecar {how}, until {BACK_SHARE:.0%} of the hits before "
                f"({np.median(hits):.0%}), under decode steps of 64 tokens",
                "s",
                Samples.of(seconds),
                bar=f"at most {BACK_BAR_S:.0f} s" if listed else "",
                reached=median <= BACK_BAR_S if listed else None,
            )
        )
    return lines


def _back(
    path: Path, text: Text, folder: Path, *, listed: bool, smoke: bool
) -> tuple[float, float]:
    """(seconds, part of hits before), the next sidecar being read from by one decoding client."""
    os.environ["ENGRAM_HOTSET_DIRECTORY"] = str(folder)
    try:
        with (
            sidecar(folder / "s.sock", {"table": path}, RAM) as target,
            engram.connect(target) as table,
        ):
            _fill(table, text)
            before = _hits(table, text, 20)
        if not listed:
            (folder / "table.hotset").unlink()
        with sidecar(folder / "s.sock", {"table": path}, RAM) as target:
            began = time.perf_counter()
            with engram.connect(target) as table:
                while time.perf_counter() - began < (5 if smoke else 4 * BACK_BAR_S):
                    if _hits(table, text, 20) >= BACK_SHARE * before:
                        break
        return time.perf_counter() - began, before
    finally:
        del os.environ["ENGRAM_HOTSET_DIRECTORY"]


def _hits(table: Table, text: Text, steps: int) -> float:
    """The part of n-grams found in memory by some decode steps at random places."""
    before = table.stats()["tiers"][0]
    for step in islice(text.steps(64, seed=int(time.monotonic_ns())), steps):
        table.lookup(*step)
    after = table.stats()["tiers"][0]
    hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
    return float(hits / max(1, hits + misses))
