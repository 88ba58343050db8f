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
from typing import Any

import numpy as np
import torch

from engram._ngrams import distinct_ngrams
from engram.errors import EngramError, StoreError
from engram.gpu import _sources
from engram.gpu.find import Finder
from engram.gpu.gather import Gather
from engram.gpu.hbm import Hbm
from engram.gpu.launches import Launch, Launches, Room
from engram.gpu.plan import Plan
from engram.gpu.prefetch import CHUNK_NGRAMS, Prefetcher
from engram.gpu.reach import Reach, Staging, reach_of
from engram.ram.bundle_tier import BundleTier, InPlace
from engram.tiers import Int32s, Ngrams, Prefetch, Selection

cuda: Any = torch.cuda  # parts of it have no types
BLOCK_TOKENS = 8192
"""Tokens of one launch, at most: what bounds staging."""
_COLLECT_S = 0.01
_STEPS_TO_KEEP = 16
"""Whose n-grams wait to be kept; what is older comes again, or not."""
_STEP_BUSY_S = 0.001
"""So long after its beginning a step has the host queue things."""
_STEPS_WITHIN_S = 0.05
"""Steps that begin within so long of each other are taken to come regularly."""
_UNDER_WAY = 4
"""So many launches may hold what they hold until somebody has time to look whether they ended."""


