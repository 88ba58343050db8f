"""One step on a device: from windows to embeddings, wherever the n-grams are.

The host finds an address for every n-gram of a step: on the device, in the arena, or in staging,
where misses are fetched to. Then one launch on a stream of its own gathers them all. What the
launch overwrites or reads is safe because of who holds what until when:

    on the device  everything that reads or writes slots is queued on this one stream, in the order
                   in which the directory said so
    in the arena   an epoch is held until the launch has ended, so no slot is reused
    in staging     a half is written again once the launch that read it has ended
    the output     fresh memory of this stream, or the caller's, which is written only behind what
                   the caller's stream had queued before
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from engram._counters import Counters
from engram._ngrams import distinct_ngrams, number_ngrams
from engram.errors import EngramError, StoreError
from engram.gpu import _sources
from engram.gpu.gather import Gather
from engram.gpu.hbm import Hbm
from engram.gpu.launches import Launch, Launches
from engram.gpu.plan import Plan
from engram.gpu.prefetch import CHUNK_NGRAMS, Prefetcher
from engram.gpu.reach import Reach, Staging, reach_of
from engram.ram import _deliver
from engram.ram.bundle_tier import BundleTier, InPlace
from engram.tiers import Int32s, Int64s, Ngrams, Prefetch, Selection

cuda: Any = torch.cuda  # parts of it have no types
BLOCK_TOKENS = 8192
"""Tokens of one launch, at most: what bounds staging."""
_COLLECT_S = 0.01
_NO_VIEW = np.empty(0, np.int64)
_STEPS_TO_KEEP = 16
"""Whose n-grams wait to be kept; what is older comes again, or not."""


class _Found(NamedTuple):
    """Whether something of a step is in staging, and whether something is to be kept."""

    staged: bool
    kept: bool


class GpuTier:
    """Embeddings of one table and selection on one device. Safe to use from several threads.

    On a CPU the same code runs with the host's gather.

    Args:
        tier: the RAM tier of the table, of this process or a sidecar.
        selection: what to gather.
        device: where to; a CUDA device, or the CPU.
        capacity: bytes of the device's memory for n-grams that come again; 0 keeps none there.

    Raises:
        ConfigError: the device has not so much memory free.
    """

    def __init__(
        self, tier: BundleTier, selection: Selection, device: torch.device, capacity: int = 0
    ) -> None:
        self.tier = tier
        self.selection = selection
        self.device = device
        self.capacity = capacity
        self.plan = Plan.of(tier.bundle, selection)
        self._every = np.diff(selection.order_bounds) > 0
        self._orders_used = int(self._every.sum())
        self._gather = Gather(self.plan, tier.row_format, device)
        self._cuda = device.type == "cuda"
        self.stream: Any = cuda.Stream(device, priority=-1) if self._cuda else None
        self._staging = Staging(device)
        self._hbm: Hbm | None = None
        if capacity:
            with torch.cuda.stream(self.stream):  # whose memory it is; nothing on a CPU
                self._hbm = Hbm(
                    tier.bundle, tier.fingerprint, selection.min_order, self.plan, capacity, device
                )
        self._lock = threading.Lock()
        self._launches = Launches(device, self.plan.orders)
        self._collecting = self._forked = False
        self._counters = Counters(
            "steps", "ngrams_on_device", "ngrams_in_place", "ngrams_staged", "prefetched_late"
        )
        self._closed = False
        self._prefetcher = Prefetcher(self._keep_prefetched)
        self._to_keep: deque[Int32s] = deque(maxlen=_STEPS_TO_KEEP)
        self._in_place: InPlace | None = tier.in_place()
        self._reach: Reach | None = reach_of(self._in_place, device)
        _ALL.add(self)

    def embed(self, windows: Int32s, out: torch.Tensor) -> list[Launch]:
        """Queue the embeddings of all tokens on `stream`.

        Args:
            windows: int32 `[T, max_order]`.
            out: floating `[layers, T, columns, dim]` on the device, contiguous, not in use by
                what is queued on other streams.

        Returns:
            the launches that fill `out`: wait for the event of the last one, and `check` them.

        Raises: as `Tier.read`. Nothing may be read from `out` then.
        """
        tokens = len(windows)
        launches = []
        with self._lock:
            self._collect()
            for first in range(0, tokens, BLOCK_TOKENS):
                block = windows[first : first + BLOCK_TOKENS]
                part = out if len(block) == tokens else out[:, first : first + len(block)]
                launches.append(self._launch(block, part))
        self._counters.add(steps=1)
        if not self._cuda:
            self._keep_steps()
        return launches

    def check(self, launches: Sequence[Launch]) -> None:
        """Make sure that all that launches read had kept its bytes, until now.

        Raises:
            UnavailableError: a sidecar that may be alive has ended the lease; from then on for
                ever.
        """
        with self._lock:
            self._distrust(self._launches.examine())
        for launch in launches:
            if launch.lost is not None:
                raise launch.lost

    def prefetch(self, ngrams: Ngrams) -> Prefetch:
        """Bring n-grams to the device, as far as there is room for them; returns at once."""
        below = self.tier.prefetch(ngrams)
        if self._hbm is None or not self.tier.in_place().slabs:
            return below
        mine = ngrams.take(np.flatnonzero(self._every[ngrams.orders - self.selection.min_order]))
        lacking = np.flatnonzero(~self._hbm.present(mine))
        return self._prefetcher.start(mine.take(lacking), below)

    def _keep_prefetched(self, ngrams: Ngrams) -> Ngrams:
        """Copy what is in the arena to the device; returns the others."""
        assert self._hbm is not None
        with self._lock:
            self._counters.add(prefetched_late=int(self._hbm.present(ngrams).sum()))
            return self._keep(ngrams, prefetched=True)

    def _keep_steps(self) -> None:
        """Copy n-grams of past steps that were read from the arena."""
        while self._to_keep:
            ngrams, _, _ = distinct_ngrams(
                self._to_keep.popleft(), self.selection.min_order, self.selection
            )
            for first in range(0, len(ngrams), CHUNK_NGRAMS):
                # A part at a time, because steps wait for the lock.
                some = ngrams.take(slice(first, first + CHUNK_NGRAMS))
                with self._lock, suppress(EngramError):
                    self._keep(some, prefetched=False)

    def _keep(self, ngrams: Ngrams, *, prefetched: bool) -> Ngrams:
        assert self._hbm is not None
        self._collect()
        left = ngrams.take(np.flatnonzero(~self._hbm.present(ngrams)))
        in_place, reach = self._arena()
        held = in_place.epochs.enter()
        found = np.empty(len(left), np.int64)
        try:
            _sources.find_in_place(in_place.view, reach.reachable, left.windows, left.orders, found)
            come = np.flatnonzero(found)
            if not len(come):
                in_place.epochs.leave(held)
                return left
            room = self._launches.room(len(come))
            room.array[:] = 0
            sources, keep = room.array
            at = (np.arange(len(come)), left.orders[come] - self.selection.min_order)
            sources[at] = found[come]
            keep[at] = self._hbm.admit(left.take(come), prefetched=prefetched)
            # What is not kept is not read either.
            sources[keep == 0] = 0
            done = self._queue(room.tensor, None, kept=True)
        except BaseException:
            self._failed(in_place, held)
            raise
        self._hbm.came()
        self._queued(Launch(done, in_place, held, room))
        return left.take(np.flatnonzero(found == 0))

    def _launch(self, windows: Int32s, out: torch.Tensor) -> Launch:
        in_place, reach = self._arena()
        room = self._launches.room(len(windows))
        held = in_place.epochs.enter()
        kept = self._hbm.enter() if self._hbm else 0
        try:
            found = self._find(windows, in_place, reach, room.array)
            done = self._queue(room.tensor, out, kept=found.kept)
            if found.staged:
                self._staging.queued(done)
        except BaseException:
            self._failed(in_place, held)
            raise
        if self._hbm:
            self._hbm.leave(kept)
            self._hbm.came()
        return self._queued(Launch(done, in_place, held, room))

    def _failed(self, in_place: InPlace, held: int) -> None:
        """Leave nothing of a launch that failed, at whatever point."""
        if self._cuda:
            self.stream.synchronize()  # it may have been queued all the same
        in_place.epochs.leave(held)
        if self._hbm:
            self._hbm.did_not_come()

    def _queued(self, launch: Launch) -> Launch:
        self._launches.add(launch)
        if launch.done is None:
            self._collect()
        elif not self._collecting:
            thread = threading.Thread(target=self._collect_later, name="engram-gpu", daemon=True)
            with suppress(RuntimeError):  # no thread can be started now: the next step collects
                thread.start()
                self._collecting = True
        return launch

    def _distrust(self, whole: bool) -> None:
        """Forget what is on the device if launches may have put anything there."""
        if not whole and self._hbm is not None:
            self._hbm.forget()

    def _collect(self) -> None:
        self._distrust(self._launches.collect())

    def _queue(self, addresses: torch.Tensor, out: torch.Tensor | None, *, kept: bool) -> Any:
        if not self._cuda:
            self._gather(addresses, out, kept=kept)
            return None
        self._gather(addresses, out, self.stream, kept=kept)
        return self._launches.event(self.stream)

    def _arena(self) -> tuple[InPlace, Reach]:
        """The arena in use; a sidecar that was restarted has another."""
        if self._forked:
            raise StoreError(
                f"{self.tier.name}: the GPU tier belongs to the process that this one was forked "
                "from; open the table in this process"
            )
        in_place = self.tier.in_place()
        if self._closed:
            raise StoreError(f"{self.tier.name}: the GPU tier is closed")
        if in_place is not self._in_place or self._reach is None:
            self._in_place, self._reach = in_place, reach_of(in_place, self.device)
        return in_place, self._reach

    def _find(
        self, windows: Int32s, in_place: InPlace, reach: Reach, addresses: np.ndarray
    ) -> _Found:
        """Set sources and what to keep."""
        sources, keep = addresses
        hbm, wanted = self._hbm, len(windows) * self._orders_used
        absent, lacking = _sources.find_everywhere(
            _NO_VIEW if hbm is None else hbm.view,
            0 if hbm is None else hbm.first,
            self.plan.slot_bytes,
            in_place.view,
            reach.reachable,
            windows,
            self._every,
            sources,
        )
        if not lacking:
            if absent and hbm is not None:
                # What is in the arena comes to the device behind this step, not before it.
                self._to_keep.append(windows)
            self._counters.add(ngrams_on_device=wanted - absent, ngrams_in_place=absent)
            return _Found(staged=False, kept=False)
        if hbm is None:
            slots, absent = np.full(sources.shape, -1, np.int64), wanted
        else:
            slots, absent = hbm.find(windows, self._every, sources)
        keep[:] = 0
        missed = np.empty(absent, np.int64)
        listed = Ngrams(
            np.full((absent, windows.shape[1]), -1, np.int32), np.empty(absent, np.int32)
        )
        _deliver.collect_missed(
            windows,
            self.selection.min_order,
            self._every,
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
        if lacking:
            self._stage(ngrams, found)
        if not found.all():
            raise StoreError(f"{self.tier.name}: an n-gram was neither found nor reported failed")
        kept = hbm.admit(ngrams) if hbm else np.zeros(len(ngrams), np.int64)
        _sources.spread(missed, number, firsts, found, kept, sources.reshape(-1), keep.reshape(-1))
        self._counters.add(
            ngrams_on_device=wanted - absent,
            ngrams_in_place=len(ngrams) - lacking,
            ngrams_staged=lacking,
        )
        return _Found(staged=lacking > 0, kept=bool(kept.any()))

    def _stage(self, ngrams: Ngrams, found: Int64s) -> None:
        """Fetch n-grams that `found` has no address of, and set it."""
        rest = np.flatnonzero(found == 0)
        size = self.tier.bundle.slot_bytes
        target = self._staging.take(len(rest) * size)

        def deliver(first: int, bundles: Int64s) -> None:
            placed = np.empty(len(bundles), np.int64)
            _sources.copy_bundles(bundles, size, target + first * size, size, placed)
            found[rest[first : first + len(bundles)]] = placed

        self.tier.fetch_all(ngrams.take(rest), self.selection, deliver)

    def _collect_later(self) -> None:
        """A thread's: an idle reader must not hold slots that others wait for, and what steps read
        from the arena is to be kept."""
        try:
            while True:
                time.sleep(_COLLECT_S)
                self._keep_steps()
                with self._lock:
                    self._collect()
                    if not self._launches and not self._to_keep:
                        self._collecting = False
                        return
        except BaseException:
            self._collecting = False  # the next step starts another
            raise

    def stats(self) -> dict[str, Any]:
        """Counters since the start, by name; plain ints and strings."""
        kept = self._hbm.stats() if self._hbm else {}
        return {
            "tier": "gpu",
            **kept,
            **self._counters.read(),
            "staging_bytes": self._staging.bytes,
            "registered_bytes": self._reach.registered_bytes if self._reach else 0,
        }

    def check_integrity(self) -> None:
        if self._hbm is not None:
            self._hbm.check_integrity()

    def close(self) -> None:
        """Wait for what is queued and free everything; safe to call twice."""
        if self._forked:
            return
        with self._lock:
            self._closed = True
            self._prefetcher.close()
            self._to_keep.clear()
            if self._cuda:
                self.stream.synchronize()
            self._collect()
            self._launches.clear()
            self._in_place = self._reach = None
            self._staging = Staging(self.device)
            if self._hbm is not None:
                self._hbm.close()


_ALL: weakref.WeakSet[GpuTier] = weakref.WeakSet()


def _disown() -> None:
    # A child has neither the device's streams nor the threads; and any lock may be held.
    for tier in _ALL:
        tier._forked, tier._lock = True, threading.Lock()


os.register_at_fork(after_in_child=_disown)
