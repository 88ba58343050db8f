"""N-grams that the RAM tier lacks: read cold, beside fio on the same file, and prefetched in time.

Embedded and through a sidecar. Every round drops the page cache, makes sure that it is empty and
asks for n-grams that were never seen, few enough that blocks hardly repeat.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from machine import QueueDepth, fio_rate, microseconds, resident_share
from report import Line, Samples
from texts import Int32s, Text

import engram
from engram.bench import checksum, drop_cache, random_tokens
from engram.demo.sidecar import sidecar
from engram.rows import Rows
from engram.store.layout import BlockLayout
from engram.store.manifest import DATA_FILE
from engram.table import Table

RATE_BAR, STEP_BAR, AHEAD = 0.95, 1.3, 1.2
RAM = "256MiB"
STEP_TOKENS = 64
RESIDENT_MAX, HIT_SHARE_MAX = 0.01, 0.001
_SETTLE_S = 0.5
_DROPS = 10
"""Tries: the kernel keeps pages that somebody just let go of for a moment."""


def run(path: Path, smoke: bool) -> list[Line]:
    """Cold misses of the table at `path`, and prefill of real text that was prefetched."""
    lines = []
    for how in ("embedded", "sidecar"):
        lines += _cold(path, how, smoke)
    for how in ("embedded", "sidecar"):
        lines += _prefill(path, how, smoke)
    return lines


@contextmanager
def _opened(path: Path, how: str) -> Iterator[Table]:
    """The table with an empty RAM tier, and everything compiled that a lookup needs.

    Cold from the start: rows that lie in the page cache are read through the map, and what is
    mapped cannot be dropped.
    """
    drop_cache(path / DATA_FILE)
    with tempfile.TemporaryDirectory() as folder:
        if how == "embedded":
            with engram.open(path, ram=RAM, guard=True) as table:
                _warm_up(table)
                yield table
            return
        socket = Path(folder) / "engram.sock"
        with (
            sidecar(socket, {"table": path}, ram=RAM) as target,
            engram.connect(target) as table,
        ):
            _warm_up(table)
            yield table


def _warm_up(table: Table) -> None:
    tokens = random_tokens(table.spec, STEP_TOKENS, seed=1)
    table.lookup(tokens)
    table.lookup(tokens)
    table.prefetch(random_tokens(table.spec, 1, seed=2))
    time.sleep(_SETTLE_S)  # the memory of the RAM tier is mapped meanwhile


def _cold(path: Path, how: str, smoke: bool) -> list[Line]:
    """Rows a second of 1,024 tokens at once, then steps of 64 tokens."""
    rounds, tokens, steps, seconds = (1, 128, 2, 1) if smoke else (9, 1024, 16, 3)
    measured, hits = _Cold(tokens), 0
    for number in range(rounds):
        measured.rates_of_fio.append(fio_rate(path / DATA_FILE, seconds))
        # Opened anew, because what was read through the map stays in memory until it is closed.
        with _opened(path, how) as table:
            ids = random_tokens(table.spec, tokens + steps * STEP_TOKENS, seed=1000 + number)
            _make_cold(path, smoke)
            measured.at_once(table, path, ids[:tokens])
            _make_cold(path, smoke)
            for at in range(tokens, len(ids), STEP_TOKENS):
                measured.step(table, ids[at : at + STEP_TOKENS])
            # Warming up hits all its n-grams once.
            hits += table.stats()["tiers"][0]["hits"] - STEP_TOKENS * table.spec.num_orders
            asked = rounds * len(ids) * table.spec.num_orders
    if hits > max(2, HIT_SHARE_MAX * asked):
        raise SystemExit(f"{hits} n-grams were in memory before they were asked for")
    return measured.lines(how, smoke)


class _Cold:
    """Figures of all rounds."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.rates_of_fio: list[float] = []
        self._rates: list[float] = []
        self._depths: list[float] = []
        self._repeats: list[float] = []
        self._steps: list[float] = []
        self._limits: list[float] = []
        self._step_sums: list[str] = []
        self._sums: list[str] = []

    def at_once(self, table: Table, path: Path, ids: Int32s) -> None:
        out = _room(table, len(ids))
        with QueueDepth(path / DATA_FILE) as queue:
            spent_us = microseconds(lambda: table.lookup(ids, out=out))
        rows, blocks = _reads(table, ids)
        self._rates.append(blocks / spent_us * 1e6)
        self._repeats.append(1 - blocks / rows)
        self._sums.append(checksum(out.values, out.scales))
        if queue.mean is not None:
            self._depths.append(queue.mean)

    def step(self, table: Table, ids: Int32s) -> None:
        out = _room(table, len(ids))
        self._steps.append(microseconds(lambda: table.lookup(ids, out=out)))
        self._limits.append(out.values[..., 0].size / self.rates_of_fio[-1] * 1e6)
        self._step_sums.append(checksum(out.values, out.scales))

    def lines(self, how: str, smoke: bool) -> list[Line]:
        rate = float(np.median(np.array(self._rates) / np.array(self.rates_of_fio)))
        step = float(np.median(np.array(self._steps) / np.array(self._limits)))
        depth = f"{np.median(self._depths):.0f} under way" if self._depths else "depth unknown"
        return [
            Line(
                f"cold misses, {how}, {self._tokens:,} tokens at once, each block counted once "
                f"({np.median(self._repeats):.1%} repeated; {depth})",
                "rows/s",
                Samples.of(self._rates),
                "fio 4 KiB random, direct, QD64",
                Samples.of(self.rates_of_fio),
                rate,
                f"at least {RATE_BAR} of fio",
                rate >= RATE_BAR,
                checksum(*self._sums),
            ),
            Line(
                f"cold misses, {how}, a step of {STEP_TOKENS} tokens",
                "us",
                Samples.of(self._steps),
                "its rows at fio's rate",
                Samples.of(self._limits),
                step,
                f"at most {STEP_BAR} of that",
                step <= STEP_BAR,
                checksum(*self._step_sums),
            ),
        ]


