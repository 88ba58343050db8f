"""The miss-ratio curve: what a tier hits by how many n-grams it has room for.

Sampled misses stand for so many misses of so many accesses in all, which are counted exactly. To
divide by the sample's own accesses would be wrong wherever a few hot n-grams, by chance in the
sample or not, make up many of them: hot ones hit anyway (SHARDS-adj: Waldspurger et al., FAST
2015). How much parts of the sample differ says how far chance could move the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.errors import TraceError
from engram.sizing._miniature import ACCESSES, MISSES
from engram.tiers import Int64s

Floats = npt.NDArray[np.float64]

SAMPLES_MIN = 1000
"""Sampled accesses below which nothing is said."""


@dataclass(frozen=True)
class Sampled:
    """What one miniature counted.

    Attributes:
        slots: that a real tier of this size has.
        level: one n-gram in 2 ** level is sampled.
        counts: int64 `[groups, 3]`, see `engram.sizing._miniature.Bank`.
        evicting: whether anything ever had to go.
    """

    slots: int
    level: int
    counts: Int64s
    evicting: bool


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        slots: n-grams it has room for.
        hits: found there, of all accesses: 0 to 1.
        error: standard error of `hits`, by chance of sampling.
        reads: n-grams read from below, for each access; what a lookup repeats is read once.
        samples: accesses it was estimated from.
    """

    slots: int
    hits: float
    error: float
    reads: float
    samples: int


@dataclass(frozen=True)
class Curve:
    """Points of ascending size; between them, straight lines over the logarithm of the size.

    Attributes:
        accesses: n-grams asked for, sampled or not.
        tokens: that asked for them.
        enough: size from which on nothing was evicted, or None: larger ones hit no more.
    """

    points: tuple[Point, ...]
    accesses: int
    tokens: int
    enough: int | None

    @classmethod
    def of(cls, samples: list[Sampled], accesses: int, tokens: int) -> Curve:
        """Estimate each size, and none beyond the first that never evicts.

        Raises:
            TraceError: fewer than `SAMPLES_MIN` accesses were sampled.
        """
        most = max((int(each.counts[:, ACCESSES].sum()) for each in samples), default=0)
        if most < SAMPLES_MIN:
            raise TraceError(
                f"{most:,} sampled n-grams say nothing; use {SAMPLES_MIN:,} or more: a longer "
                "recording, or a finer sample"
            )
        points: list[Point] = []
        enough = None
        for each in sorted(samples, key=lambda each: (each.slots, each.level)):
            points.append(_estimate(each, accesses))
            if not each.evicting:
                enough = each.slots
                break
        return cls(tuple(points), accesses, tokens, enough)

    def hits_at(self, slots: float) -> float:
        """Part of all accesses that a tier of so many slots hits."""
        return self._at(slots, self._hits)

    def reads_at(self, slots: float) -> float:
        """N-grams it has read from below, for each access."""
        reads = np.minimum.accumulate([1.0, *(point.reads for point in self.points)])
        return self._at(slots, reads)

    def slots_for(self, hits: float) -> float | None:
        """The least slots that hit this part of all accesses, or None if no size does."""
        if hits > self._hits[-1]:
            return None
        at = int(np.searchsorted(self._hits, hits))
        if at == 0:
            return 0.0
        low, high = self._hits[at - 1], self._hits[at]
        part = (hits - low) / (high - low)
        sizes = self._log_sizes
        return float(np.exp2(sizes[at - 1] + part * (sizes[at] - sizes[at - 1])) - 1)

    def error_at(self, slots: float) -> float:
        """Standard error of `hits_at`: that of the nearest point."""
        nearest = np.abs(self._log_sizes[1:] - np.log2(slots + 1)).argmin()
        return self.points[int(nearest)].error

    def _at(self, slots: float, values: Floats) -> float:
        return float(np.interp(np.log2(slots + 1), self._log_sizes, values))

    @property
    def _log_sizes(self) -> Floats:
        return np.log2([1.0, *(point.slots + 1.0 for point in self.points)])

    @property
    def _hits(self) -> Floats:
        # More room never hits less, whatever chance says.
        return np.maximum.accumulate([0.0, *(point.hits for point in self.points)])


def _estimate(sampled: Sampled, accesses: int) -> Point:
    expected = accesses / 2.0**sampled.level
    found, misses, reads = sampled.counts.sum(axis=0).tolist()
    miss = min(1.0, misses / expected)
    parts = sampled.counts[:, MISSES].astype(np.float64)
    error = float(np.sqrt(len(parts) * parts.var(ddof=1))) / expected if sampled.level else 0.0
    return Point(sampled.slots, 1.0 - miss, error, min(1.0, reads / expected), found)
