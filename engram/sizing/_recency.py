# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: miniatures of a cache that evicts what was used least recently, like the page cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engram._jit import kernel
from engram.sizing._miniature import ACCESSES, MISSES, READS, enter, find, group_of, leave, limit_of


class RecencyBank(NamedTuple):
    """M miniatures of at most m slots; fields that `Bank` has, too, are as there.

    Attributes:
        newer, older: int32 `[M, m + 1]`, neighbours of each slot by last use; slot m is the end.
        used: int64 `[M]`, slots in use.
    """

    levels: Any
    slots: Any
    keys: Any
    newer: Any
    older: Any
    index: Any
    used: Any
    counts: Any


@kernel
def _unlink(newer, older, slot):
    newer[older[slot]] = newer[slot]
    older[newer[slot]] = older[slot]


@kernel
def _link_newest(newer, older, slot):
    end = newer.size - 1
    below = older[end]
    older[slot], newer[slot] = below, end
    newer[below] = slot
    older[end] = slot


@kernel
def feed_recency(bank, hashes, starts):
    """As `engram.sizing._miniature.feed`."""
    missed = np.empty(hashes.size, np.bool_)
    for i in range(bank.slots.size):
        _run(bank, i, hashes, starts, missed)


@kernel
def _run(bank, i, hashes, starts, missed):
    limit, index, keys, counts = (
        limit_of(bank.levels[i]),
        bank.index[i],
        bank.keys[i],
        bank.counts[i],
    )
    newer, older = bank.newer[i], bank.older[i]
    for lookup in range(starts.size - 1):
        for a in range(starts[lookup], starts[lookup + 1]):
            missed[a] = False
            if hashes[a] > limit:
                continue
            counts[group_of(hashes[a]), ACCESSES] += 1
            slot = find(index, keys, hashes[a])
            if slot >= 0:
                _unlink(newer, older, slot)
                _link_newest(newer, older, slot)
            else:
                counts[group_of(hashes[a]), MISSES] += 1
                missed[a] = True
        for a in range(starts[lookup], starts[lookup + 1]):
            if missed[a] and find(index, keys, hashes[a]) < 0:
                counts[group_of(hashes[a]), READS] += 1
                slot = bank.used[i]
                if slot < bank.slots[i]:
                    bank.used[i] += 1
                else:
                    slot = np.int64(newer[newer.size - 1])
                    leave(index, keys, slot)
                    _unlink(newer, older, slot)
                keys[slot] = hashes[a]
                enter(index, keys, slot)
                _link_newest(newer, older, slot)
