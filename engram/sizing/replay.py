"""Replaying traces into the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.errors import TraceError
from engram.sizing import _miniature
from engram.sizing.curve import SAMPLES_MIN, Curve
from engram.sizing.simulator import LEVEL_MAX, Hashes, Simulator, sizes_from
from engram.sizing.trace import Trace
from engram.tiers import Int64s

_CHUNK_SAMPLES = 1 << 16
# No lookup waits here, so there may be more miniatures than while serving, and larger ones.
_SLOTS_MIN, _SLOTS_MAX, _BYTES_MAX = 1 << 4, 1 << 15, 64 << 20
Bools = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]


def _silent(_done: int, _total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Outcome:
    """What tiers of given sizes do with a trace, second half.

    Attributes:
        hits: of all accesses, in any of the tiers.
        hbm_hits: in the upper one of two tiers; 0 without.
        reads: n-grams read from below them, for each access.
    """

    hits: float
    hbm_hits: float
    reads: float


def size_for(slots: int, level: int) -> tuple[int, int]:
    """(level, slots) of the miniature for a tier of `slots` slots: the coarsest sample that
    leaves it `_SLOTS_MAX` slots, but none finer than `level`."""
    while slots >> (level + 1) >= _SLOTS_MAX and level < LEVEL_MAX:
        level += 1
    return level, max(1, slots >> level)


def replay(
    trace: Trace,
    sizes: list[tuple[int, int]] | None = None,
    *,
    recency: bool = False,
    progress: Progress = _silent,
) -> Curve:
    """The curve of a trace. Its first half, by tokens, only fills the tiers.

    Args:
        sizes: (level, slots) of miniatures; doubling up to all n-grams asked for if None.
        recency, progress: see `Simulator`; told (samples done, samples in all).

    Raises:
        TraceError: the second half holds too little.
    """
    _require_samples(trace)
    sizes = sizes or sizes_from(
        trace.level,
        trace.accesses,
        slots_min=_SLOTS_MIN,
        slots_max=_SLOTS_MAX,
        bytes_max=_BYTES_MAX,
    )
    simulator = Simulator(sizes, recency=recency)
    hashes, starts, middle = trace.hashes(), trace.starts, _middle(trace)
    for first, last in ((0, middle), (middle, len(trace.lookups))):
        simulator.forget_counts()
        tokens, accesses = _counts_between(trace, first, last)
        at = first
        while at < last:
            until = int(np.searchsorted(starts, starts[at] + _CHUNK_SAMPLES, side="right")) - 1
            until = min(last, max(at + 1, until))
            part = starts[at : until + 1]
            some = hashes[part[0] : part[-1]]
            simulator.feed_sampled(some, part - part[0], accesses=0, tokens=0)
            at = until
            progress(int(part[-1]), len(hashes))
        simulator.feed_sampled(hashes[:0], starts[:1], accesses=accesses, tokens=tokens)
    return simulator.curve()


def replay_tiers(trace: Trace, ram_slots: int, hbm_slots: int = 0) -> Outcome:
    """What a RAM tier does, below an HBM tier if that has slots: what the upper one hits never
    reaches the lower one.

    Raises:
        TraceError: the second half holds too little.
    """
    _require_samples(trace)
    smallest = min(filter(None, (ram_slots, hbm_slots)), default=1)
    level, _ = size_for(smallest, trace.level)
    hashes, starts = trace.hashes(), trace.starts
    kept = hashes <= np.uint64((2**64 - 1) >> level)
    late = np.arange(len(hashes)) >= starts[_middle(trace)]
    _, accesses = _counts_between(trace, _middle(trace), len(trace.lookups))
    expected = accesses / 2**level
    missed = kept
    hbm_misses = expected
    if hbm_slots:
        missed, _ = _misses(hashes, starts, missed, level, hbm_slots)
        hbm_misses = min(expected, float((missed & late).sum()))
    if not ram_slots:
        read = _first_in_lookup(hashes, starts, missed)
    else:
        missed, read = _misses(hashes, starts, missed, level, ram_slots)
    misses = min(expected, float((missed & late).sum()))
    reads = min(expected, float((read & late).sum()))
    return Outcome(1 - misses / expected, 1 - hbm_misses / expected, reads / expected)


def _misses(
    hashes: Hashes, starts: Int64s, asked: Bools, level: int, slots: int
) -> tuple[Bools, Bools]:
    """bool `[S]` twice: of those `asked`, what a tier misses, and what is read for it."""
    which = np.flatnonzero(asked)
    some = hashes[which]
    bounds = np.searchsorted(which, starts)
    simulator = Simulator([(level, max(1, slots >> level))])
    outcome = np.empty(len(some), np.uint8)
    _miniature.run(simulator.bank, 0, some, bounds, outcome)
    missed = np.zeros(len(hashes), np.bool_)
    missed[which[outcome == _miniature.MISS]] = True
    return missed, _first_in_lookup(hashes, starts, missed)


def _first_in_lookup(hashes: Hashes, starts: Int64s, missed: Bools) -> Bools:
    """bool `[S]`: of what was missed, the first of each n-gram in each lookup."""
    which = np.flatnonzero(missed)
    lookup = np.searchsorted(starts, which, side="right")
    keys = np.empty(len(which), [("hash", np.uint64), ("lookup", np.int64)])
    keys["hash"], keys["lookup"] = hashes[which], lookup
    _, firsts = np.unique(keys, return_index=True)
    found = np.zeros(len(hashes), np.bool_)
    found[which[firsts]] = True
    return found


def _middle(trace: Trace) -> int:
    """The first lookup of the second half."""
    return int(np.searchsorted(trace.lookups[:, 1], trace.tokens / 2, side="right"))


def _counts_between(trace: Trace, first: int, last: int) -> tuple[int, int]:
    """(tokens, accesses) of lookups `[first, last)` and of those between that left no sample."""
    ends = trace.lookups[:, 1:]
    before = ends[first - 1] if first else np.zeros(2, np.int64)
    after = (trace.tokens, trace.accesses) if last == len(ends) else ends[last - 1]
    return int(after[0] - before[0]), int(after[1] - before[1])


def _require_samples(trace: Trace) -> None:
    late = len(trace.orders) - int(trace.starts[_middle(trace)])
    if late < SAMPLES_MIN:
        raise TraceError(
            f"the second half of the trace has {late:,} n-grams, which says nothing; record "
            f"{SAMPLES_MIN:,} or more: a longer text, or a finer sample"
        )
