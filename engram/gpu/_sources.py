# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: an address for every n-gram of a step, and the host's twin of the device's gather."""

from __future__ import annotations

import numpy as np

from engram._jit import copy_bytes, kernel, prefetch
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
from engram.ram._probe import count_reader, count_step, is_whole, touch
from engram.ram.layout import unpack_view
from engram.store.checks import mix64

_GROUP = 16
"""Tokens in one stage at a time."""


@kernel
def slots_to_sources(slots, first, slot_bytes, sources):
    """Addresses of the device's own bundles.

    Args:
        slots: int64 `[T, orders]`, -1 for none.
        first: address of slot 0, with the lowest bit set.
        sources: int64 `[T, orders]`; 0 where there is none.
    """
    for token in range(slots.shape[0]):
        for o in range(slots.shape[1]):
            slot = slots[token, o]
            sources[token, o] = first + slot * slot_bytes if slot >= 0 else 0


@kernel
def find_in_place(packed_view, reachable, windows, orders, addresses):
    """Where n-grams lie in the arena, for a reader that holds an epoch.

    Args:
        reachable: uint8 `[slabs]`, whether the device can read each slab.
        windows, orders: int32 `[N, max_order]`, `[N]`.
        addresses: int64 `[N]`, set to each bundle's address, 0 where it cannot be read in place.

    Returns:
        Number of those set to 0.
    """
    view = unpack_view(packed_view)
    hits = 0
    for n in range(len(orders)):
        ids = ids_at(windows, n)
        addresses[n] = 0
        slot = likely_slot(view, ngram_hash(view.seed, ids, orders[n]))
        if slot < 0 or not reachable[slot >> view.slab_shift]:
            continue
        if is_whole(view, slot, ids, orders[n]):
            touch(view, slot)
            addresses[n] = bundle_of(view, slot)
            hits += 1
    return len(orders) - hits


@kernel
def _ask_for_buckets(view, windows, order_used, first, last, hashes):
    """Hash all n-grams of tokens `[first, last)`, and ask for the lines that say where they are."""
    orders = len(order_used)
    for token in range(first, last):
        ids = ids_at(windows, token)
        # An n-gram's hash goes through those of all shorter ones of its window.
        state = ngram_hash(view.seed, ids, view.min_order - 1)
        for o in range(orders):
            state = mix64(state ^ id_of(ids, view.min_order - 1 + o))
            hashes[token - first, o] = state
            if order_used[o]:
                prefetch(bucket_of(view, state))


@kernel
def _ask_for_heads(view, wanted, hashes, slots):
    """The likely slots of wanted n-grams, -1 for none; asks for what verifies them."""
    for t in range(wanted.shape[0]):
        for o in range(wanted.shape[1]):
            slot = np.int64(-1)
            if wanted[t, o]:
                slot = likely_slot(view, hashes[t, o])
                if slot >= 0:
                    prefetch(head_of(view, slot))
                    prefetch(view.touched + slot)
            slots[t, o] = slot


@kernel
def find_everywhere(
    device_view, first_slot, slot_bytes, packed_view, reachable, windows, order_used, sources
):
    """Addresses of a step's n-grams on the device, or else in the arena, under the arena's epoch.

    Memory is far away, so a group of tokens at a time goes through three stages, as in
    `engram.ram._probe`: hash, find, verify.

    Args:
        device_view: of the device's directory; empty without one.
        first_slot: address of slot 0 on the device, with the lowest bit set.
        packed_view, reachable: of the arena, see `find_in_place`.
        windows: int32 `[T, max_order]`.
        sources: int64 `[T, orders]`; 0 where there is none.

    Returns:
        how many wanted n-grams are not on the device, and how many of them nowhere. If there are
        such, nothing is counted: they are looked for again.
    """
    view = unpack_view(packed_view)
    there = device_view.size > 0
    on_device = unpack_view(device_view if there else packed_view)
    tokens, orders = sources.shape
    hashes = np.empty((2, _GROUP, orders), np.uint64)
    slots = np.full((2, _GROUP, orders), -1)
    wanted = np.empty((_GROUP, orders), np.bool_)
    used = absent = lacking = 0
    for first in range(0, tokens, _GROUP):
        last = min(tokens, first + _GROUP)
        if there:
            _ask_for_buckets(on_device, windows, order_used, first, last, hashes[0])
        _ask_for_buckets(view, windows, order_used, first, last, hashes[1])
        some = wanted[: last - first]
        some[:] = order_used
        if there:
            _ask_for_heads(on_device, some, hashes[0], slots[0])
            some &= slots[0, : last - first] < 0
        _ask_for_heads(view, some, hashes[1], slots[1])
        for token in range(first, last):
            ids, t = ids_at(windows, token), token - first
            for o in range(orders):
                sources[token, o] = 0
                if not order_used[o]:
                    continue
                used += 1
                order = view.min_order + o
                slot = slots[0, t, o]
                if slot >= 0 and is_key(head_of(on_device, slot), on_device.table, order, ids):
                    sources[token, o] = first_slot + slot * slot_bytes
                    touch(on_device, slot)
                    continue
                absent += 1
                slot = slots[1, t, o] if slot < 0 else likely_slot(view, hashes[1, t, o])
                reached = slot >= 0 and reachable[slot >> view.slab_shift]
                if reached and is_whole(view, slot, ids, order):
                    sources[token, o] = bundle_of(view, slot)
                    touch(view, slot)
                else:
                    lacking += 1
    if lacking == 0:
        if there:
            count_reader(on_device, True, used - absent, absent)
        count_step(view, used - absent, absent, 0)
    return absent, lacking