class GpuTier:
    """Embeddings of one table and selection on one device. Safe to use from several threads.

    On a CPU the same code runs with the host's gather.

    Args:
        tier: the RAM tier of the table, of this process or a sidecar.
        selection: what to gather.
        device: where to; a CUDA device, or the CPU.
        capacity: bytes of the device's memory for n-grams that come again; 0 keeps none there.

    Attributes:
        width: of a token's embedding in one layer, columns * dim.

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
        self.width = self.plan.columns * tier.row_format.dim
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
        self._finder = Finder(tier, selection, self.plan, self._hbm, self._staging)
        self._began = self._interval = 0.0
        self._lock = threading.Lock()
        self._launches = Launches(device, self.plan.orders)
        self._collecting = self._forked = False
        self._prefetched_late = 0
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
            out: floating `[layers, T, columns, dim]` on the device, or any view of that,
                contiguous, not in use by what is queued on other streams.

        Returns:
            the launches that fill `out`: wait for the event of the last one, and `check` them.

        Raises: as `Tier.read`. Nothing may be read from `out` then.
        """
        self.require_usable()
        tokens, began = len(windows), time.monotonic()
        self._interval, self._began = began - self._began, began
        with self._lock:
            if len(self._launches) >= _UNDER_WAY:
                self._collect()
            if tokens <= BLOCK_TOKENS:
                launches = [self._launch(windows, out)] if tokens else []
            else:
                flat = out.view(self.plan.layers, tokens, -1)
                parts = [slice(at, at + BLOCK_TOKENS) for at in range(0, tokens, BLOCK_TOKENS)]
                launches = [self._launch(windows[part], flat[:, part]) for part in parts]
        if not self._cuda:
            self._keep_steps()
        return launches

    def require_usable(self) -> None:
        """Before anything is asked of the device.

        Raises:
            StoreError: the tier is closed, or belongs to another process.
        """
        if self._forked:
            raise StoreError(
                f"{self.tier.name}: the GPU tier belongs to the process that this one was forked "
                "from; open the table in this process"
            )
        if self._closed:
            raise StoreError(f"{self.tier.name}: the table is closed; open it again")

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
        mine = ngrams.take(
            np.flatnonzero(self._finder.every[ngrams.orders - self.selection.min_order])
        )
        lacking = np.flatnonzero(~self._hbm.present(mine))
        return self._prefetcher.start(mine.take(lacking), below)

    def _keep_prefetched(self, ngrams: Ngrams) -> Ngrams:
        """Copy what is in the arena to the device; returns the others."""
        assert self._hbm is not None
        with self._lock:
            self._prefetched_late += int(self._hbm.present(ngrams).sum())
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
        if not len(left):
            return left
        in_place, reach = self._arena()
        held = in_place.epochs.enter()
        found = np.empty(len(left), np.int64)
        room: Room | None = None
        try:
            _sources.find_in_place(in_place.view, reach.reachable, left.windows, left.orders, found)
            come = np.flatnonzero(found)
            if not len(come):
                in_place.epochs.leave(held)
                return left
            room = self._launches.room(len(come))
            sources, keep = room.sources, room.keep
            sources[:] = keep[:] = 0
            at = (np.arange(len(come)), left.orders[come] - self.selection.min_order)
            sources[at] = found[come]
            keep[at] = self._hbm.admit(left.take(come), prefetched=prefetched)
            # What is not kept is not read either.
            sources[keep == 0] = 0
            self._queue(room, None, in_place, held, kept=True)
        except BaseException:
            self._failed(in_place, held, room)
            raise
        return left.take(np.flatnonzero(found == 0))

    def _launch(self, windows: Int32s, out: torch.Tensor) -> Launch:
        in_place, reach = self._arena()
        room = self._launches.room(len(windows))
        held = in_place.epochs.enter()
        try:
            found = self._finder.find(windows, in_place, reach, room)
            launch = self._queue(room, out, in_place, held, kept=found.kept)
            if found.staged:
                self._staging.queued(launch.done)
        except BaseException:
            self._failed(in_place, held, room)
            raise
        if self._hbm is not None and found.in_place and not found.kept:
            # What is in the arena comes to the device behind this step, not before it.
            self._to_keep.append(windows)
        return launch

    def _failed(self, in_place: InPlace, held: int, room: Room | None) -> None:
        """Leave nothing of a launch that failed, at whatever point."""
        if self._cuda:
            self.stream.synchronize()  # it may have been queued all the same
        if not self._launches.holds(room):
            in_place.epochs.leave(held)
        if self._hbm:
            self._hbm.did_not_come()

    def _queue(
        self, room: Room, out: torch.Tensor | None, in_place: InPlace, held: int, *, kept: bool
    ) -> Launch:
        """Queue a launch; from then on it holds its room and its epoch until it has ended."""
        done: Any = None
        if self._cuda:
            self._gather(room.tensor, out, self.stream, kept=kept)
            done = self._launches.event(self.stream)
        else:
            self._gather(room.tensor, out, kept=kept)
        launch = self._launches.add(Launch(done, in_place, held, room))
        if self._hbm is not None:
            self._hbm.came()
        self._look_after(launch)
        return launch

    def _look_after(self, launch: Launch) -> None:
        if launch.done is None:
            self._collect()
        elif not self._collecting:
            thread = threading.Thread(target=self._collect_later, name="engram-gpu", daemon=True)
            with suppress(RuntimeError):  # no thread can be started now: the next step collects
                thread.start()
                self._collecting = True

    def _distrust(self, whole: bool) -> None:
        """Forget what is on the device if launches may have put anything there."""
        if not whole and self._hbm is not None:
            self._hbm.forget()

    def _collect(self) -> None:
        self._distrust(self._launches.collect())

    def _arena(self) -> tuple[InPlace, Reach]:
        """The arena in use; a sidecar that was restarted has another."""
        self.require_usable()
        in_place = self.tier.in_place()
        if in_place is not self._in_place or self._reach is None:
            self._in_place, self._reach = in_place, reach_of(in_place, self.device)
        return in_place, self._reach

    def _collect_later(self) -> None:
        """A thread's: an idle reader must not hold slots that others wait for, and what steps read
        from the arena is to be kept."""
        try:
            while True:
                time.sleep(_COLLECT_S)
                time.sleep(self._until_quiet())
                self._keep_steps()
                with self._lock:
                    self._collect()
                    if not self._launches and not self._to_keep:
                        self._collecting = False
                        return
        except BaseException:
            self._collecting = False  # the next step starts another
            raise

    def _until_quiet(self) -> float:
        """Seconds until the host is likely to wait for the device: then the interpreter's lock is
        free, which a step would have to wait for."""
        interval, since = self._interval, time.monotonic() - self._began
        if since < _STEP_BUSY_S:
            return _STEP_BUSY_S - since
        if interval < _STEPS_WITHIN_S and interval / 2 < since < interval:
            return interval - since + _STEP_BUSY_S
        return 0.0

    def stats(self) -> dict[str, Any]:
        """Counters since the start, by name; plain ints and strings."""
        kept = self._hbm.stats() if self._hbm else {}
        return {
            "tier": "gpu",
            **kept,
            **self._finder.counters.read(),
            "prefetched_late": self._prefetched_late,
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
            self._staging.clear()
            if self._hbm is not None:
                self._hbm.close()


_ALL: weakref.WeakSet[GpuTier] = weakref.WeakSet()


def _disown() -> None:
    # A child has neither the device's streams nor the threads; and any lock may be held.
    for tier in _ALL:
        tier._forked, tier._lock = True, threading.Lock()


os.register_at_fork(after_in_child=_disown)
