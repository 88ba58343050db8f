"""From windows to the distinct n-grams of a batch, and from their rows back to every token.

A batch repeats n-grams, so each is read once: at its first token, straight into the caller's
buffer. Its other tokens get copies from there.

    first[t, o]   token at which the n-gram of order min_order + o that ends at t was first seen
    places        see `engram.tiers`: here (token, layer, column), row-major
"""

from __future__ import annotations

import numpy as np

from engram._jit import copy_bytes, kernel
from engram.rows import Rows
from engram.store.checks import mix64
from engram.tiers import Int32s, Int64s, Ngrams, Selection


def distinct_ngrams(
    windows: Int32s, min_order: int, selection: Selection
) -> tuple[Ngrams, Int64s, Int32s]:
    """Find each n-gram's first token among `windows`.

    Args:
        windows: int32 `[T, max_order]`.
        min_order: order of the selection's first column group.
        selection: orders without a selected column are left out.

    Returns:
        The distinct n-grams by token, then order; int64 `[N]`, the first token of each; and
        `first`, int32 `[T, orders]`, -1 for orders left out.
    """
    used = np.diff(selection.order_bounds) > 0
    tokens, orders = len(windows), len(used)
    first = np.empty((tokens, orders), np.int32)
    buckets = np.full(1 << (2 * max(tokens, 1) * orders).bit_length(), -1, np.int32)
    count = _find_first(windows, min_order, used, first, buckets)
    found = np.full((count, windows.shape[1]), -1, np.int32)
    found_orders = np.empty(count, np.int32)
    found_tokens = np.empty(count, np.int64)
    _collect(windows, min_order, first, found, found_orders, found_tokens)
    return Ngrams(found, found_orders), found_tokens, first


def places_of(ngrams: Ngrams, tokens: Int64s, selection: Selection) -> Int64s:
    """int64 `[R]`: where in a flat `[T, layers, columns]` buffer each row of `ngrams` goes."""
    places = np.empty(ngrams.row_count(selection), np.int64)
    _places(
        ngrams.orders - np.int32(selection.min_order),
        tokens,
        len(selection.layers),
        len(selection.columns),
        selection.order_bounds,
        selection.ordered,
        places,
    )
    return places


def copy_repeats(first: Int32s, selection: Selection, out: Rows) -> None:
    """Copy the rows of each n-gram's first token to its other tokens.

    Args:
        first: int32 `[T, orders]` from `distinct_ngrams`.
        out: flat rows `[T * layers * columns, bytes]`.
    """
    for part in (out.values, out.scales):
        if part is not None:
            _copy_repeats(
                first,
                len(selection.layers),
                len(selection.columns),
                selection.order_bounds,
                selection.ordered,
                part,
            )


def number_ngrams(ngrams: Ngrams) -> tuple[Int64s, Int64s]:
    """Find repeated n-grams.

    Args:
        ngrams: unused entries of their windows are all alike.

    Returns:
        int64 `[D]`, position of the first of each n-gram, ascending; int64 `[N]`, for each n-gram
        its number among those.
    """
    number = np.empty(len(ngrams), np.int64)
    firsts = np.empty(len(ngrams), np.int64)
    buckets = np.full(1 << (2 * max(len(ngrams), 1)).bit_length(), -1, np.int64)
    count = _number_ngrams(ngrams.windows, ngrams.orders, number, firsts, buckets)
    return firsts[:count], number


def distinct_rows(row_ids: Int64s) -> tuple[Int64s, Int64s]:
    """Find repeated row ids.

    Args:
        row_ids: int64 `[R]`.

    Returns:
        int64 `[N]`, positions of the first of each id, ascending; int64 `[R]`, for each position
        the position where its id was first seen.
    """
    first = np.empty(len(row_ids), np.int64)
    buckets = np.full(1 << (2 * max(len(row_ids), 1)).bit_length(), -1, np.int64)
    _find_first_rows(row_ids, first, buckets)
    return np.flatnonzero(first == np.arange(len(row_ids))), first


def copy_repeated_rows(first: Int64s, out: Rows) -> None:
    """Copy each row from the position where its id was first seen."""
    for part in (out.values, out.scales):
        if part is not None:
            _copy_repeated_rows(first, part)


