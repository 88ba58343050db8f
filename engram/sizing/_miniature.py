# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: small copies of the RAM tier's policy, each run on a sample of the n-grams.

A tier of C slots treats a random part R of all n-grams much as a tier of C * R slots treats them
alone (miniature simulation: Waldspurger et al., ATC 2017). The sample is spatial: an n-gram is in
it by its hash, with all its accesses or with none (SHARDS: Waldspurger et al., FAST 2015). Level L
samples the n-grams whose hash begins with L zero bits, so deeper samples are parts of the others,
and whether a hash is in one is a single compare.

The policy is `engram.ram._policy`'s, with its numbers, as one reader without prefetches meets it.
Slots that an eviction frees at once are scaled, too; at level 0 a miniature *is* the tier.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engram._jit import kernel
from engram.ram._policy import (
    EVICTED_AT_ONCE,
    GHOST_WAYS,
    LOOKS_MAX,
    PROMOTED_FROM,
    SMALL_PERCENT,
)
from engram.ram.layout import TOUCHES_MAX

GROUPS = 64
"""Parts of a sample that are counted apart, to see by how much chance could move the result."""
_GROUP_SHIFT = 20
SMALL_HEAD, SMALL_COUNT, MAIN_HEAD, MAIN_COUNT, FREE_COUNT, EVICTED = range(6)
NUMBERS = 6
ACCESSES, MISSES, READS = range(3)
UNSAMPLED, HIT, MISS = range(3)
_U64 = np.uint64


class Bank(NamedTuple):
    """M miniatures of at most m slots.

    Attributes:
        levels, slots: int64 `[M]`, of each miniature.
        keys: uint64 `[M, m]`, hash of the n-gram in each slot.
        touches: uint8 `[M, m]`, hits that count for it.
        small, main: int32 `[M, m + 1]`, rings of slots.
        free: int32 `[M, m]`, stacks.
        ghosts: uint32 `[M, g, 2]`, fingerprint and time of eviction, in sets of `GHOST_WAYS`.
        index: int32 `[M, 2^k]`, slot + 1 by hash, open addressing; 0 is free.
        numbers: int64 `[M, NUMBERS]`.
        counts: int64 `[M, GROUPS, 3]`: accesses, misses and reads (misses told apart from their
            repeats in a lookup) of each part of the sample.
    """

    levels: Any
    slots: Any
    keys: Any
    touches: Any
    small: Any
    main: Any
    free: Any
    ghosts: Any
    index: Any
    numbers: Any
    counts: Any


@kernel
def limit_of(level):
    """Greatest hash in the sample."""
    return ~_U64(0) >> _U64(level)


@kernel
def group_of(hashed):
    return np.int64((hashed >> _U64(_GROUP_SHIFT)) % _U64(GROUPS))


@kernel
def find(index, keys, hashed):
    """Slot of a hash, or -1."""
    mask = index.size - 1
    at = np.int64(hashed & _U64(mask))
    while index[at]:
        if keys[index[at] - 1] == hashed:
            return np.int64(index[at] - 1)
        at = (at + 1) & mask
    return np.int64(-1)


@kernel
def enter(index, keys, slot):
    """Put a slot into the index by its key."""
    mask = index.size - 1
    at = np.int64(keys[slot] & _U64(mask))
    while index[at]:
        at = (at + 1) & mask
    index[at] = slot + 1


@kernel
def leave(index, keys, slot):
    """Take a slot out of the index, and move up what is found only past its place."""
    mask = index.size - 1
    at = np.int64(keys[slot] & _U64(mask))
    while index[at] != slot + 1:
        at = (at + 1) & mask
    later = (at + 1) & mask
    while index[later]:
        home = np.int64(keys[index[later] - 1] & _U64(mask))
        if ((later - home) & mask) >= ((later - at) & mask):
            index[at] = index[later]
            at = later
        later = (later + 1) & mask
    index[at] = 0


@kernel
def _push(ring, numbers, head, count, slot):
    ring[(numbers[head] + numbers[count]) % ring.size] = slot
    numbers[count] += 1


@kernel
def _pop(ring, numbers, head, count):
    slot = np.int64(ring[numbers[head]])
    numbers[head] = (numbers[head] + 1) % ring.size
    numbers[count] -= 1
    return slot


@kernel
def _print_of(hashed):
    # All halves of it, because a sample's hashes all begin alike.
    return np.uint32(hashed) ^ np.uint32(hashed >> _U64(32))


@kernel
def _ghost_way(ghosts, sets, hashed):
    """(index of the n-gram in its set or -1, index of the oldest of the set)."""
    fingerprint = _print_of(hashed)
    first = np.int64((hashed >> _U64(8)) % _U64(sets)) * GHOST_WAYS
    oldest = first
    for way in range(first, first + GHOST_WAYS):
        if ghosts[way, 0] == fingerprint and ghosts[way, 1]:
            return way, oldest
        if ghosts[way, 1] < ghosts[oldest, 1]:
            oldest = way
    return np.int64(-1), oldest


@kernel
def _remember(bank, i, hashed):
    ghosts, sets = bank.ghosts[i], 1 + bank.slots[i] // GHOST_WAYS
    way, oldest = _ghost_way(ghosts, sets, hashed)
    way = oldest if way < 0 else way
    ghosts[way, 0] = _print_of(hashed)
    ghosts[way, 1] = np.uint32(max(1, bank.numbers[i, EVICTED] & 0xFFFFFFFF))


