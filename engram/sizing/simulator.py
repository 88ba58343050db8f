"""Miniatures of the RAM tier at many sizes, fed with the n-grams that are asked for.

Why miniatures, and not the stack distances of SHARDS: see `docs/design-decisions.md`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import ConfigError
from engram.ram._policy import GHOST_WAYS
from engram.sizing import _hashes, _miniature, _recency
from engram.sizing.curve import Curve, Sampled
from engram.tiers import Int32s, Int64s

Hashes = npt.NDArray[np.uint64]

SLOTS_MAX = 4096
"""Of one miniature: a curve is then right to about a hundredth."""
SLOTS_MIN = 256
STATE_BYTES_MAX = 4 << 20
LEVEL_MAX = 32
LEVEL_LIVE = 9
"""Coarsest sample while serving: one n-gram in 512."""


def hash_windows(windows: Int32s, min_order: int) -> Hashes:
    """Hashes of all n-grams of some tokens.

    Args:
        windows: int32 `[T, max_order]`, C-contiguous, canonical ids, newest first.
        min_order: smallest order.

    Returns:
        uint64 `[T * orders]`, by token, then order.
    """
    out = np.empty((len(windows), windows.shape[1] + 1 - min_order), np.uint64)
    _hashes.hash_windows(windows, min_order, out)
    return out.reshape(-1)


def hash_ngrams(windows: Int32s, orders: npt.NDArray[np.uint8]) -> Hashes:
    """As `hash_windows`, uint64 `[N]`, for int32 `[N, max_order]` windows of orders uint8 `[N]`."""
    out = np.empty(len(orders), np.uint64)
    _hashes.hash_ngrams(windows, orders, out)
    return out


def sizes_from(
    level: int,
    largest: int,
    *,
    slots_min: int = SLOTS_MIN,
    slots_max: int = SLOTS_MAX,
    bytes_max: int = STATE_BYTES_MAX,
) -> list[tuple[int, int]]:
    """(level, slots) of miniatures of a geometric row of real sizes, finest sample `level`.

    Real sizes are `slots << level`, doubling up to at least `largest` slots or, if that would
    take more than `bytes_max`, as far as that goes.

    Args:
        slots_min, slots_max: of one miniature, powers of two.
    """
    sizes, slots = [], slots_min
    while True:
        sizes.append((level, slots))
        more = level < LEVEL_MAX and state_bytes([*sizes, (level, slots_max)]) <= bytes_max
        if slots << level >= largest or not more:
            return sizes
        if slots < slots_max:
            slots *= 2
        else:
            level += 1


def state_bytes(sizes: list[tuple[int, int]]) -> int:
    """Bytes of the miniatures of `Simulator(sizes)`."""
    most = max(slots for _, slots in sizes)
    ghosts = GHOST_WAYS * (1 + most // GHOST_WAYS)
    each = 8 * most + most + 2 * 4 * (most + 1) + 4 * most + 8 * ghosts + 4 * _index_size(most)
    return len(sizes) * (each + 16 + 8 * _miniature.NUMBERS + 8 * 3 * _miniature.GROUPS)


def _index_size(slots: int) -> int:
    return 1 << (2 * slots - 1).bit_length()


class Simulator:
    """What the RAM tier would hit at several sizes, from a sample of the n-grams asked for.

    Not for several threads at once. The state is a fixed number of bytes (`state_bytes`), however
    long it is fed.

    Args:
        sizes: (level, slots) of each miniature: it stands for `slots << level` slots of a real
            tier and sees the n-grams whose hash begins with `level` zero bits.
        recency: let what was used least recently go, as an exact page cache of single n-grams
            would, in place of the RAM tier's policy.

    Attributes:
        bank: arrays of the kernels.
        level: of the finest sample.

    Raises:
        ConfigError: no sizes, or impossible ones.
    """

    def __init__(self, sizes: list[tuple[int, int]], *, recency: bool = False) -> None:
        if not sizes or any(slots < 1 or not 0 <= level <= LEVEL_MAX for level, slots in sizes):
            raise ConfigError(f"{sizes} are no sizes to simulate; name (level, slots) of each")
        self.bank = _recency_bank(sizes) if recency else _bank(sizes)
        self.level = min(level for level, _ in sizes)
        self._feed = _recency.feed_recency if recency else _miniature.feed
        self._limit = np.uint64((2**64 - 1) >> self.level)
        self.forget_counts()

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self.bank)

    def forget_counts(self) -> None:
        """Begin to count anew; what is held stays."""
        self.bank.counts[:] = 0
        self._accesses = self._tokens = 0

    def feed(self, hashes: Hashes, starts: Int64s | None = None, tokens: int = 0) -> None:
        """Take note of lookups, all their n-grams.

        Args:
            hashes: uint64 `[A]`, in the order of access, repeats included.
            starts: int64 `[B + 1]`, where each lookup begins in `hashes`, then A; one if None.
            tokens: of these lookups.
        """
        bounds = np.array([0, len(hashes)]) if starts is None else starts
        kept, kept_starts = np.empty(len(hashes), np.uint64), np.empty(len(bounds), np.int64)
        count = _miniature.sampled(hashes, bounds, self._limit, kept, kept_starts)
        self.feed_sampled(kept[:count], kept_starts, accesses=len(hashes), tokens=tokens)

    def feed_sampled(self, hashes: Hashes, starts: Int64s, *, accesses: int, tokens: int) -> None:
        """As `feed`, where whoever calls has left out what is not in the sample of `level`.

        Args:
            accesses: n-grams of these lookups, sampled or not.
        """
        self._accesses += accesses
        self._tokens += tokens
        if len(hashes):
            self._feed(self.bank, hashes, starts)

    def curve(self) -> Curve:
        """What was hit since the counts began."""
        sizes = zip(self.bank.levels.tolist(), self.bank.slots.tolist(), strict=True)
        full = self._evicting()
        samples = [
            Sampled(slots << level, level, counts.copy(), bool(evicting))
            for (level, slots), counts, evicting in zip(sizes, self.bank.counts, full, strict=True)
        ]
        return Curve.of(samples, self._accesses, self._tokens)

    def _evicting(self) -> Any:
        if isinstance(self.bank, _recency.RecencyBank):
            return self.bank.used >= self.bank.slots
        return self.bank.numbers[:, _miniature.EVICTED] > 0


def _common(sizes: list[tuple[int, int]]) -> tuple[Int64s, Int64s, int]:
    levels = np.array([level for level, _ in sizes], np.int64)
    slots = np.array([slots for _, slots in sizes], np.int64)
    return levels, slots, int(slots.max())


def _bank(sizes: list[tuple[int, int]]) -> _miniature.Bank:
    levels, slots, most = _common(sizes)
    count = len(sizes)
    bank = _miniature.Bank(
        levels=levels,
        slots=slots,
        keys=np.zeros((count, most), np.uint64),
        touches=np.zeros((count, most), np.uint8),
        small=np.zeros((count, most + 1), np.int32),
        main=np.zeros((count, most + 1), np.int32),
        free=np.tile(np.arange(most, dtype=np.int32), (count, 1)),
        ghosts=np.zeros((count, GHOST_WAYS * (1 + most // GHOST_WAYS), 2), np.uint32),
        index=np.zeros((count, _index_size(most)), np.int32),
        numbers=np.zeros((count, _miniature.NUMBERS), np.int64),
        counts=np.zeros((count, _miniature.GROUPS, 3), np.int64),
    )
    bank.numbers[:, _miniature.FREE_COUNT] = slots
    return bank


def _recency_bank(sizes: list[tuple[int, int]]) -> _recency.RecencyBank:
    levels, slots, most = _common(sizes)
    count = len(sizes)
    return _recency.RecencyBank(
        levels=levels,
        slots=slots,
        keys=np.zeros((count, most), np.uint64),
        newer=np.full((count, most + 1), most, np.int32),
        older=np.full((count, most + 1), most, np.int32),
        index=np.zeros((count, _index_size(most)), np.int32),
        used=np.zeros(count, np.int64),
        counts=np.zeros((count, _miniature.GROUPS, 3), np.int64),
    )
