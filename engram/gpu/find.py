"""An address for every n-gram of a step: on the device, in the arena, or in staging."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engram._counters import Counters
from engram._ngrams import number_ngrams
from engram.errors import StoreError
from engram.gpu import _sources
from engram.gpu.hbm import Hbm
from engram.gpu.launches import Room
from engram.gpu.plan import Plan
from engram.gpu.reach import Reach, Staging
from engram.ram import _deliver
from engram.ram.bundle_tier import BundleTier, InPlace
from engram.tiers import Int32s, Int64s, Ngrams, Selection

_NO_VIEW = np.empty(0, np.int64)


class Found(NamedTuple):
    """Whether something of a step is not on the device yet, whether something is in staging, and
    whether something is to be kept by the launch itself."""

    in_place: bool
    staged: bool
    kept: bool


_ON_DEVICE = Found(in_place=False, staged=False, kept=False)
_IN_PLACE = Found(in_place=True, staged=False, kept=False)


class Finder:
    """Finds them under its tier's lock, and has fetched what is nowhere.

    Args:
        tier: the RAM tier.
        selection, plan: what is gathered.
        hbm: what is on the device; None if nothing is kept there.
        staging: where misses go.

    Attributes:
        every: bool `[orders]`, which orders are selected.
        counters: of launches, and of tokens' n-grams by where they were.
    """

    def __init__(
        self, tier: BundleTier, selection: Selection, plan: Plan, hbm: Hbm | None, staging: Staging
    ) -> None:
        self._tier = tier
        self._selection = selection
        self._plan = plan
        self._hbm = hbm
        self._staging = staging
        self.every = np.diff(selection.order_bounds) > 0
        self._orders_used = int(self.every.sum())
        self.counters = Counters("launches", "ngrams_on_device", "ngrams_in_place", "ngrams_staged")

    def find(self, windows: Int32s, in_place: InPlace, reach: Reach, room: Room) -> Found:
        """Set the sources of a step, and where to keep what of it comes to the device.

        Args:
            windows: int32 `[T, max_order]`.
            in_place, reach: the arena, of which an epoch is held.
            room: of these tokens.

        Raises: as `Tier.read`.
        """
        hbm, wanted = self._hbm, len(windows) * self._orders_used
        absent, lacking = _sources.find_everywhere(
            _NO_VIEW if hbm is None else hbm.view,
            0 if hbm is None else hbm.first,
            self._plan.slot_bytes,
            in_place.view,
            reach.reachable,
            windows,
            self.every,
            room.sources,
        )
        if not lacking:
            self.counters.add(launches=1, ngrams_on_device=wanted - absent, ngrams_in_place=absent)
            return _IN_PLACE if absent else _ON_DEVICE
        if hbm is None:
            return self._find_rest(windows, in_place, reach, room)
        kept = hbm.enter()
        try:
            return self._find_rest(windows, in_place, reach, room)
        finally:
            hbm.leave(kept)

    def _find_rest(self, windows: Int32s, in_place: InPlace, reach: Reach, room: Room) -> Found:
        """As `find`, where some n-grams are to be fetched first."""
        sources, keep, hbm = room.sources, room.keep, self._hbm
        wanted = len(windows) * self._orders_used
        if hbm is None:
            slots, absent = np.full(sources.shape, -1, np.int64), wanted
        else:
            slots, absent = hbm.find(windows, self.every, sources)
        keep[:] = 0
        missed = np.empty(absent, np.int64)
        listed = Ngrams(
            np.full((absent, windows.shape[1]), -1, np.int32), np.empty(absent, np.int32)
        )
        _deliver.collect_missed(
            windows,
            self._selection.min_order,
            self.every,
            slots,
            missed,
            listed.windows,
            listed.orders,
        )
        firsts, number = number_ngrams(listed)
        ngrams = listed.take(firsts)
        found = np.empty(len(ngrams), np.int64)
        lacking = _sources.find_in_place(
            in_place.view, reach.reachable, ngrams.windows, ngrams.orders, found
        )
        there = int(np.count_nonzero(found[number]))
        if lacking:
            self._stage(ngrams, found)
        if not found.all():
            raise StoreError(f"{self._tier.name}: an n-gram was neither found nor reported failed")
        kept = hbm.admit(ngrams) if hbm else np.zeros(len(ngrams), np.int64)
        _sources.spread(missed, number, firsts, found, kept, sources.reshape(-1), keep.reshape(-1))
        staged = absent - there
        _sources.count_found(in_place.view, wanted - absent, there, staged)
        self.counters.add(
            launches=1,
            ngrams_on_device=wanted - absent,
            ngrams_in_place=there,
            ngrams_staged=staged,
        )
        return Found(in_place=absent > 0, staged=lacking > 0, kept=bool(kept.any()))

    def _stage(self, ngrams: Ngrams, found: Int64s) -> None:
        """Fetch n-grams that `found` has no address of, and set it."""
        rest = np.flatnonzero(found == 0)
        size = self._tier.bundle.slot_bytes
        target = self._staging.take(len(rest) * size)

        def deliver(first: int, bundles: Int64s) -> None:
            placed = np.empty(len(bundles), np.int64)
            _sources.copy_bundles(bundles, size, target + first * size, size, placed)
            found[rest[first : first + len(bundles)]] = placed

        self._tier.fetch_all(ngrams.take(rest), self._selection, deliver)
