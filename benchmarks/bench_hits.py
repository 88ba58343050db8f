"""Hits of the RAM tier: embedded and through a sidecar's arena, beside plain copies by torch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import microseconds
from report import Line, Samples
from turns import in_turns

import engram
from engram.bench import checksum
from engram.demo.corpus import source_tokens
from engram.demo.sidecar import sidecar
from engram.ram import _crew
from engram.rows import Rows
from engram.table import Table

RAM = "1GiB"
TEXT_TOKENS = 120_000
HITS_BAR, ALONE_BAR, ONE_BAR_US, PROBE_BAR_US, SIDECAR_BAR = 0.8, 0.6, 15, 15, 1.1
BUNDLES_PER_TOKEN, BUNDLE_BYTES = 3, 16 * 264
SIZES = (1, 64, 2048)
_STEPS_BYTES = 1 << 29
"""Of the n-grams of all different steps: more than caches hold."""


@dataclass(frozen=True)
class Text:
    """Real text whose n-grams are all in memory."""

    ids: np.ndarray

    def steps(self, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Arguments of lookups without end: decode steps of `count` sequences at random places,
        or a chunk of one from 512 tokens on."""
        rng = np.random.default_rng(seed)
        while True:
            if count < 512:
                places = rng.integers(3, len(self.ids), count)
                history = np.stack([self.ids[places - back] for back in (3, 2, 1)], axis=1)
                yield self.ids[places], np.arange(count + 1, dtype=np.int32), history
            else:
                at = int(rng.integers(3, len(self.ids) - count))
                starts = np.array([0, count], np.int32)
                yield self.ids[at : at + count], starts, self.ids[None, at - 3 : at]