@kernel
def _was_evicted(bank, i, hashed):
    ghosts, sets = bank.ghosts[i], 1 + bank.slots[i] // GHOST_WAYS
    way, _ = _ghost_way(ghosts, sets, hashed)
    if way < 0:
        return False
    age = np.uint32(np.uint32(bank.numbers[i, EVICTED] & 0xFFFFFFFF) - ghosts[way, 1])
    ghosts[way, 1] = np.uint32(0)
    return np.int64(age) <= bank.slots[i]


@kernel
def _evict(bank, i):
    """Free one slot; there is one in use."""
    numbers, touches = bank.numbers[i], bank.touches[i]
    looks = 0
    while True:
        looks += 1
        if numbers[SMALL_COUNT] * 100 >= bank.slots[i] * SMALL_PERCENT or numbers[MAIN_COUNT] == 0:
            slot = _pop(bank.small[i], numbers, SMALL_HEAD, SMALL_COUNT)
            if touches[slot] >= PROMOTED_FROM and looks <= LOOKS_MAX:
                touches[slot] = 0
                _push(bank.main[i], numbers, MAIN_HEAD, MAIN_COUNT, slot)
                continue
            _remember(bank, i, bank.keys[i, slot])
        else:
            slot = _pop(bank.main[i], numbers, MAIN_HEAD, MAIN_COUNT)
            if touches[slot] > 0 and looks <= LOOKS_MAX:
                touches[slot] -= 1
                _push(bank.main[i], numbers, MAIN_HEAD, MAIN_COUNT, slot)
                continue
        numbers[EVICTED] += 1
        leave(bank.index[i], bank.keys[i], slot)
        bank.free[i, numbers[FREE_COUNT]] = slot
        numbers[FREE_COUNT] += 1
        return


@kernel
def _admit(bank, i, hashed):
    numbers, slots = bank.numbers[i], bank.slots[i]
    if numbers[FREE_COUNT] == 0:
        real = slots << bank.levels[i]
        # What the tier evicts at once waits in limbo, which has room for a part of its slots.
        at_once = min(EVICTED_AT_ONCE, 1 + real // 64, max(4, real // 32)) >> bank.levels[i]
        for _ in range(max(1, min(at_once, slots))):
            _evict(bank, i)
    numbers[FREE_COUNT] -= 1
    slot = np.int64(bank.free[i, numbers[FREE_COUNT]])
    bank.keys[i, slot] = hashed
    bank.touches[i, slot] = 0
    enter(bank.index[i], bank.keys[i], slot)
    if _was_evicted(bank, i, hashed):
        _push(bank.main[i], numbers, MAIN_HEAD, MAIN_COUNT, slot)
    else:
        _push(bank.small[i], numbers, SMALL_HEAD, SMALL_COUNT, slot)


@kernel
def run(bank, i, hashes, starts, outcome):
    """Run miniature `i`: each lookup is looked up as a whole, then what it missed comes in.

    A repeat of a miss is told by its being there by then. So what a lookup repeats is read twice
    here, unlike in the tier, if the lookup missed more than the small queue holds meanwhile.

    Args:
        hashes: uint64 `[A]`, n-grams of all lookups in order, sampled or not.
        starts: int64 `[B + 1]`, where each lookup begins in `hashes`, then A.
        outcome: uint8 `[A]`, set to `UNSAMPLED`, `HIT` or `MISS`.
    """
    limit, index, keys, touches = (
        limit_of(bank.levels[i]),
        bank.index[i],
        bank.keys[i],
        bank.touches[i],
    )
    counts = bank.counts[i]
    for lookup in range(starts.size - 1):
        missed = False
        for a in range(starts[lookup], starts[lookup + 1]):
            hashed = hashes[a]
            outcome[a] = UNSAMPLED
            if hashed > limit:
                continue
            group = group_of(hashed)
            counts[group, ACCESSES] += 1
            slot = find(index, keys, hashed)
            if slot >= 0:
                outcome[a] = HIT
                touches[slot] = min(touches[slot] + 1, TOUCHES_MAX)
            else:
                outcome[a] = MISS
                counts[group, MISSES] += 1
                missed = True
        if missed:
            for a in range(starts[lookup], starts[lookup + 1]):
                if outcome[a] == MISS and find(index, keys, hashes[a]) < 0:
                    counts[group_of(hashes[a]), READS] += 1
                    _admit(bank, i, hashes[a])


@kernel
def feed(bank, hashes, starts):
    """Run all miniatures."""
    outcome = np.empty(hashes.size, np.uint8)
    for i in range(bank.slots.size):
        run(bank, i, hashes, starts, outcome)


@kernel
def sampled(hashes, starts, limit, kept, kept_starts):
    """Keep hashes of at most `limit`: `kept` as long as `hashes`, `kept_starts` as `starts`.

    Returns:
        How many were kept.
    """
    count = 0
    for lookup in range(starts.size - 1):
        kept_starts[lookup] = count
        for a in range(starts[lookup], starts[lookup + 1]):
            if hashes[a] <= limit:
                kept[count] = hashes[a]
                count += 1
    kept_starts[starts.size - 1] = count
    return count
