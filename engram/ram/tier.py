"""The RAM tier of this process: bundles in memory above any other tier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engram._failures import Failures
from engram.errors import StoreError
from engram.ram.bundle_tier import BundleTier, Deliver, InPlace
from engram.ram.cache import Cache, CachedTable
from engram.ram.epochs import Epochs
from engram.ram.layout import STAGED_HEAD_BYTES, ArenaLayout, BundleLayout
from engram.ram.memory import Memory
from engram.ram.misses import TURN_NGRAMS, MissPath
from engram.rows import Rows
from engram.tiers import Int64s, Ngrams, Prefetch, Selection, Tier

FETCH_NGRAMS = TURN_NGRAMS // 2
_SPARE_MAX = 4


class RamTier(BundleTier):
    """Serves hits from a `Cache` and the rest from the tier below, which it fills the cache with.

    Args:
        backing: the tier below; closed with this one.
        cache: where bundles are kept; its table `number` is this one.
    """

    backing: Tier

    def __init__(self, backing: Tier, cache: Cache, number: int) -> None:
        super().__init__()
        self.backing = backing
        self.cache = cache
        self.number = number
        self.bundle = cache.bundles[number]
        self.spec = backing.spec
        self.row_format = backing.row_format
        self.name = backing.name
        self.fingerprint = backing.fingerprint
        self.misses = MissPath(backing, cache, number)
        self._own_epochs = Epochs(cache.own_readers[number], cache.directories[number])
        self._in_place: InPlace | None = None
        self._spare: list[Memory] = []
        self._closed = False

    def _view(self) -> Int64s:
        views = self.cache.views
        self._require_open()
        return views[self.number]

    def in_place(self) -> InPlace:
        view = self._view()
        cache = self.cache
        with cache.lock:
            if self._in_place is None or self._in_place.view is not view:
                self._in_place = InPlace(
                    view, cache.slabs, self._own_epochs, lambda: cache.reserved, lambda: None
                )
            return self._in_place

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.name}: the table is closed; open it again")

    def _epochs(self) -> Epochs:
        return self._own_epochs

    def fetch(self, ngrams: Ngrams, selection: Selection, deliver: Deliver) -> Failures:
        stride = self.bundle.staged_bytes
        bundle = STAGED_HEAD_BYTES + self.bundle.head_bytes
        failures = Failures()
        # Reused, because fresh memory costs a page fault for every page.
        room = self._spare.pop() if self._spare else Memory.private(FETCH_NGRAMS * stride)
        try:
            for first in range(0, len(ngrams), FETCH_NGRAMS):
                some, then = (
                    ngrams.take(slice(at, at + FETCH_NGRAMS))
                    for at in (first, first + FETCH_NGRAMS)
                )
                failed = self.misses.read(some, room.address, then=then)
                failures.add(failed.rows, failed.cause)
                deliver(first, room.address + bundle + stride * np.arange(len(some)))
        finally:
            if len(self._spare) < _SPARE_MAX:
                self._spare.append(room)
        return failures

    def read_rows(self, layer: int, row_ids: Int64s, out: Rows, places: Int64s) -> None:
        self._require_open()
        self.backing.read_rows(layer, row_ids, out, places)

    def prefetch(self, ngrams: Ngrams) -> Prefetch:
        self._require_open()
        if self.cache.layout.slots:
            return self.misses.prefetch(ngrams)
        return self.backing.prefetch(ngrams)

    def stats(self) -> dict[str, Any]:
        return {
            "tier": "ram",
            **self.cache.stats(),
            **self.cache.counts(self.number),
            **self.misses.counters.read(),
        }

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        self.misses.check_integrity()
        self.backing.check_integrity()

    def close(self) -> None:
        self._closed = True
        self._in_place = None
        self.misses.close()
        self.cache.close(self.number)
        self._spare.clear()
        self.backing.close()


def ram_tiers(
    backing: Mapping[str, Tier], budget: int, *, shared: bool, boot_id: bytes | None = None
) -> dict[str, RamTier]:
    """RAM tiers above tables, all in one budget.

    Tables whose bundles have the same size share an arena, where what is used most stays; the
    budget is divided between sizes by the number of their tables.

    Args:
        backing: the tables' tiers, by name.
        budget: bytes of all arenas and directories; 0 caches nothing.
        shared: see `Cache`.
        boot_id: see `Cache`.

    Raises:
        ConfigError: there is not so much memory.
    """
    sizes: dict[tuple[int, int], list[str]] = {}
    bundles = {name: BundleLayout.of(t.spec, t.row_format) for name, t in backing.items()}
    for name, bundle in bundles.items():
        sizes.setdefault((bundle.slot_bytes, bundle.head_bytes), []).append(name)
    tiers = {}
    for (slot_bytes, head_bytes), names in sizes.items():
        share = budget * len(names) // len(backing)
        layout = ArenaLayout.within(share, slot_bytes, head_bytes, len(names))
        tables = [
            CachedTable(backing[name].fingerprint, backing[name].spec.min_order, bundles[name])
            for name in names
        ]
        cache = Cache(tables, layout, shared=shared, boot_id=boot_id)
        for number, name in enumerate(names):
            tiers[name] = RamTier(backing[name], cache, number)
    return {name: tiers[name] for name in backing}
