# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: which n-grams stay, which go, and when their slots may be used again.

Only one thread at a time runs these kernels on one arena (`engram.ram.cache` holds a lock).

Policy: S3-FIFO (Yang et al., SOSP 2023). New n-grams enter a small queue; those hit again before
they reach its head move to the main queue, the others leave only a fingerprint behind (the
ghost). A ghost's n-gram that comes back enters the main queue, which goes round like a clock.
Hits are seen late: readers count them in bytes of their own, which are collected when a slot
comes to the head of its queue.

A slot's way: free -> small or main -> limbo -> free. In limbo its bytes stay as they are until no
reader can still be reading them in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engram._jit import fence_full, kernel, load_acquire, load_u8, store_release, store_u8
from engram.ram._directory import head_hash, head_of, unlink
from engram.ram.layout import PAGE_BYTES, TOUCHES_MAX, WORD_EPOCH

UNUSABLE, FREE, SMALL, MAIN, LIMBO = range(5)
"""Where a slot is; unusable ones have no memory yet."""
PREFETCHED = 0x10
"""Set in a slot's state from its prefetch to its first hit, which is no reuse."""
_WAITED = 0x20
"""Set when a prefetched slot came to the small queue's head unused, and went round once more."""
GHOST_WAYS = 4
_PLACE = 0x0F
SMALL_PERCENT = 25
PROMOTED_FROM = 2
EVICTED_AT_ONCE = 64
LOOKS_MAX = 4096
"""Slots looked at for one eviction; the next goes, hit or not. Else readers that hit everything
all the time could keep the writer going round for ever."""
_U64 = np.uint64

# Fields of `numbers`, the writer's own state beside its arrays.
(
    SMALL_HEAD,
    SMALL_COUNT,
    MAIN_HEAD,
    MAIN_COUNT,
    FREE_COUNT,
    LIMBO_HEAD,
    LIMBO_COUNT,
    LIMBO_MAX,
    EPOCH,
    EVICTED,
) = range(10)
NUMBERS = 10

# Fields of `counts`, of each table: its slots now, and what happened since the start. An n-gram
# that left unused was prefetched for nothing; one that left once came and was not asked for again,
# or too late; one that left cold had been.
HELD, ADMITTED, REFUSED, USEFUL, LEFT_UNUSED, LEFT_ONCE, LEFT_COLD = range(7)
COUNTS = 7


class Writer(NamedTuple):
    """Everything the writer knows beyond what readers see.

    Attributes:
        directories: int64, address of each table's directory.
        readers: int64, address of each reader's memory.
        state: uint8 `[slots]`, where each slot is, and flags.
        hits: uint8 `[slots]`, hits collected so far, of those in the main queue.
        small, main: int32 `[slots + 1]`, rings of slots.
        limbo: int32 `[LIMBO_MAX + 1]`, a ring of slots.
        limbo_epochs: uint64, like `limbo`: the epoch in which each of its slots went there.
        ghosts: uint32 `[ghosts, 2]`, fingerprint and time of eviction, in sets of `GHOST_WAYS`.
        free: int32 `[slots]`, a stack.
        numbers: int64 `[NUMBERS]`.
        owners: int32 `[slots]`, table of what each used slot holds.
        counts: int64 `[tables, COUNTS]`.
    """

    directories: Any
    readers: Any
    state: Any
    hits: Any
    small: Any
    main: Any
    limbo: Any
    limbo_epochs: Any
    ghosts: Any
    free: Any
    numbers: Any
    owners: Any
    counts: Any


