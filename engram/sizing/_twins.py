"""Plain Python twins of the kernels: their oracles."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from engram.ram._policy import EVICTED_AT_ONCE, GHOST_WAYS, LOOKS_MAX, PROMOTED_FROM, SMALL_PERCENT
from engram.ram.layout import TOUCHES_MAX

_WORD = 2**64


class MiniatureTwin:
    """One miniature of `engram.sizing._miniature`, over deques and dicts.

    Attributes:
        accesses, misses, reads: of sampled n-grams.
        small, main: hashes in the order in which they will be looked at.
    """

    def __init__(self, level: int, slots: int) -> None:
        self.level, self.slots = level, slots
        self.accesses = self.misses = self.reads = self.evicted = 0
        self.free = slots
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.touches: dict[int, int] = {}
        self.ghosts = [[[0, 0] for _ in range(GHOST_WAYS)] for _ in range(1 + slots // GHOST_WAYS)]

    def lookup(self, hashes: Sequence[int]) -> None:
        """One lookup of n-grams, sampled or not."""
        missed = []
        for hashed in hashes:
            if hashed >= _WORD >> self.level:
                continue
            self.accesses += 1
            if hashed in self.touches:
                self.touches[hashed] = min(TOUCHES_MAX, self.touches[hashed] + 1)
            else:
                self.misses += 1
                missed.append(hashed)
        for hashed in missed:
            if hashed not in self.touches:
                self.reads += 1
                self._admit(hashed)

    def _admit(self, hashed: int) -> None:
        if not self.free:
            real = self.slots << self.level
            at_once = min(EVICTED_AT_ONCE, 1 + real // 64, max(4, real // 32)) >> self.level
            for _ in range(max(1, min(at_once, self.slots))):
                self._evict()
        self.free -= 1
        self.touches[hashed] = 0
        (self.main if self._was_evicted(hashed) else self.small).append(hashed)

    def _evict(self) -> None:
        looks = 0
        while True:
            looks += 1
            if len(self.small) * 100 >= self.slots * SMALL_PERCENT or not self.main:
                hashed = self.small.popleft()
                if self.touches[hashed] >= PROMOTED_FROM and looks <= LOOKS_MAX:
                    self.touches[hashed] = 0
                    self.main.append(hashed)
                    continue
                self._remember(hashed)
            else:
                hashed = self.main.popleft()
                if self.touches[hashed] and looks <= LOOKS_MAX:
                    self.touches[hashed] -= 1
                    self.main.append(hashed)
                    continue
            self.evicted += 1
            del self.touches[hashed]
            self.free += 1
            return

    def _ways(self, hashed: int) -> tuple[list[list[int]], int]:
        return self.ghosts[(hashed >> 8) % len(self.ghosts)], (hashed ^ hashed >> 32) % 2**32

    def _remember(self, hashed: int) -> None:
        ways, fingerprint = self._ways(hashed)
        known = [way for way in ways if way[0] == fingerprint and way[1]]
        way = known[0] if known else min(ways, key=lambda each: each[1])
        way[:] = fingerprint, max(1, self.evicted)

    def _was_evicted(self, hashed: int) -> bool:
        ways, fingerprint = self._ways(hashed)
        for way in ways:
            if way[0] == fingerprint and way[1]:
                age = self.evicted - way[1]
                way[1] = 0
                return age <= self.slots
        return False


class RecencyTwin:
    """One miniature of `engram.sizing._recency`."""

    def __init__(self, level: int, slots: int) -> None:
        self.level, self.slots = level, slots
        self.accesses = self.misses = self.reads = 0
        self.held: OrderedDict[int, None] = OrderedDict()

    def lookup(self, hashes: Sequence[int]) -> None:
        """As `MiniatureTwin.lookup`."""
        missed = []
        for hashed in hashes:
            if hashed >= _WORD >> self.level:
                continue
            self.accesses += 1
            if hashed in self.held:
                self.held.move_to_end(hashed)
            else:
                self.misses += 1
                missed.append(hashed)
        for hashed in missed:
            if hashed not in self.held:
                self.reads += 1
                if len(self.held) == self.slots:
                    self.held.popitem(last=False)
                self.held[hashed] = None