@kernel
def count_found(packed_view, on_device, in_place, staged):
    """Count a step of which `find_everywhere` did not find everything."""
    count_step(unpack_view(packed_view), on_device, in_place, staged)


@kernel
def find_slots(packed_view, windows, orders, slots):
    """The slot of each n-gram, -1 if it has none. For the writer alone."""
    view = unpack_view(packed_view)
    for n in range(len(orders)):
        ids = ids_at(windows, n)
        slot = likely_slot(view, ngram_hash(view.seed, ids, orders[n]))
        if slot >= 0 and not is_key(head_of(view, slot), view.table, orders[n], ids):
            slot = np.int64(-1)
        slots[n] = slot


@kernel
def copy_bundles(bundles, size, target, stride, addresses):
    """Copy bundles next to each other, 0 for one that is missing; sets where each went."""
    for n in range(len(bundles)):
        addresses[n] = 0
        if bundles[n]:
            addresses[n] = target + n * stride
            copy_bytes(addresses[n], bundles[n], size)


@kernel
def spread(missed, number, firsts, found, kept, sources, keep):
    """Give every token that missed an n-gram its address, and the first one what to keep.

    Args:
        missed: int64 `[M]`, token * orders + order.
        number: int64 `[M]`, which n-gram each is.
        firsts: int64 `[N]`, the first of `missed` that each n-gram is.
        found, kept: int64 `[N]`.
        sources, keep: int64, flat.
    """
    for m in range(len(missed)):
        sources[missed[m]] = found[number[m]]
    for n in range(len(firsts)):
        keep[missed[firsts[n]]] = kept[n]


@kernel
def gather_rows(
    sources, keep, bounds, positions, offsets, value_bytes, scale_bytes, values, scales
):
    """The device's gather on the host, without decoding.

    Args:
        sources, keep: int64 `[T, orders]`, addresses; 0 for none.
        bounds, positions, offsets: of the plan.
        values, scales: uint8 `[layers, T, columns, bytes]`.
    """
    layers, tokens = values.shape[0], values.shape[1]
    columns = values.shape[2]
    to_values, to_scales = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    for token in range(tokens):
        for o in range(sources.shape[1]):
            source = sources[token, o]
            if source == 0:
                continue
            kind = source & 1
            base = source - kind
            kept = keep[token, o]
            for layer in range(layers):
                for k in range(bounds[o], bounds[o + 1]):
                    row = (layer * tokens + token) * columns + positions[k]
                    value_at, scale_at = offsets[kind, layer, k, 0], offsets[kind, layer, k, 1]
                    copy_bytes(to_values + row * value_bytes, base + value_at, value_bytes)
                    if scale_bytes:
                        copy_bytes(to_scales + row * scale_bytes, base + scale_at, scale_bytes)
                    if kept:
                        at = kept + offsets[1, layer, k, 0]
                        copy_bytes(at, base + value_at, value_bytes)
                        if scale_bytes:
                            at = kept + offsets[1, layer, k, 1]
                            copy_bytes(at, base + scale_at, scale_bytes)