@kernel
def _collect_touches(readers, slot, hits):
    """Hits of a slot since it was last looked at, at most `TOUCHES_MAX`."""
    total = np.int64(hits)
    for reader in readers:
        touched = reader + PAGE_BYTES + slot
        count = load_u8(touched)
        if count:
            # A hit that comes in between is lost: the policy does without.
            store_u8(touched, np.uint8(0))
            total += min(np.int64(count), TOUCHES_MAX)
    return min(total, np.int64(TOUCHES_MAX))


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
def _ghost_way(ghosts, hashed, fingerprint):
    """(index of the fingerprint in its set or -1, index of the oldest of the set)."""
    sets = ghosts.shape[0] // GHOST_WAYS
    first = np.int64((hashed >> _U64(8)) % _U64(sets)) * GHOST_WAYS
    oldest = first
    for way in range(first, first + GHOST_WAYS):
        if ghosts[way, 0] == fingerprint and ghosts[way, 1]:
            return way, oldest
        if ghosts[way, 1] < ghosts[oldest, 1]:
            oldest = way
    return np.int64(-1), oldest


@kernel
def _remember(ghosts, numbers, hashed):
    fingerprint = np.uint32(hashed >> _U64(32))
    way, oldest = _ghost_way(ghosts, hashed, fingerprint)
    way = oldest if way < 0 else way
    ghosts[way, 0] = fingerprint
    ghosts[way, 1] = np.uint32(max(1, numbers[EVICTED] & 0xFFFFFFFF))


@kernel
def _was_evicted(ghosts, numbers, hashed, slots):
    """Whether the n-gram left the small queue not long ago; forgets it."""
    way, _ = _ghost_way(ghosts, hashed, np.uint32(hashed >> _U64(32)))
    if way < 0:
        return False
    age = np.uint32(np.uint32(numbers[EVICTED] & 0xFFFFFFFF) - ghosts[way, 1])
    ghosts[way, 1] = np.uint32(0)
    return np.int64(age) <= slots


@kernel
def _settle_prefetch(writer, slot, seen):
    """Count a prefetched slot that was useful; its hits beyond the one it was fetched for."""
    state = writer.state
    if not state[slot] & PREFETCHED or not seen:
        return seen
    writer.counts[writer.owners[slot], USEFUL] += 1
    state[slot] &= _PLACE
    return max(np.int64(0), seen - 1)


@kernel
def _move_on(writer, slot, seen):
    """Whether the slot at the small queue's head stays, in that queue or in the main one."""
    state, numbers = writer.state, writer.numbers
    if state[slot] & PREFETCHED and not seen and not state[slot] & _WAITED:
        state[slot] |= _WAITED
        _push(writer.small, numbers, SMALL_HEAD, SMALL_COUNT, slot)
        return True
    if _settle_prefetch(writer, slot, seen) < PROMOTED_FROM:
        return False
    writer.hits[slot] = 0
    state[slot] = MAIN
    _push(writer.main, numbers, MAIN_HEAD, MAIN_COUNT, slot)
    return True


@kernel
def _evict(view, writer):
    """Move one slot to limbo; False if there is none."""
    numbers, state = writer.numbers, writer.state
    looks = 0
    while numbers[SMALL_COUNT] + numbers[MAIN_COUNT] > 0:
        looks += 1
        if numbers[SMALL_COUNT] * 100 >= view.slots * SMALL_PERCENT or numbers[MAIN_COUNT] == 0:
            slot = _pop(writer.small, numbers, SMALL_HEAD, SMALL_COUNT)
            seen = _collect_touches(writer.readers, slot, writer.hits[slot])
            if looks > LOOKS_MAX:
                seen = np.int64(0)
            if _move_on(writer, slot, seen):
                continue
            _remember(writer.ghosts, numbers, head_hash(view.seed, head_of(view, slot)))
            why = LEFT_ONCE
        else:
            slot = _pop(writer.main, numbers, MAIN_HEAD, MAIN_COUNT)
            seen = _collect_touches(writer.readers, slot, writer.hits[slot])
            _settle_prefetch(writer, slot, seen)
            if seen > 0 and looks <= LOOKS_MAX:
                writer.hits[slot] = seen - 1
                _push(writer.main, numbers, MAIN_HEAD, MAIN_COUNT, slot)
                continue
            why = LEFT_COLD
        numbers[EVICTED] += 1
        counts = writer.counts[writer.owners[slot]]
        counts[LEFT_UNUSED if state[slot] & PREFETCHED else why] += 1
        counts[HELD] -= 1
        unlink(view, writer.directories, slot)
        state[slot] = LIMBO
        at = (numbers[LIMBO_HEAD] + numbers[LIMBO_COUNT]) % writer.limbo.size
        writer.limbo[at] = slot
        writer.limbo_epochs[at] = _U64(numbers[EPOCH])
        numbers[LIMBO_COUNT] += 1
        return True
    return False


