"""Measurements of one table on this machine, each with a checksum of what it computed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from engram.rows import Rows
from engram.spec import NgramSpec
from engram.store.manifest import DATA_FILE
from engram.table import Table, open


@dataclass(frozen=True)
class Figure:
    """Median, least and greatest of several runs, in `unit`."""

    what: str
    unit: str
    median: float
    least: float
    greatest: float
    runs: int
    checksum: str

    @classmethod
    def of(cls, what: str, unit: str, samples: list[float], checksum: str) -> Figure:
        return cls(
            what,
            unit,
            float(np.median(samples)),
            min(samples),
            max(samples),
            len(samples),
            checksum,
        )

    def __str__(self) -> str:
        return (
            f"{self.median:,.1f} {self.unit} ({self.least:,.1f} to {self.greatest:,.1f}, "
            f"{self.runs} runs)"
        )


def random_tokens(spec: NgramSpec, count: int, seed: int) -> np.ndarray:
    """int32 `[count]`: uniform token ids, so nearly every n-gram is new."""
    return np.random.default_rng(seed).integers(0, spec.vocab_size, count, dtype=np.int32)


def checksum(*parts: np.ndarray | str | None) -> str:
    """xxh3-64 of arrays' bytes or of other checksums."""
    state = xxhash.xxh3_64()
    for part in parts:
        if isinstance(part, str):
            state.update(part.encode())
        elif part is not None:
            state.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def time_calls(call: Callable[[int], Any], runs: int, warm_up: int = 3) -> list[float]:
    """Seconds of each of `runs` calls; the argument numbers them, warm-up calls are negative."""
    for number in range(-warm_up, 0):
        call(number)
    seconds = []
    for number in range(runs):
        began = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - began)
    return seconds


def hash_cost(spec: NgramSpec, tokens: int = 8192, runs: int = 21) -> Figure:
    """Windows and all row ids of a batch of random tokens, in ns a token."""
    ids = random_tokens(spec, tokens, seed=1)
    seconds = time_calls(lambda _: spec.row_ids(ids), runs)
    return Figure.of(
        f"row ids of {tokens:,} tokens",
        "ns/token",
        [s / tokens * 1e9 for s in seconds],
        checksum(spec.row_ids(ids)),
    )


def repeated_lookup(table: Table, tokens: int, what: str, runs: int = 101) -> Figure:
    """Lookups of the same random n-grams, in us a lookup: out of the RAM tier or, where it holds
    nothing, out of the page cache."""
    ids = random_tokens(table.spec, tokens, seed=2)
    out = table.lookup(ids)
    seconds = time_calls(lambda _: table.lookup(ids, out=out), runs, warm_up=10)
    return Figure.of(
        f"{what}, {tokens:,} tokens",
        "us",
        [s * 1e6 for s in seconds],
        checksum(out.values, out.scales),
    )


def cold_rate(path: Path, tokens: int, batch: int, run: int, *, guard: bool) -> tuple[float, str]:
    """Rows a second of lookups of fresh random n-grams, the file dropped from the page cache.

    Args:
        tokens: tokens in all, `batch` in each lookup.
        run: numbers the run: each reads other n-grams.

    Returns:
        The rate, and a checksum of the rows.
    """
    with open(path, ram=0, guard=guard) as table:
        ids = random_tokens(table.spec, tokens, seed=1000 + run)
        rows_per_token = len(table.layers) * len(table.columns)
        out = Rows.empty((batch, len(table.layers), len(table.columns)), table.row_format)
        table.lookup(ids[:1])
        drop_cache(path / DATA_FILE)
        state = xxhash.xxh3_64()
        seconds = 0.0
        for at in range(0, tokens - batch + 1, batch):
            began = time.perf_counter()
            table.lookup(ids[at : at + batch], out=out)
            seconds += time.perf_counter() - began
            state.update(out.values.data)
    return tokens // batch * batch * rows_per_token / seconds, state.hexdigest()


def drop_cache(path: Path) -> None:
    """Drop a file's pages from the page cache, where no process has them mapped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
