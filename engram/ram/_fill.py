# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled writing: admission, eviction, and slots filled so that readers can tell.

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

from engram._jit import (
    copy_bytes,
    fence_full,
    fence_release,
    kernel,
    load_acquire,
    load_relaxed,
    load_u8,
    load_u32,
    store_relaxed,
    store_release,
    store_u8,
    store_u32,
    store_u64,
)
from engram.ram._probe import (
    bucket_of,
    bundle_of,
    head_of,
    ids_at,
    is_key,
    likely_slot,
    ngram_hash,
    second_bucket_of,
    tag_of,
)
from engram.ram.layout import (
    BUCKET_ENTRIES,
    HEAD_IDS,
    HEAD_ORDER,
    HEAD_TABLE,
    PAGE_BYTES,
    STAGED_HEAD_BYTES,
    TOUCHES_MAX,
    WORD_EPOCH,
    unpack_view,
)
from engram.store.checks import mix64

UNUSABLE, FREE, SMALL, MAIN, LIMBO = range(5)
"""Where a slot is; unusable ones have no memory yet."""
PREFETCHED = 0x10
"""Set in a slot's state from its prefetch to its first hit, which is no reuse."""
_WAITED = 0x20
"""Set when a prefetched slot came to the small queue's head unused, and went round once more."""
GHOST_WAYS = 4
_PLACE = 0x0F
_SMALL_PERCENT = 25
_PROMOTED_FROM = 2
_EVICTED_AT_ONCE = 64
_LOOKS_MAX = 4096
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
    ADMITTED,
    REFUSED,
    EVICTED,
    USEFUL,
    WASTED,
) = range(14)
NUMBERS = 14


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


@kernel
def _head_hash(seed, head):
    state = _U64(seed)
    for s in range(load_u32(head + HEAD_ORDER)):
        state = mix64(state ^ _U64(np.int32(load_u32(head + HEAD_IDS + 4 * s))))
    return state


@kernel
def _clear_entry(bucket, slot):
    for entry in range(BUCKET_ENTRIES):
        word = load_relaxed(bucket + entry * 8)
        if word and word & _U64(0xFFFFFFFF) == _U64(slot):
            store_release(bucket + entry * 8, _U64(0))
            return True
    return False


@kernel
def _unlink(view, directories, slot):
    """Take a slot out of the directory of the table it serves; its bytes stay."""
    head = head_of(view, slot)
    hashed = _head_hash(view.seed, head)
    offset = bucket_of(view, hashed) - view.directory
    other = second_bucket_of(view, hashed) - view.directory
    directory = directories[load_u32(head + HEAD_TABLE)] + PAGE_BYTES
    if not _clear_entry(directory + offset, slot):
        _clear_entry(directory + other, slot)


@kernel
def _free_entry(bucket):
    """Address of a free entry, or 0."""
    for entry in range(BUCKET_ENTRIES):
        if not load_relaxed(bucket + entry * 8):
            return bucket + entry * 8
    return np.int64(0)


