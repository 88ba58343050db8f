"""Which n-grams are in the RAM tier."""

from __future__ import annotations

import numpy as np

from engram.ram import _fill, _policy
from engram.ram.cache import Cache
from engram.tiers import Ngrams

_SLOTS_AT_ONCE = 1 << 16
"""Slots looked at while misses wait for the lock."""


def keys_of(cache: Cache, number: int, most: int) -> Ngrams:
    """N-grams of a table that a cache holds, those that came again before the others.

    Args:
        number: of the table in the cache.
        most: so many at most. What comes and goes meanwhile may be left out, or be there twice.

    Raises:
        StoreError: the table is closed.
    """
    windows = np.full((most, cache.bundles[number].max_order), -1, np.int32)
    orders = np.empty(most, np.int32)
    found = 0
    for place in (_policy.MAIN, _policy.SMALL):
        for first in range(0, cache.layout.slots, _SLOTS_AT_ONCE):
            last = min(cache.layout.slots, first + _SLOTS_AT_ONCE)
            with cache.lock:
                view, state = cache._open_view(number), cache._writer.state
                found += _fill.list_keys(
                    view, state, place, first, last, windows[found:], orders[found:]
                )
    return Ngrams(windows[:found], orders[:found])
