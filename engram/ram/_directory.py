# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: n-grams to entries, entries to slots, slots to addresses."""

from __future__ import annotations

import numpy as np

from engram._jit import (
    copy_bytes,
    kernel,
    load_relaxed,
    load_u32,
    load_u64,
    store_release,
    store_u32,
)
from engram.ram.layout import (
    BUCKET_ENTRIES,
    HEAD_IDS,
    HEAD_ORDER,
    HEAD_TABLE,
    LINE_BYTES,
    PAGE_BYTES,
)
from engram.store.checks import mix64

_CROWDED = 6
"""Entries in use from which on an n-gram's other bucket is considered, too."""
_U64 = np.uint64


@kernel
def ids_at(windows, index):
    """Address of the ids of one of the C-contiguous int32 `[N, max_order]` windows."""
    return np.int64(windows.ctypes.data) + index * windows.shape[1] * 4


@kernel
def id_of(ids, s):
    return _U64(np.int32(load_u32(ids + 4 * s)))


@kernel
def ngram_hash(seed, ids, order):
    """Hash of an n-gram, its ids at an address."""
    state = _U64(seed)
    for s in range(order):
        state = mix64(state ^ id_of(ids, s))
    return state


@kernel
def head_hash(seed, head):
    state = _U64(seed)
    for s in range(load_u32(head + HEAD_ORDER)):
        state = mix64(state ^ _U64(np.int32(load_u32(head + HEAD_IDS + 4 * s))))
    return state


@kernel
def tag_of(hashed):
    """The tag an entry of this hash has: never 0."""
    return (hashed >> _U64(32)) | _U64(1)


@kernel
def bucket_of(view, hashed):
    """Address of the first bucket."""
    return view.directory + np.int64(hashed & _U64(view.bucket_mask)) * LINE_BYTES


@kernel
def second_bucket_of(view, hashed):
    """Address of the other bucket."""
    other = (hashed ^ mix64(tag_of(hashed))) & _U64(view.bucket_mask)
    return view.directory + np.int64(other) * LINE_BYTES


@kernel
def head_of(view, slot):
    """Address of a slot's head."""
    slab = np.int64(load_u64(view.slabs + (slot >> view.slab_shift) * 8))
    return slab + (slot & ((1 << view.slab_shift) - 1)) * view.head_bytes


@kernel
def bundle_of(view, slot):
    """Address of a slot's bundle."""
    slab = np.int64(load_u64(view.slabs + (slot >> view.slab_shift) * 8))
    return slab + view.heads_bytes + (slot & ((1 << view.slab_shift) - 1)) * view.slot_bytes


@kernel
def is_key(head, table, order, ids):
    """Whether a head names an n-gram of a table; both at addresses."""
    wanted = _U64(table) | _U64(order) << _U64(32)
    different = load_u64(head + HEAD_TABLE) ^ wanted
    for s in range(order):
        different |= _U64(load_u32(head + HEAD_IDS + 4 * s) ^ load_u32(ids + 4 * s))
    return different == 0


@kernel
def write_head(head, table, order, ids):
    """Write the key of an n-gram; its sequence is odd meanwhile."""
    store_u32(head + HEAD_TABLE, np.uint32(table))
    store_u32(head + HEAD_ORDER, np.uint32(order))
    copy_bytes(head + HEAD_IDS, ids, 4 * order)


@kernel
def _slot_in(view, bucket, tag):
    """Slot of the entry with this tag, or -1; no branch a processor could guess wrong."""
    found = np.int64(-1)
    for entry in range(BUCKET_ENTRIES):
        word = load_relaxed(bucket + entry * 8)
        slot = np.int64(word & _U64(0xFFFFFFFF))
        found = slot if word >> _U64(32) == tag else found
    return found if found < view.slots else np.int64(-1)


@kernel
def likely_slot(view, hashed):
    """The slot that an entry with this hash's tag names, or -1; its key is to be compared."""
    tag = tag_of(hashed)
    slot = _slot_in(view, bucket_of(view, hashed), tag)
    if slot < 0:
        slot = _slot_in(view, second_bucket_of(view, hashed), tag)
    return slot


@kernel
def _room(bucket):
    """(entries in use, address of a free one or 0)."""
    used, free = 0, np.int64(0)
    for entry in range(BUCKET_ENTRIES):
        if load_relaxed(bucket + entry * 8):
            used += 1
        else:
            free = bucket + entry * 8
    return used, free


@kernel
def link(view, hashed, slot):
    """Enter a slot; False if both its buckets are full.

    In the first bucket while that is not crowded, because most are then found in the first line
    looked at; else in the emptier one, because otherwise both fill up.
    """
    used, free = _room(bucket_of(view, hashed))
    if used >= _CROWDED:
        other_used, other_free = _room(second_bucket_of(view, hashed))
        if other_used < used:
            free = other_free
    if free == 0:
        return False
    store_release(free, (tag_of(hashed) << _U64(32)) | _U64(slot))
    return True


@kernel
def _clear_entry(bucket, slot):
    for entry in range(BUCKET_ENTRIES):
        word = load_relaxed(bucket + entry * 8)
        if word and word & _U64(0xFFFFFFFF) == _U64(slot):
            store_release(bucket + entry * 8, _U64(0))
            return True
    return False


@kernel
def unlink(view, directories, slot):
    """Take a slot out of the directory of the table it serves; its bytes stay."""
    head = head_of(view, slot)
    hashed = head_hash(view.seed, head)
    offset = bucket_of(view, hashed) - view.directory
    other = second_bucket_of(view, hashed) - view.directory
    directory = directories[load_u32(head + HEAD_TABLE)] + PAGE_BYTES
    if not _clear_entry(directory + offset, slot):
        _clear_entry(directory + other, slot)