@kernel
def oldest_epoch(readers, none):
    """Smallest epoch that a reader holds, or `none`."""
    oldest = _U64(none)
    for reader in readers:
        held = load_acquire(reader + WORD_EPOCH * 8)
        if held and held < oldest:
            oldest = held
    return oldest


@kernel
def _reclaim(writer):
    """Begin a new epoch, and free the slots of limbo that no reader can still hold."""
    numbers = writer.numbers
    numbers[EPOCH] += 1
    for directory in writer.directories:
        store_release(directory + WORD_EPOCH * 8, _U64(numbers[EPOCH]))
    # Against the reader's fence between publishing its epoch and probing: either it sees that
    # these slots are unlinked, or this sees its epoch.
    fence_full()
    oldest = oldest_epoch(writer.readers, numbers[EPOCH])
    while numbers[LIMBO_COUNT] and writer.limbo_epochs[numbers[LIMBO_HEAD]] < oldest:
        slot = _pop(writer.limbo, numbers, LIMBO_HEAD, LIMBO_COUNT)
        writer.state[slot] = FREE
        writer.free[numbers[FREE_COUNT]] = slot
        numbers[FREE_COUNT] += 1


@kernel
def free_slot(view, writer):
    """A slot to write to, after evicting a few if needed; -1 if there is none."""
    numbers = writer.numbers
    if numbers[FREE_COUNT] == 0:
        for _ in range(min(EVICTED_AT_ONCE, 1 + view.slots // 64)):
            if numbers[LIMBO_COUNT] >= numbers[LIMBO_MAX] or not _evict(view, writer):
                break
        _reclaim(writer)
    if numbers[FREE_COUNT] == 0:
        return np.int64(-1)
    return np.int64(writer.free[numbers[FREE_COUNT] - 1])


@kernel
def admit(view, writer, slot, hashed, prefetched):
    """Put what `free_slot` gave, now written and linked, into a queue."""
    numbers, state = writer.numbers, writer.state
    numbers[FREE_COUNT] -= 1
    writer.owners[slot] = view.table
    writer.counts[view.table, HELD] += 1
    writer.counts[view.table, ADMITTED] += 1
    # What readers hit there before was another n-gram.
    _collect_touches(writer.readers, slot, 0)
    writer.hits[slot] = 0
    if _was_evicted(writer.ghosts, numbers, hashed, view.slots):
        state[slot] = MAIN
        _push(writer.main, numbers, MAIN_HEAD, MAIN_COUNT, slot)
    else:
        state[slot] = SMALL
        _push(writer.small, numbers, SMALL_HEAD, SMALL_COUNT, slot)
    if prefetched:
        state[slot] |= PREFETCHED


@kernel
def refuse(view, writer):
    """Count a bundle that was not kept."""
    writer.counts[view.table, REFUSED] += 1


@kernel
def add_slots(writer, first, last):
    """Slots `[first, last)` have memory now; the lowest is used first."""
    for slot in range(last - 1, first - 1, -1):
        writer.state[slot] = FREE
        writer.free[writer.numbers[FREE_COUNT]] = slot
        writer.numbers[FREE_COUNT] += 1


@kernel
def settle_prefetches(writer, first, last):
    """Count prefetched slots of `[first, last)` that were hit meanwhile as useful."""
    state = writer.state
    for slot in range(first, min(last, state.size)):
        if state[slot] & PREFETCHED:
            for reader in writer.readers:
                touched = reader + PAGE_BYTES + slot
                count = load_u8(touched)
                if count:
                    store_u8(touched, np.uint8(count - 1))
                    _settle_prefetch(writer, slot, np.int64(1))
                    break
