# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: slots filled so that readers can tell.

The sequence is odd from before the first byte is written until after the last.
"""

from __future__ import annotations

import numpy as np

from engram._jit import (
    copy_bytes,
    fence_release,
    kernel,
    load_relaxed,
    load_u32,
    store_relaxed,
    store_release,
)
from engram.ram._directory import (
    bundle_of,
    head_of,
    ids_at,
    is_key,
    likely_slot,
    link,
    ngram_hash,
    write_head,
)
from engram.ram._policy import admit, free_slot, refuse
from engram.ram.layout import HEAD_IDS, HEAD_ORDER, HEAD_TABLE, unpack_view

_PLACE = 0x0F
"""The bits of a slot's state that say where it is."""
_U64 = np.uint64


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
def fill(packed_view, windows, orders, bundles, prefetched, writer):
    """Keep bundles, as far as the policy and the readers let it.

    Args:
        windows, orders: int32 `[N, max_order]`, `[N]`: n-grams, each once.
        bundles: int64 `[N]`, address of each bundle's bytes, 0 to leave it out.
        prefetched: whether they were read before anybody asked for them.
        writer: `Writer`.
    """
    view = unpack_view(packed_view)
    for n in range(len(orders)):
        if bundles[n] == 0 or view.slots == 0:
            continue
        hashed = ngram_hash(view.seed, ids_at(windows, n), orders[n])
        slot = likely_slot(view, hashed)
        if slot >= 0 and is_key(head_of(view, slot), view.table, orders[n], ids_at(windows, n)):
            continue
        slot = free_slot(view, writer)
        if slot < 0:
            refuse(view, writer)
            continue
        _write_slot(view, slot, orders[n], ids_at(windows, n), bundles[n])
        if link(view, hashed, slot):
            admit(view, writer, slot, hashed, prefetched)
        else:
            refuse(view, writer)


@kernel
def list_keys(packed_view, state, place, first, last, windows, orders):
    """The n-grams of a table whose slots in `[first, last)` are in a place. For the writer alone.

    Args:
        state: uint8 `[slots]`, of the writer.
        place: see `engram.ram._policy`.
        windows, orders: int32 `[N, max_order]`, `[N]`, set from the front, as many as there is room
            for.

    Returns:
        how many there are.
    """
    view = unpack_view(packed_view)
    found = 0
    for slot in range(first, last):
        if found == len(orders):
            break
        head = head_of(view, slot)
        if state[slot] & _PLACE == place and load_u32(head + HEAD_TABLE) == view.table:
            order = np.int32(load_u32(head + HEAD_ORDER))
            orders[found] = order
            for s in range(windows.shape[1]):
                ids = np.int32(load_u32(head + HEAD_IDS + 4 * s)) if s < order else np.int32(-1)
                windows[found, s] = ids
            found += 1
    return found


@kernel
def find_present(packed_view, windows, orders, present):
    """Set `present` bool `[N]`: which n-grams are in the arena. For the writer alone."""
    view = unpack_view(packed_view)
    for n in range(len(orders)):
        slot = likely_slot(view, ngram_hash(view.seed, ids_at(windows, n), orders[n]))
        present[n] = slot >= 0 and is_key(
            head_of(view, slot), view.table, orders[n], ids_at(windows, n)
        )
