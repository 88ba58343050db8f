"""Policies that need the exact order of hits, or every access: the references, not candidates."""

from __future__ import annotations

import numpy as np
from queues import (
    GHOST,
    MAIN,
    NOWHERE,
    PROTECTED,
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
def lru_touch(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    move(state, MAIN, key)


@kernel
def lru(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Least recently used goes."""
    if resident(state) >= state.limits[NOWHERE]:
        remove(state, oldest(state, MAIN))
    push(state, MAIN, key)


@kernel
def two_queues_touch(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    if state.home[key] == MAIN:
        move(state, MAIN, key)


@kernel
def two_queues(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """2Q (Johnson and Shasha, VLDB 1994): FIFO at first, LRU for what the ghosts bring back."""
    known = state.home[key] == GHOST
    if known:
        remove(state, key)
    if resident(state) >= state.limits[NOWHERE]:
        if state.sizes[SMALL] > state.limits[SMALL] or state.sizes[MAIN] == 0:
            victim = oldest(state, SMALL)
            remove(state, victim)
            remember(state, victim)
        else:
            remove(state, oldest(state, MAIN))
    push(state, MAIN if known else SMALL, key)


@kernel
def _cell(sketch, row, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mixed = (np.uint64(key) + np.uint64(row * 0x51ED270B + 1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return np.int64((mixed >> np.uint64(32)) & np.uint64(sketch.shape[1] - 1))


@kernel
def _count(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """One access more; after `numbers[1]` of them all counts are halved."""
    for row in range(len(state.sketch)):
        cell = _cell(state.sketch, row, key)
        if state.sketch[row, cell] < 15:
            state.sketch[row, cell] += 1
    state.numbers[2] += 1
    if state.numbers[2] == state.numbers[1]:
        state.numbers[2] //= 2
        for row in range(len(state.sketch)):
            for cell in range(state.sketch.shape[1]):
                state.sketch[row, cell] >>= 1


@kernel
def _frequency(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    least = 15
    for row in range(len(state.sketch)):
        least = min(least, state.sketch[row, _cell(state.sketch, row, key)])
    return least


@kernel
def tinylfu_touch(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    _count(state, key)
    if state.home[key] == SMALL:
        move(state, SMALL, key)
        return
    move(state, PROTECTED, key)
    if state.sizes[PROTECTED] > state.limits[PROTECTED]:
        move(state, MAIN, oldest(state, PROTECTED))


@kernel
def tinylfu(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """W-TinyLFU (Einziger et al., ACM ToS 2017): window, then segmented LRU by frequency."""
    _count(state, key)
    push(state, SMALL, key)
    if state.sizes[SMALL] <= state.limits[SMALL]:
        return
    candidate = oldest(state, SMALL)
    if resident(state) > state.limits[NOWHERE]:
        victim = oldest(state, MAIN if state.sizes[MAIN] else PROTECTED)
        if _frequency(state, candidate) <= _frequency(state, victim):
            remove(state, candidate)
            return
        remove(state, victim)
    move(state, MAIN, candidate)


@kernel
def next_uses(keys, at, later):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Fill `later` [A]: the next access of the same n-gram, or A; `at` [K] is A at first."""
    for i in range(len(keys) - 1, -1, -1):
        later[i] = at[keys[i]]
        at[keys[i]] = i


@kernel
def _sink(heap, size):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if heap[at] >= heap[child]:
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


@kernel
def _rise(heap, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    while at > 0 and heap[(at - 1) // 2] < heap[at]:
        heap[(at - 1) // 2], heap[at] = heap[at], heap[(at - 1) // 2]
        at = (at - 1) // 2


@kernel
def optimum(keys, starts, later, capacity, held, heap, missed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Belady's MIN with bypass: what is used again last gives way, or is not admitted.

    `held` [K] 0 at first; `heap` [A] takes next uses, those of past accesses sink by themselves.
    """
    size = 0
    residents = 0
    for batch in range(len(starts) - 1):
        for i in range(starts[batch], starts[batch + 1]):
            missed[i] = held[keys[i]] == 0
            if not missed[i]:
                if later[i] == len(keys):
                    held[keys[i]] = 0
                    residents -= 1
                else:
                    heap[size] = later[i]
                    size += 1
                    _rise(heap, size - 1)
        for i in range(starts[batch], starts[batch + 1]):
            if not missed[i] or later[i] == len(keys):
                continue
            if residents == capacity:
                if heap[0] < later[i]:
                    continue
                held[keys[heap[0]]] = 0
                size -= 1
                heap[0] = heap[size]
                _sink(heap, size)
                residents -= 1
            held[keys[i]] = 1
            residents += 1
            heap[size] = later[i]
            size += 1
            _rise(heap, size - 1)
