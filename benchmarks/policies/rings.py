"""Policies that only look at a touched count when they look for a victim: no order of hits.

A hit adds one to the n-gram's count, up to `numbers[0]`; a client can do that for itself.
"""

from __future__ import annotations

import numpy as np
from queues import (
    GHOST,
    MAIN,
    NOWHERE,
    SMALL,
    kernel,
    move,
    oldest,
    push,
    remember,
    remove,
    resident,
)


@kernel
def touch(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Every policy here: count the hit."""
    if state.touched[key] < state.numbers[0]:
        state.touched[key] += 1


@kernel
def _new(state, queue, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    state.touched[key] = 0
    push(state, queue, key)


@kernel
def _evict_main(state):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """CLOCK: the oldest goes, unless touched: then it starts again, one touch poorer.

    With `numbers[3]`, without any: as if the count were only ever cleared.
    """
    while True:
        key = oldest(state, MAIN)
        if state.touched[key] == 0:
            remove(state, key)
            return
        state.touched[key] = 0 if state.numbers[3] else state.touched[key] - 1
        move(state, MAIN, key)


@kernel
def clock(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """CLOCK, and FIFO where `numbers[0]` is 0."""
    if resident(state) >= state.limits[NOWHERE]:
        _evict_main(state)
    _new(state, MAIN, key)


@kernel
def doorkeeper(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """CLOCK that admits an n-gram once it is missed while still remembered from its last miss."""
    if resident(state) < state.limits[NOWHERE]:
        _new(state, MAIN, key)
    elif state.home[key] == GHOST:
        remove(state, key)
        _evict_main(state)
        _new(state, MAIN, key)
    else:
        remember(state, key)


@kernel
def sieve(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """SIEVE (Zhang et al., NSDI 2024); the hand is `numbers[1]`, -1 before the first round."""
    if resident(state) >= state.limits[NOWHERE]:
        mark = len(state.home) + MAIN
        hand = state.numbers[1]
        if hand < 0:
            hand = mark
        while True:
            if hand == mark:
                hand = np.int64(oldest(state, MAIN))
            if state.touched[hand] == 0:
                break
            state.touched[hand] = 0
            hand = np.int64(state.newer[hand])
        state.numbers[1] = state.newer[hand]
        remove(state, hand)
    _new(state, MAIN, key)


@kernel
def _evict_s3fifo(state):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Room for one: from the small queue while that is over its share, else from the main one."""
    while state.sizes[SMALL] > 0:
        if state.sizes[SMALL] < state.limits[SMALL] and state.sizes[MAIN] > 0:
            break
        key = oldest(state, SMALL)
        if state.touched[key] >= state.numbers[1]:
            state.touched[key] = 0
            move(state, MAIN, key)
        else:
            remove(state, key)
            if state.numbers[2]:
                _table_put(state.sketch, key)
            else:
                remember(state, key)
            return
    _evict_main(state)


@kernel
def s3fifo(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """S3-FIFO (Yang et al., SOSP 2023).

    `numbers[1]`: touches that promote from the small queue; `numbers[2]`: whether ghosts are
    fingerprints in a table.
    """
    if state.numbers[2]:
        known = _table_take(state.sketch, key)
    else:
        known = state.home[key] == GHOST
        if known:
            remove(state, key)
    if resident(state) >= state.limits[NOWHERE]:
        _evict_s3fifo(state)
    _new(state, MAIN if known else SMALL, key)


@kernel
def _fingerprint(table, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Bucket and fingerprint (never 0) of an n-gram."""
    mixed = (np.uint64(key) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(29)
    bucket = np.int64((mixed >> np.uint64(32)) % np.uint64(len(table)))
    return bucket, np.uint32(mixed & np.uint64(0xFFFF)) | np.uint32(1 << 16)


@kernel
def _table_put(table, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Remember as the newest of the bucket, which forgets its oldest."""
    bucket, mark = _fingerprint(table, key)
    ways = table[bucket]
    for i in range(len(ways) - 1, 0, -1):
        ways[i] = ways[i - 1]
    ways[0] = mark


@kernel
def _table_take(table, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Whether the n-gram is remembered; forgets it."""
    bucket, mark = _fingerprint(table, key)
    ways = table[bucket]
    for i in range(len(ways)):
        if ways[i] == mark:
            for j in range(i, len(ways) - 1):
                ways[j] = ways[j + 1]
            ways[len(ways) - 1] = 0
            return True
    return False
