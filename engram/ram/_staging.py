# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: staged entries written so that their reader can tell."""

from __future__ import annotations

import numpy as np

from engram._jit import (
    copy_bytes,
    fence_release,
    kernel,
    load_relaxed,
    store_relaxed,
    store_release,
    store_u64,
)
from engram.ram._directory import (
    bundle_of,
    head_of,
    ids_at,
    is_key,
    likely_slot,
    ngram_hash,
    write_head,
)
from engram.ram.layout import HEAD_TABLE, STAGED_HEAD_BYTES, unpack_view

_U64 = np.uint64


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