@kernel
def _find_first(windows, min_order, used, first, buckets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Open addressing over (token, order) pairs; `buckets` holds token * orders + order."""
    orders = used.size
    mask = buckets.size - 1
    count = 0
    for token in range(windows.shape[0]):
        state = np.uint64(0)
        for position in range(min_order + orders - 1):
            state = mix64(state ^ np.uint64(windows[token, position]))
            order = position + 1 - min_order
            if order < 0:
                continue
            if not used[order]:
                first[token, order] = -1
                continue
            bucket = np.int64((state >> np.uint64(order)) & np.uint64(mask))
            while True:
                entry = buckets[bucket]
                if entry < 0:
                    buckets[bucket] = token * orders + order
                    first[token, order] = token
                    count += 1
                    break
                seen = entry // orders
                same = entry % orders == order
                for s in range(position + 1):
                    if not same:
                        break
                    same = windows[seen, s] == windows[token, s]
                if same:
                    first[token, order] = seen
                    break
                bucket = (bucket + 1) & mask
    return count


@kernel
def _number_ngrams(windows, orders, number, firsts, buckets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mask = np.uint64(buckets.size - 1)
    count = 0
    for n in range(orders.size):
        state = np.uint64(orders[n])
        for s in range(orders[n]):
            state = mix64(state ^ np.uint64(windows[n, s]))
        bucket = np.int64(state & mask)
        while True:
            known = buckets[bucket]
            if known < 0:
                buckets[bucket] = count
                firsts[count] = n
                number[n] = count
                count += 1
                break
            seen = firsts[known]
            same = orders[seen] == orders[n]
            for s in range(orders[n]):
                if not same:
                    break
                same = windows[seen, s] == windows[n, s]
            if same:
                number[n] = known
                break
            bucket = (bucket + 1) & np.int64(mask)
    return count


@kernel
def _collect(windows, min_order, first, found, found_orders, found_tokens):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    index = 0
    for token in range(first.shape[0]):
        for order in range(first.shape[1]):
            if first[token, order] == token:
                for s in range(min_order + order):
                    found[index, s] = windows[token, s]
                found_orders[index] = min_order + order
                found_tokens[index] = token
                index += 1


@kernel
def _places(orders, tokens, layers, columns, order_bounds, ordered, places):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = 0
    for ngram in range(orders.size):
        start, stop = order_bounds[orders[ngram]], order_bounds[orders[ngram] + 1]
        for layer in range(layers):
            base = (tokens[ngram] * layers + layer) * columns
            for k in range(start, stop):
                places[row] = base + ordered[k]
                row += 1


@kernel
def _copy_repeats(first, layers, columns, order_bounds, ordered, part):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    width = part.shape[1]
    address = part.ctypes.data
    for token in range(first.shape[0]):
        for order in range(first.shape[1]):
            source = first[token, order]
            if source < 0 or source == token:
                continue
            for layer in range(layers):
                to = (token * layers + layer) * columns
                at = (np.int64(source) * layers + layer) * columns
                for k in range(order_bounds[order], order_bounds[order + 1]):
                    copy_bytes(
                        address + (to + ordered[k]) * width,
                        address + (at + ordered[k]) * width,
                        width,
                    )


@kernel
def _find_first_rows(row_ids, first, buckets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mask = buckets.size - 1
    for position in range(row_ids.size):
        bucket = np.int64(mix64(np.uint64(row_ids[position])) & np.uint64(mask))
        while True:
            entry = buckets[bucket]
            if entry < 0:
                buckets[bucket] = position
                first[position] = position
                break
            if row_ids[entry] == row_ids[position]:
                first[position] = entry
                break
            bucket = (bucket + 1) & mask


@kernel
def _copy_repeated_rows(first, part):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    width = part.shape[1]
    address = part.ctypes.data
    for position in range(first.size):
        if first[position] != position:
            copy_bytes(address + position * width, address + first[position] * width, width)


def first_twin(windows: Int32s, min_order: int, used: np.ndarray) -> Int32s:
    """`first` of `distinct_ngrams` by a plain dict: the oracle of the compiled path."""
    first = np.full((len(windows), len(used)), -1, np.int32)
    seen: dict[tuple[int, ...], int] = {}
    for token, window in enumerate(windows.tolist()):
        for order in np.flatnonzero(used):
            first[token, order] = seen.setdefault(tuple(window[: min_order + order]), token)
    return first


def number_twin(ngrams: Ngrams) -> tuple[list[int], list[int]]:
    """`number_ngrams` by a plain dict: its oracle."""
    numbers: dict[tuple[int, ...], int] = {}
    firsts: list[int] = []
    number = []
    for n, (window, order) in enumerate(zip(ngrams.windows.tolist(), ngrams.orders, strict=True)):
        key = tuple(window[:order])
        if key not in numbers:
            numbers[key] = len(firsts)
            firsts.append(n)
        number.append(numbers[key])
    return firsts, number
