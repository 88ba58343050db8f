"""The RAM tier itself without its rows: the truth that simulations are held against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from unittest import mock

import numpy as np

from engram._ngrams import number_ngrams
from engram.ram import _deliver, _probe
from engram.ram.cache import Cache, CachedTable
from engram.ram.layout import ArenaLayout, BundleLayout
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.tiers import Int32s, Ngrams


class RealTier:
    """`Cache`, its kernels and all, with slots that hold keys only.

    Args:
        spec: of the table.
        slots: of the tier.
    """

    def __init__(self, spec: NgramSpec, slots: int) -> None:
        self._spec = spec
        keys = replace(BundleLayout.of(spec, RowFormat("bf16", spec.dim)), layers=0)
        layout = ArenaLayout.with_slots(slots, keys.slot_bytes, keys.head_bytes)
        # The seed says which ghosts share a set: with this one, results are always the same.
        with mock.patch("secrets.randbits", return_value=0):
            self._cache = Cache([CachedTable("0" * 32, spec.min_order, keys)], layout, shared=False)
        self._every = np.ones(spec.num_orders, np.bool_)
        self.accesses = self.misses = self.reads = 0

    def lookup(self, windows: Int32s) -> None:
        """As `BundleTier.lookup`: probe everything, then keep what was missed, each once.

        Args:
            windows: int32 `[T, max_order]`, C-contiguous.
        """
        spec, view = self._spec, self._cache.views[0]
        slots = np.empty((len(windows), spec.num_orders), np.int64)
        misses: int = _probe.probe(view, windows, self._every, slots)
        self.accesses += slots.size
        self.misses += misses
        if not misses:
            return
        asked = Ngrams(np.full((misses, spec.max_order), -1, np.int32), np.empty(misses, np.int32))
        missed = np.empty(misses, np.int64)
        _deliver.collect_missed(
            windows, spec.min_order, self._every, slots, missed, asked.windows, asked.orders
        )
        firsts, _ = number_ngrams(asked)
        self.reads += len(firsts)
        self._cache.fill(0, asked.take(firsts), np.ones(len(firsts), np.int64))

    def run(self, lookups: Iterable[Int32s]) -> float:
        """Hits of all accesses of `lookups`, 0 to 1."""
        for windows in lookups:
            self.lookup(windows)
        return 1 - self.misses / self.accesses
