# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: what was missed, listed, and its rows copied out of bundles that were fetched."""

from __future__ import annotations

import numpy as np

from engram._jit import copy_bytes, kernel
from engram.ram._probe import copy_row_of
from engram.ram.layout import unpack_view


@kernel
def deliver_ngrams(
    packed_view,
    orders,
    bundles,
    layers,
    columns,
    ordered,
    order_bounds,
    places,
    values,
    scales,
):
    """Copy rows out of bundles that nobody writes any more, for n-grams with places of their own.

    Args:
        bundles: int64 `[N]`, address of each n-gram's bundle, 0 where there is none.
        others: as `copy_ngram_hits`.
    """
    view = unpack_view(packed_view)
    values_at, scales_at = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    row = 0
    for n in range(len(orders)):
        o = orders[n] - view.min_order
        start, stop = order_bounds[o], order_bounds[o + 1]
        if bundles[n] == 0:
            row += len(layers) * (stop - start)
            continue
        for layer in layers:
            for k in range(start, stop):
                column_head = columns[ordered[k]] % view.heads
                copy_row_of(view, bundles[n], layer, column_head, values_at, scales_at, places[row])
                row += 1


@kernel
def deliver(missed, number, bundles, orders, copies, bounds, values, scales, tokens):
    """Copy rows out of bundles that nobody writes any more to all tokens that missed them.

    Args:
        missed: int64 `[M]`, token * orders + order of each miss.
        number: int64 `[M]`, which of the bundles it wants.
        bundles: int64, addresses, 0 where there is none.
        orders: how many the table has.
        tokens: in the batch.
        others: as `copy_hits`.
    """
    value_stride, scale_stride = values.size // tokens, scales.size // tokens
    values_at, scales_at = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    for m in range(len(missed)):
        bundle = bundles[number[m]]
        if bundle == 0:
            continue
        token, o = missed[m] // orders, missed[m] % orders
        for c in range(bounds[o], bounds[o + 1]):
            if copies[c, 1]:
                target = scales_at + token * scale_stride
            else:
                target = values_at + token * value_stride
            copy_bytes(target + copies[c, 2], bundle + copies[c, 0], copies[c, 3])


@kernel
def collect_missed(windows, min_order, order_used, slots, missed, found, found_orders):
    """List the n-grams that were missed, one for each token that did.

    Args:
        slots: int64 `[T, orders]` after `copy_hits`.
        missed: int64 `[M]`, set to token * orders + order.
        found, found_orders: int32 `[M, max_order]`, all -1, and `[M]`.
    """
    orders = len(order_used)
    m = 0
    for token in range(len(windows)):
        for o in range(orders):
            if order_used[o] and slots[token, o] < 0:
                missed[m] = token * orders + o
                for s in range(min_order + o):
                    found[m, s] = windows[token, s]
                found_orders[m] = min_order + o
                m += 1