def run(path: Path, smoke: bool) -> list[Line]:
    """Alternate all in one process, so that all see the same machine."""
    text = Text(np.concatenate(source_tokens(8_000 if smoke else TEXT_TOKENS)))
    runs = 5 if smoke else 1001
    with (
        tempfile.TemporaryDirectory() as folder,
        sidecar(Path(folder) / "engram.sock", {"table": path}, RAM) as target,
        engram.open(path, ram=RAM, guard=True) as embedded,
        engram.connect(target) as attached,
    ):
        for table in (embedded, attached):
            _fill(table, text)
        lines = _first_after_attach(target, text, smoke)
        _wait_until_populated(attached, text)
        flat = torch.zeros((2**30 // BUNDLE_BYTES, BUNDLE_BYTES), dtype=torch.uint8)
        flat.fill_(1)
        for count in SIZES:
            lines += _hits(embedded, attached, flat, text, count, max(5, runs * 64 // (63 + count)))
        lines.append(_probe(embedded, text, runs))
    return lines


def _fill(table: Table, text: Text) -> None:
    """Until a whole pass misses nothing."""
    for _ in range(4):
        before = table.stats()["tiers"][0]["misses"]
        for at in range(3, len(text.ids), 2048):
            table.lookup(text.ids[at : at + 2048], None, text.ids[at - 3 : at])
        if table.stats()["tiers"][0]["misses"] == before:
            return
    raise SystemExit("the RAM tier does not keep the benchmark's text")


def _first_after_attach(target: str, text: Text, smoke: bool) -> list[Line]:
    """The first lookups of clients that just attached, to pages not mapped yet."""
    times = []
    for number in range(3 if smoke else 15):
        with engram.connect(target) as table:
            times.append(_first(table, text, number))
    return [Line("first lookup after attaching, 64 tokens, hits", "us", Samples.of(times))]


def _first(table: Table, text: Text, number: int) -> float:
    step, out = next(text.steps(64, number)), _room(table, 64)
    return microseconds(lambda: table.lookup(*step, out=out))


def _wait_until_populated(table: Table, text: Text) -> None:
    """Until every page that lookups read is mapped."""
    for at in range(3, len(text.ids), 2048):
        table.lookup(text.ids[at : at + 2048], None, text.ids[at - 3 : at])
    time.sleep(1)


def _room(table: Table, count: int) -> Rows:
    rows = Rows.empty((count, len(table.layers), len(table.columns)), table.row_format)
    for part in (rows.values, rows.scales):
        if part is not None:
            part.fill(0)
    return rows


def _hits(
    embedded: Table, attached: Table, flat: Any, text: Text, count: int, runs: int
) -> list[Line]:
    out = _room(embedded, count)
    # Made before, because making them takes a core's caches for itself.
    some = list(
        islice(
            text.steps(count, seed=count),
            max(8, _STEPS_BYTES // (count * BUNDLE_BYTES * BUNDLES_PER_TOKEN)),
        )
    )
    steps = cycle(some)
    rng = np.random.default_rng(count)
    places = cycle(
        torch.from_numpy(rng.integers(0, len(flat), BUNDLES_PER_TOKEN * count)) for _ in some
    )
    copied = torch.zeros((BUNDLES_PER_TOKEN * count, BUNDLE_BYTES), dtype=torch.uint8)

    def lookup(table: Table) -> float:
        step = next(steps)
        return microseconds(lambda: table.lookup(*step, out=out))

    def alone() -> float:
        with _no_helpers():
            return lookup(embedded)

    def copy() -> float:
        chosen = next(places)
        return microseconds(lambda: torch.index_select(flat, 0, chosen, out=copied))

    def copy_alone() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return copy()
        finally:
            torch.set_num_threads(threads)

    calls = {
        "embedded": lambda: lookup(embedded),
        "copy": copy,
        "attached": lambda: lookup(attached),
        "alone": alone,
        "copy_alone": copy_alone,
    }
    missed = [table.stats()["tiers"][0]["misses"] for table in (embedded, attached)]
    times = in_turns(calls, runs)
    step = next(steps)
    found = _sum(embedded.lookup(*step, out=out))
    if found != _sum(attached.lookup(*step, out=out)):
        raise SystemExit("the sidecar's rows differ from the embedded table's")
    if missed != [table.stats()["tiers"][0]["misses"] for table in (embedded, attached)]:
        raise SystemExit("a lookup missed")
    return _lines(count, times, found)


def _lines(count: int, times: dict[str, list[float]], found: str) -> list[Line]:
    def beside(which: str, how: str, copy: str, on: str, bar: float) -> Line:
        ratio = _ratio(times[copy], times[which])
        median = float(np.median(times[which]))
        within, judged = count == 1 and which == "embedded", count == 64
        return Line(
            f"hits, {count:,} tokens, {how}",
            "us",
            Samples.of(times[which]),
            f"torch.index_select of as many bundles, places known, {on}",
            Samples.of(times[copy]),
            ratio,
            f"at most {ONE_BAR_US} us" if within else f"at least {bar} of it" if judged else "",
            median <= ONE_BAR_US if within else ratio >= bar if judged else None,
            found,
        )

    ratio = 1 / _ratio(times["embedded"], times["attached"])
    return [
        beside("embedded", "embedded", "copy", "on all cores", HITS_BAR),
        beside("alone", "embedded, one thread", "copy", "on all cores", ALONE_BAR),
        beside("alone", "embedded, one thread", "copy_alone", "one thread", ALONE_BAR),
        Line(
            f"hits, {count:,} tokens, through the sidecar's arena",
            "us",
            Samples.of(times["attached"]),
            "embedded",
            Samples.of(times["embedded"]),
            ratio,
            f"at most {SIDECAR_BAR} of embedded",
            ratio <= SIDECAR_BAR,
            found,
        ),
    ]


def _probe(embedded: Table, text: Text, runs: int) -> Line:
    tier: Any = embedded._tier
    steps = text.steps(64, seed=5)
    times, found = [], ""
    for _ in range(runs):
        windows = embedded.spec.windows(*next(steps)).reshape(64, -1)
        began = time.perf_counter()
        slots = tier.probe(windows)
        times.append((time.perf_counter() - began) * 1e6)
        found = checksum(slots)
    measured = Samples.of(times)
    return Line(
        "probe only: windows of 64 tokens to slots",
        "us",
        measured,
        bar=f"at most {PROBE_BAR_US} us",
        reached=measured.median <= PROBE_BAR_US,
        checksum=found,
    )


@contextmanager
def _no_helpers() -> Iterator[None]:
    before = _crew.WORTHWHILE_BYTES
    _crew.WORTHWHILE_BYTES = 1 << 62
    try:
        yield
    finally:
        _crew.WORTHWHILE_BYTES = before


def _ratio(above: list[float], below: list[float]) -> float:
    return float(np.median(above) / np.median(below))


def _sum(rows: Rows) -> str:
    return checksum(rows.values, rows.scales)