@kernel
def _link(view, hashed, slot):
    """Enter a slot in its first bucket that has room, so that most are found in the first line
    looked at; False if both are full."""
    free = _free_entry(bucket_of(view, hashed))
    if free == 0:
        free = _free_entry(second_bucket_of(view, hashed))
    if free == 0:
        return False
    store_release(free, (tag_of(hashed) << _U64(32)) | _U64(slot))
    return True


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
def _settle_prefetch(state, numbers, slot, seen):
    """Count a prefetched slot as useful or wasted; its hits beyond the one it was fetched for."""
    if not state[slot] & PREFETCHED:
        return seen
    numbers[USEFUL if seen else WASTED] += 1
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
    if _settle_prefetch(state, numbers, slot, seen) < _PROMOTED_FROM:
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
        if numbers[SMALL_COUNT] * 100 >= view.slots * _SMALL_PERCENT or numbers[MAIN_COUNT] == 0:
            slot = _pop(writer.small, numbers, SMALL_HEAD, SMALL_COUNT)
            seen = _collect_touches(writer.readers, slot, writer.hits[slot])
            if looks > _LOOKS_MAX:
                seen = np.int64(0)
            if _move_on(writer, slot, seen):
                continue
            _remember(writer.ghosts, numbers, _head_hash(view.seed, head_of(view, slot)))
        else:
            slot = _pop(writer.main, numbers, MAIN_HEAD, MAIN_COUNT)
            seen = _collect_touches(writer.readers, slot, writer.hits[slot])
            _settle_prefetch(state, numbers, slot, seen)
            if seen > 0 and looks <= _LOOKS_MAX:
                writer.hits[slot] = seen - 1
                _push(writer.main, numbers, MAIN_HEAD, MAIN_COUNT, slot)
                continue
        numbers[EVICTED] += 1
        _unlink(view, writer.directories, slot)
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
def _make_room(view, writer):
    """Whether there is a free slot, after evicting a few if needed."""
    numbers = writer.numbers
    if numbers[FREE_COUNT] == 0:
        for _ in range(min(_EVICTED_AT_ONCE, 1 + view.slots // 64)):
            if numbers[LIMBO_COUNT] >= numbers[LIMBO_MAX] or not _evict(view, writer):
                break
        _reclaim(writer)
    return numbers[FREE_COUNT] > 0


@kernel
def write_head(head, table, order, ids):
    """Write the key of an n-gram; its sequence is odd meanwhile."""
    store_u32(head + HEAD_TABLE, np.uint32(table))
    store_u32(head + HEAD_ORDER, np.uint32(order))
    copy_bytes(head + HEAD_IDS, ids, 4 * order)


@kernel
def _write_slot(view, slot, order, ids, bundle):
    head = head_of(view, slot)
    sequence = load_relaxed(head) | _U64(1)
    store_relaxed(head, sequence)
    fence_release()
    write_head(head, view.table, order, ids)
    copy_bytes(bundle_of(view, slot), bundle, view.slot_bytes)
    store_release(head, sequence + _U64(1))


@kernel
def add_slots(writer, first, last):
    """Slots `[first, last)` have memory now; the lowest is used first."""
    for slot in range(last - 1, first - 1, -1):
        writer.state[slot] = FREE
        writer.free[writer.numbers[FREE_COUNT]] = slot
        writer.numbers[FREE_COUNT] += 1


@kernel
def fill(packed_view, windows, orders, bundles, prefetched, writer):
    """Keep bundles, as far as the policy and the readers let it.

    Args:
        windows, orders: int32 `[N, max_order]`, `[N]`: n-grams, each once.
        bundles: int64 `[N]`, address of each bundle's bytes, 0 to leave it out.
        prefetched: whether they were read before anybody asked for them.
        writer: `Writer`.
    """
    view = unpack_view(packed_view)
    numbers, state = writer.numbers, writer.state
    for n in range(len(orders)):
        if bundles[n] == 0 or view.slots == 0:
            continue
        hashed = ngram_hash(view.seed, ids_at(windows, n), orders[n])
        slot = likely_slot(view, hashed)
        if slot >= 0 and is_key(head_of(view, slot), view.table, orders[n], ids_at(windows, n)):
            continue
        if not _make_room(view, writer):
            numbers[REFUSED] += 1
            continue
        slot = np.int64(writer.free[numbers[FREE_COUNT] - 1])
        _write_slot(view, slot, orders[n], ids_at(windows, n), bundles[n])
        _collect_touches(writer.readers, slot, 0)
        writer.hits[slot] = 0
        if not _link(view, hashed, slot):
            numbers[REFUSED] += 1
            continue
        numbers[FREE_COUNT] -= 1
        numbers[ADMITTED] += 1
        if _was_evicted(writer.ghosts, numbers, hashed, view.slots):
            state[slot] = MAIN
            _push(writer.main, numbers, MAIN_HEAD, MAIN_COUNT, slot)
        else:
            state[slot] = SMALL
            _push(writer.small, numbers, SMALL_HEAD, SMALL_COUNT, slot)
        if prefetched:
            state[slot] |= PREFETCHED


@kernel
def settle_prefetches(writer):
    """Count prefetched slots that were hit meanwhile as useful."""
    state = writer.state
    for slot in range(state.size):
        if state[slot] & PREFETCHED:
            for reader in writer.readers:
                touched = reader + PAGE_BYTES + slot
                count = load_u8(touched)
                if count:
                    store_u8(touched, np.uint8(count - 1))
                    _settle_prefetch(state, writer.numbers, slot, np.int64(1))
                    break


@kernel
def stage(packed_view, windows, orders, request_id, values, scales, target, stride, wanted):
    """Write staged entries out of rows that lie n-gram by n-gram, layer by layer, head by head.

    Args:
        values, scales: uint8 `[N' * layers * heads, bytes]`; n-gram i of those wanted is i-th.
        target, stride: address of entry 0, and bytes from one to the next.
        wanted: uint8 `[N]`: which n-grams to write.
    """
    view = unpack_view(packed_view)
    value_bytes = view.heads * view.value_bytes
    scale_bytes = view.heads * view.scale_bytes
    from_values, from_scales = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    for n in range(len(orders)):
        if not wanted[n]:
            continue
        entry = target + n * stride
        head = entry + STAGED_HEAD_BYTES
        open_entry(entry, request_id)
        write_head(head, view.table, orders[n], ids_at(windows, n))
        bundle = head + view.head_bytes
        for _ in range(view.layers):
            copy_bytes(bundle, from_values, value_bytes)
            copy_bytes(bundle + value_bytes, from_scales, scale_bytes)
            bundle += view.layer_bytes
            from_values += value_bytes
            from_scales += scale_bytes
        close_entry(entry)


@kernel
def open_entry(entry, request_id):
    """Begin to write a staged entry: until `close_entry` nobody trusts it."""
    head = entry + STAGED_HEAD_BYTES
    store_relaxed(head, load_relaxed(head) | _U64(1))
    fence_release()
    store_u64(entry, _U64(request_id))


@kernel
def close_entry(entry):
    """The entry is whole."""
    head = entry + STAGED_HEAD_BYTES
    store_release(head, load_relaxed(head) + _U64(1))


@kernel
def stage_present(packed_view, windows, orders, request_id, target, stride):
    """Write staged entries of the n-grams that are in the arena; uint8 `[N]`, 1 for the others.

    For the writer alone: nothing changes a slot meanwhile.
    """
    view = unpack_view(packed_view)
    missed = np.ones(len(orders), np.uint8)
    for n in range(len(orders)):
        slot = likely_slot(view, ngram_hash(view.seed, ids_at(windows, n), orders[n]))
        if slot >= 0 and is_key(head_of(view, slot), view.table, orders[n], ids_at(windows, n)):
            entry = target + n * stride
            open_entry(entry, request_id)
            write_head(entry + STAGED_HEAD_BYTES, view.table, orders[n], ids_at(windows, n))
            bundle = entry + STAGED_HEAD_BYTES + view.head_bytes
            copy_bytes(bundle, bundle_of(view, slot), view.slot_bytes)
            close_entry(entry)
            missed[n] = 0
    return missed


@kernel
def copy_staged(sources, target, stride, request_id):
    """Copy whole staged entries, int64 addresses `[N]`, as entries of another request."""
    for n in range(len(sources)):
        entry = target + n * stride
        open_entry(entry, request_id)
        after_sequence = STAGED_HEAD_BYTES + HEAD_TABLE
        copy_bytes(entry + after_sequence, sources[n] + after_sequence, stride - after_sequence)
        close_entry(entry)


@kernel
def find_present(packed_view, windows, orders, present):
    """Set `present` bool `[N]`: which n-grams are in the arena. For the writer alone."""
    view = unpack_view(packed_view)
    for n in range(len(orders)):
        slot = likely_slot(view, ngram_hash(view.seed, ids_at(windows, n), orders[n]))
        present[n] = slot >= 0 and is_key(
            head_of(view, slot), view.table, orders[n], ids_at(windows, n)
        )