def _prefill(path: Path, how: str, smoke: bool) -> list[Line]:
    """Misses of a prompt of real text that was prefetched just long enough before."""
    rounds, tokens, seconds = (1, 256, 1) if smoke else (5, 8192, 3)
    misses, waits, lookups, counts, sums = [], [], [], [], []
    for number in range(rounds):
        with _opened(path, how) as table:
            text = Text(2 * tokens * rounds, table.spec.max_order - 1)
            ids = text.piece(2 * tokens * number, tokens).tokens
            rate = fio_rate(path / DATA_FILE, seconds)
            unique = _unique_rows(table, ids)
            out = _room(table, tokens)
            _make_cold(path, smoke)
            before, deadline = _misses(table), time.perf_counter() + AHEAD * unique / rate
            table.prefetch(ids)
            time.sleep(max(0.0, deadline - time.perf_counter()))
            lookups.append(microseconds(lambda t=table, i=ids, o=out: t.lookup(i, out=o)))  # type: ignore[misc]
            misses.append(float(_misses(table) - before))
            waits.append(AHEAD * unique / rate * 1000)
            counts.append(_prefetch_counts(table))
            sums.append(checksum(out.values, out.scales))
    ngrams = tokens * table.spec.num_orders
    return [
        Line(
            f"prefill of {tokens:,} tokens, {how}, prefetched {AHEAD} x (its unique rows / fio's "
            f"rate) = {np.median(waits):,.0f} ms ahead: misses of {ngrams:,} n-grams"
            f"{_summary(counts)}",
            "misses",
            Samples.of(misses),
            bar="none",
            reached=max(misses) == 0,
            checksum=checksum(*sums),
        ),
        Line(f"prefill of {tokens:,} tokens, {how}: the lookup", "us", Samples.of(lookups)),
    ]


def _prefetch_counts(table: Table) -> dict[str, int]:
    """What the RAM tier says of prefetched n-grams, where this process can ask it."""
    tier = table.stats()["tiers"][0]
    names = ("prefetched_useful", "prefetched_late", "prefetched_wasted")
    return {name: tier[name] for name in names if name in tier}


def _summary(counts: list[dict[str, int]]) -> str:
    told = [
        f"{name.removeprefix('prefetched_')} {np.median([each[name] for each in counts]):,.0f}"
        for name in counts[0]
    ]
    return f" (prefetched: {', '.join(told)})" if told else ""


def _make_cold(path: Path, smoke: bool) -> None:
    """Empty the page cache of the table."""
    for _ in range(_DROPS):
        drop_cache(path / DATA_FILE)
        resident = resident_share(path / DATA_FILE)
        if resident <= RESIDENT_MAX or smoke:
            return
        time.sleep(_SETTLE_S)
    raise SystemExit(f"{resident:.1%} of the table stays in the page cache; it is not cold")


def _room(table: Table, tokens: int) -> Rows:
    """Buffers that are mapped already, as those of a model are."""
    out = Rows.empty((tokens, len(table.layers), len(table.columns)), table.row_format)
    for part in (out.values, out.scales):
        if part is not None:
            part.fill(0)
    return out


def _misses(table: Table) -> int:
    return int(table.stats()["tiers"][0]["misses"])


def _reads(table: Table, ids: Int32s) -> tuple[int, int]:
    """Rows of a batch, and the different blocks that they lie in."""
    rows = table.spec.row_ids(ids)
    in_block = BlockLayout(table.row_format.row_bytes).rows_per_block
    blocks = sum(len(np.unique(rows[:, at] // in_block)) for at in range(rows.shape[1]))
    return rows.size, blocks


def _unique_rows(table: Table, ids: Int32s) -> int:
    rows = table.spec.row_ids(ids)
    return sum(len(np.unique(rows[:, at])) for at in range(rows.shape[1]))
