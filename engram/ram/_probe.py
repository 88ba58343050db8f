# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled reading: n-grams to slots, and slots' rows into the caller's buffers.

A slot is trusted if its sequence is even and the same before and after the copy, and its whole
key is the one asked for. Everything else is a miss: never wrong, only slower. The orderings are
argued in `docs/synchronization.md`.

Memory is far away, so n-grams pass through three stages, a group in each: hash and ask for the
bucket's line; find the slot and ask for its head; verify and copy, asking for the next bundle.

Copies are planned once per selection (`engram.ram.copies`), because where a bundle's rows go in
`[tokens, layers, columns]` depends on nothing but the selection.
"""

from __future__ import annotations

import numpy as np

from engram._jit import (
    add_atomic,
    copy_bytes,
    fence_acquire,
    kernel,
    load_acquire,
    load_relaxed,
    load_u8,
    prefetch,
    store_u8,
)
from engram.ram._directory import (
    bucket_of,
    bundle_of,
    head_of,
    id_of,
    ids_at,
    is_key,
    likely_slot,
    ngram_hash,
)
from engram.ram.layout import (
    LINE_BYTES,
    TOUCHES_MAX,
    WORD_HITS,
    WORD_IN_PLACE,
    WORD_LOOKUPS,
    WORD_MISSES,
    WORD_ON_DEVICE,
    WORD_STAGED,
    unpack_view,
)
from engram.store.checks import mix64

GROUP = 4
"""Tokens in one stage at a time."""
_RING = 4 * GROUP - 1
_U64 = np.uint64


@kernel
def _hash_group(view, windows, order_used, first, last, hashes):
    """Stage 1 for tokens `[first, last)`."""
    orders = len(order_used)
    for token in range(first, last):
        ids = ids_at(windows, token)
        # An n-gram's hash goes through those of all shorter ones of its window.
        state = ngram_hash(view.seed, ids, view.min_order - 1)
        at = (token & _RING) * orders
        for o in range(orders):
            state = mix64(state ^ id_of(ids, view.min_order - 1 + o))
            if order_used[o]:
                hashes[at + o] = state
                prefetch(bucket_of(view, state))


@kernel
def _find_group(view, order_used, first, last, hashes, slots):
    """Stage 2: `slots`, -1 where there is none, or its order is not used."""
    orders = len(order_used)
    for token in range(first, last):
        at = (token & _RING) * orders
        for o in range(orders):
            slot = np.int64(-1)
            if order_used[o]:
                slot = likely_slot(view, hashes[at + o])
                if slot >= 0:
                    prefetch(head_of(view, slot))
                    prefetch(view.touched + slot)
            slots[token, o] = slot


@kernel
def _ask_for(view, slot, copies, start, stop):
    base = bundle_of(view, slot)
    for c in range(start, stop):
        source = base + copies[c, 0]
        for line in range(0, copies[c, 3], LINE_BYTES):
            prefetch(source + line)


@kernel
def _copy_slot(view, slot, ids, o, copies, bounds, to_values, to_scales):
    """Copy what is wanted of a slot, if it can be trusted; whether it could."""
    head = head_of(view, slot)
    sequence = load_acquire(head)
    if sequence & _U64(1) or not is_key(head, view.table, view.min_order + o, ids):
        return False
    base = bundle_of(view, slot)
    for c in range(bounds[o], bounds[o + 1]):
        target = to_scales if copies[c, 1] else to_values
        copy_bytes(target + copies[c, 2], base + copies[c, 0], copies[c, 3])
    fence_acquire()
    return load_relaxed(head) == sequence


@kernel
def touch(view, slot):
    count = load_u8(view.touched + slot)
    if count < TOUCHES_MAX:
        store_u8(view.touched + slot, np.uint8(count + 1))


@kernel
def count_reader(view, lookups, hits, misses):
    """Count what this reader did, exactly, whoever else does."""
    add_atomic(view.counters + WORD_LOOKUPS * 8, _U64(lookups))
    add_atomic(view.counters + WORD_HITS * 8, _U64(hits))
    add_atomic(view.counters + WORD_MISSES * 8, _U64(misses))


@kernel
def count_step(view, on_device, in_place, staged):
    """Count a step on a device, n-grams of its tokens by where they were."""
    add_atomic(view.counters + WORD_LOOKUPS * 8, _U64(1))
    add_atomic(view.counters + WORD_ON_DEVICE * 8, _U64(on_device))
    add_atomic(view.counters + WORD_IN_PLACE * 8, _U64(in_place))
    add_atomic(view.counters + WORD_STAGED * 8, _U64(staged))


@kernel
def copy_range(
    view,
    windows,
    order_used,
    pieces,
    bounds,
    values_at,
    value_stride,
    scales_at,
    scale_stride,
    first_token,
    last_token,
    slots,
):
    """`copy_hits` for some of the tokens, into places at addresses."""
    orders = len(order_used)
    hashes = np.empty((_RING + 1) * orders, np.uint64)
    misses = 0
    for stage in range(first_token, last_token + 2 * GROUP, GROUP):
        end = min(stage + GROUP, last_token)
        _hash_group(view, windows, order_used, stage, end, hashes)
        first = max(first_token, stage - GROUP)
        _find_group(view, order_used, first, min(stage, last_token), hashes, slots)
        for token in range(max(first_token, stage - 2 * GROUP), min(first, last_token)):
            for o in range(orders):
                after, after_o = (token + 1, 0) if o + 1 == orders else (token, o + 1)
                if after < last_token and slots[after, after_o] >= 0:
                    _ask_for(
                        view, slots[after, after_o], pieces, bounds[after_o], bounds[after_o + 1]
                    )
                if not order_used[o]:
                    continue
                slot = slots[token, o]
                if slot >= 0 and _copy_slot(
                    view,
                    slot,
                    ids_at(windows, token),
                    o,
                    pieces,
                    bounds,
                    values_at + token * value_stride,
                    scales_at + token * scale_stride,
                ):
                    touch(view, slot)
                else:
                    slots[token, o] = -1
                    misses += 1
    return misses


@kernel
def copy_hits(packed_view, windows, order_used, pieces, bounds, values, scales, slots):
    """Copy the rows of all n-grams that are in the RAM tier to their tokens' places.

    Args:
        windows: int32 `[T, max_order]`.
        order_used: bool `[orders]`.
        pieces, bounds: of the selection, see `engram.ram.copies`.
        values, scales: uint8 `[T * layers * columns, bytes]`.
        slots: int64 `[T, orders]`, set to -1 for misses and unused orders.

    Returns:
        Number of misses.
    """
    view = unpack_view(packed_view)
    tokens = len(windows)
    misses = copy_range(
        view,
        windows,
        order_used,
        pieces,
        bounds,
        np.int64(values.ctypes.data),
        values.size // max(1, tokens),
        np.int64(scales.ctypes.data),
        scales.size // max(1, tokens),
        0,
        tokens,
        slots,
    )
    count_lookup(view, tokens, order_used, misses)
    return misses


@kernel
def count_lookup(view, tokens, order_used, misses):
    """Count a lookup of this reader."""
    wanted = 0
    for used in order_used:
        wanted += used
    count_reader(view, 1, tokens * wanted - misses, misses)


@kernel
def probe(packed_view, windows, order_used, slots):
    """Slots of all n-grams, for a reader that reads them in place under an epoch.

    Args:
        slots: int64 `[T, orders]`, set to -1 for misses and unused orders.

    Returns:
        Number of misses.
    """
    view = unpack_view(packed_view)
    orders = len(order_used)
    tokens = len(windows)
    hashes = np.empty((_RING + 1) * orders, np.uint64)
    hits = misses = 0
    for stage in range(0, tokens + 2 * GROUP, GROUP):
        _hash_group(view, windows, order_used, stage, min(stage + GROUP, tokens), hashes)
        first = max(0, stage - GROUP)
        _find_group(view, order_used, first, min(stage, tokens), hashes, slots)
        for token in range(max(0, stage - 2 * GROUP), min(first, tokens)):
            for o in range(orders):
                if not order_used[o]:
                    continue
                slot = slots[token, o]
                if slot >= 0 and is_whole(view, slot, ids_at(windows, token), view.min_order + o):
                    touch(view, slot)
                    hits += 1
                else:
                    slots[token, o] = -1
                    misses += 1
    count_reader(view, True, hits, misses)
    return misses


@kernel
def is_whole(view, slot, ids, order):
    """Whether a slot holds the n-gram now; it stays so only for who holds an epoch."""
    head = head_of(view, slot)
    sequence = load_acquire(head)
    known = is_key(head, view.table, order, ids)
    fence_acquire()
    return known and sequence & _U64(1) == 0 and load_relaxed(head) == sequence


@kernel
def copy_row_of(view, source, layer, head, values, scales, place):
    """Copy one row of the bundle at `source` to `place` in flat rows."""
    base = source + layer * view.layer_bytes
    copy_bytes(values + place * view.value_bytes, base + head * view.value_bytes, view.value_bytes)
    if view.scale_bytes:
        base += view.heads * view.value_bytes + head * view.scale_bytes
        copy_bytes(scales + place * view.scale_bytes, base, view.scale_bytes)


@kernel
def copy_ngram_hits(
    packed_view, windows, orders, layers, columns, ordered, order_bounds, places, values, scales
):
    """`copy_hits` for n-grams whose rows have places of their own.

    Args:
        windows, orders: int32 `[N, max_order]` and `[N]`.
        layers, columns, ordered, order_bounds: of the selection.
        places: int64 `[R]`, in canonical order.
        values, scales: uint8 `[R', bytes]`.

    Returns:
        uint8 `[N]`, 1 for misses.
    """
    view = unpack_view(packed_view)
    values_at, scales_at = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    missed = np.ones(len(orders), np.uint8)
    hits = row = 0
    for n in range(len(orders)):
        o = orders[n] - view.min_order
        start, stop = order_bounds[o], order_bounds[o + 1]
        slot = likely_slot(view, ngram_hash(view.seed, ids_at(windows, n), orders[n]))
        if slot >= 0:
            head = head_of(view, slot)
            sequence = load_acquire(head)
            if sequence & _U64(1) == 0 and is_key(head, view.table, orders[n], ids_at(windows, n)):
                source, at = bundle_of(view, slot), row
                for layer in layers:
                    for k in range(start, stop):
                        column_head = columns[ordered[k]] % view.heads
                        copy_row_of(
                            view, source, layer, column_head, values_at, scales_at, places[at]
                        )
                        at += 1
                fence_acquire()
                if load_relaxed(head) == sequence:
                    touch(view, slot)
                    missed[n] = 0
                    hits += 1
        row += len(layers) * (stop - start)
    count_reader(view, True, hits, len(orders) - hits)
    return missed
