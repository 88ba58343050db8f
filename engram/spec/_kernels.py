# ruff: noqa: ANN001, ANN202 - kernels are typed by the arrays they are called with
# mypy: disable-error-code="no-untyped-def"
"""Compiled hashing: tokens to windows, windows and n-grams to row ids.

Reduction without division
    With m = floor(2**64 / p) and 2**64 = m*p + e, 0 <= e < p, any 0 <= h < 2**64 has
    h/p - h*m/2**64 = (h/2**64) * (e/p), which lies in [0, 1). So q = floor(h*m / 2**64) is the
    quotient or one less, h - q*p lies in [0, 2p), and one conditional subtraction finishes.
    The hash is a signed word: a negative one was read as h + 2**64, so 2**64 mod p is taken
    off again. For unsigned words `min(x, x - p)` is that conditional subtraction, because x - p
    wraps to a huge word exactly when x < p (p < 2**63).

Constants of a column are four words side by side: prime, m, offset, 2**64 mod p.
"""

from __future__ import annotations

import numpy as np

from engram._jit import kernel, multiply_high

VALID, BAD_START, BAD_END, BAD_ORDER, BAD_HISTORY, BAD_TOKEN = range(6)
"""What `check_batch` found first."""


@kernel
def check_batch(
    tokens,
    starts,
    history,
    dead,
    vocab_size,
    out,
):
    """Narrow `tokens` into `out` (int32); return what is wrong, and its flat position.

    `dead` is bool `[T]`, or of length 0 where no position is dead.
    """
    count = len(tokens)
    if starts[0] != 0:
        return BAD_START, 0
    for b in range(len(starts) - 1):
        if starts[b + 1] < starts[b]:
            return BAD_ORDER, b + 1
    if starts[len(starts) - 1] != count:
        return BAD_END, len(starts) - 1
    for b in range(history.shape[0]):
        for s in range(history.shape[1]):
            if history[b, s] < -1 or history[b, s] >= vocab_size:
                return BAD_HISTORY, b * history.shape[1] + s
    some_dead = len(dead) > 0
    for t in range(count):
        if some_dead and dead[t]:
            out[t] = -1
        elif tokens[t] < 0 or tokens[t] >= vocab_size:
            return BAD_TOKEN, t
        else:
            out[t] = tokens[t]
    return VALID, 0


@kernel
def _canonical(token, token_map):
    return np.int32(token_map[token]) if len(token_map) else np.int32(token)


@kernel
def windows(
    tokens,
    starts,
    history,
    token_map,
    blocked_id,
    boundary_id,
    out,
):
    """Fill `out` int32 `[T, max_order]`, newest first, from a checked batch.

    A token or history id of -1 is dead: it blocks itself and everything older. `boundary_id`
    (-1: none) does so only to newer positions. `token_map` has length 0 where ids are canonical.
    """
    width = out.shape[1]
    for b in range(len(starts) - 1):
        # `seen` entries precede the position unblocked; for the first they come from `history`.
        seen = 0
        while seen < width - 1:
            token = history[b, width - 2 - seen]
            if token < 0 or _canonical(token, token_map) == boundary_id:
                break
            seen += 1
        for t in range(starts[b], starts[b + 1]):
            token = tokens[t]
            if token < 0:
                seen = 0
                for s in range(width):
                    out[t, s] = blocked_id
                continue
            newest = _canonical(token, token_map)
            out[t, 0] = newest
            if t == starts[b]:
                for s in range(1, width):
                    out[t, s] = (
                        _canonical(history[b, width - 1 - s], token_map)
                        if s <= seen
                        else blocked_id
                    )
            else:
                for s in range(1, width):
                    out[t, s] = out[t - 1, s - 1] if s <= seen else blocked_id
            seen = 0 if newest == boundary_id else min(seen + 1, width - 1)


@kernel
def check_and_window(
    tokens,
    starts,
    history,
    dead,
    vocab_size,
    token_map,
    blocked_id,
    boundary_id,
    narrowed,
    out,
):
    """`check_batch` into `narrowed` and, if nothing is wrong, `windows` into `out`."""
    problem, where = check_batch(tokens, starts, history, dead, vocab_size, narrowed)
    if problem == VALID:
        windows(narrowed, starts, history, token_map, blocked_id, boundary_id, out)
    return problem, where


@kernel
def _row(word, constants):
    """Row id of a hash under one column's constants."""
    prime = constants[0]
    rest = np.uint64(word) - multiply_high(np.uint64(word), constants[1]) * prime
    rest = min(rest, rest - prime)
    if word < 0:
        rest -= constants[3]
        rest = min(rest, rest + prime)
    return np.int64(rest + constants[2])


@kernel
def hash_windows(
    window_ids,
    multipliers,
    constants,
    min_order,
    heads,
    out,
):
    """Fill `out` int64 `[N, layers, columns]` from int32 `[N, max_order]`."""
    for n in range(window_ids.shape[0]):
        for layer in range(multipliers.shape[0]):
            word = np.int64(0)
            column = 0
            for s in range(multipliers.shape[1]):
                word ^= np.int64(window_ids[n, s]) * multipliers[layer, s]
                if s + 1 >= min_order:
                    for c in range(column, column + heads):
                        out[n, layer, c] = _row(word, constants[layer, c])
                    column += heads


@kernel
def hash_ngrams(
    window_ids,
    orders,
    multipliers,
    constants,
    min_order,
    layers,
    columns,
    ordered,
    order_bounds,
):
    """Layer positions int32 `[R]` and row ids int64 `[R]` of n-grams, in canonical order.

    Also the first n-gram of an order that does not exist, or -1; with one, nothing is hashed.
    """
    count = 0
    bad = -1
    for n in range(len(orders)):
        first = orders[n] - min_order
        if first < 0 or first >= len(order_bounds) - 1:
            bad = n
            break
        count += order_bounds[first + 1] - order_bounds[first]
    if bad >= 0:
        return np.empty(0, np.int32), np.empty(0, np.int64), bad
    positions = np.empty(count * len(layers), np.int32)
    row_ids = np.empty(count * len(layers), np.int64)
    r = 0
    for n in range(len(orders)):
        first = orders[n] - min_order
        for layer in layers:
            word = np.int64(0)
            for s in range(orders[n]):
                word ^= np.int64(window_ids[n, s]) * multipliers[layer, s]
            for place in range(order_bounds[first], order_bounds[first + 1]):
                positions[r] = layer
                row_ids[r] = _row(word, constants[layer, columns[ordered[place]]])
                r += 1
    return positions, row_ids, bad
