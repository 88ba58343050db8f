"""N-grams kept in a device's memory; the host knows which, and decides what comes and goes.

The directory and the eviction policy are the RAM tier's own (`engram.ram.cache.Cache`), with slots
that hold keys only: slot `i` of it stands for bytes `[i * slot_bytes, (i + 1) * slot_bytes)` on
the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engram.errors import ConfigError
from engram.gpu import _sources
from engram.gpu.plan import PACKED, Plan
from engram.ram import _probe
from engram.ram.cache import Cache, CachedTable
from engram.ram.epochs import Epochs
from engram.ram.layout import ArenaLayout, BundleLayout
from engram.sizes import format_size
from engram.tiers import Int32s, Int64s, Ngrams


class Hbm:
    """Slots on a device. Its methods take turns under the caller's lock, in the order in which
    what they say is queued on the device.

    Args:
        bundle: of the table.
        fingerprint, min_order: of the table.
        plan: of the selection that is kept.
        capacity: bytes of slots on the device.
        device: where.

    Raises:
        ConfigError: the device has not so much memory free.
    """

    def __init__(
        self,
        bundle: BundleLayout,
        fingerprint: str,
        min_order: int,
        plan: Plan,
        capacity: int,
        device: torch.device,
    ) -> None:
        keys = replace(bundle, layers=0)
        slots = capacity // plan.slot_bytes
        if not slots:
            raise ConfigError(
                f"hbm: {format_size(capacity)} is less than one n-gram's {plan.slot_bytes} bytes; "
                "give more, or 0 for none"
            )
        self.capacity = slots * plan.slot_bytes
        self.slot_bytes = plan.slot_bytes
        require_free(self.capacity, device)
        self.memory = torch.empty(self.capacity, dtype=torch.uint8, device=device)
        self._layout = ArenaLayout.with_slots(slots, keys.slot_bytes, keys.head_bytes)
        self._table = CachedTable(fingerprint, min_order, keys)
        self._renew()
        self._first = self.memory.data_ptr() | PACKED

    def _renew(self) -> None:
        self._cache = Cache([self._table], self._layout, shared=False)
        self._epochs = Epochs(self._cache.own_readers[0], self._cache.directories[0])
        self._promised = False

    @property
    def view(self) -> Int64s:
        """Of its directory, for kernels."""
        return self._cache.views[0]

    @property
    def first(self) -> int:
        """Address of slot 0, with the lowest bit set."""
        return self._first

    def enter(self) -> int:
        """What `find` finds from now on stays where it is until `leave`."""
        return self._epochs.enter()

    def leave(self, epoch: int) -> None:
        """All that reads what was found is queued: what overwrites it is queued behind it."""
        self._epochs.leave(epoch)

    def find(self, windows: Int32s, every: np.ndarray, sources: Int64s) -> tuple[Int64s, int]:
        """Look all n-grams of a step up.

        Args:
            windows: int32 `[T, max_order]`.
            every: bool `[orders]`, which orders are wanted.
            sources: int64 `[T, orders]`, set to addresses, 0 for what is not here.

        Returns:
            int64 `[T, orders]`, slots, -1 for what is not here; how many wanted n-grams are not.
        """
        slots = np.empty(sources.shape, np.int64)
        misses: int = _probe.probe(self._cache.views[0], windows, every, slots)
        _sources.slots_to_sources(slots, self._first, self.slot_bytes, sources)
        return slots, misses

    def admit(self, ngrams: Ngrams, *, prefetched: bool = False) -> Int64s:
        """Make room for n-grams that are on their way, as far as admission allows.

        Returns:
            int64 `[N]`, where to put each, 0 for those that are not kept. They must be put there
            before anything that is queued later reads them: say `came`, or `did_not_come`.
        """
        cache, self._promised = self._cache, True
        cache.fill(0, ngrams, np.ones(len(ngrams), np.int64), prefetched=prefetched)
        slots = np.empty(len(ngrams), np.int64)
        _sources.find_slots(cache.views[0], ngrams.windows, ngrams.orders, slots)
        first = self._first - PACKED
        kept: Int64s = np.where(slots >= 0, first + slots * self.slot_bytes, 0)
        return kept

    def came(self) -> None:
        """What puts the admitted n-grams into their slots is queued."""
        self._promised = False

    def did_not_come(self) -> None:
        """Forget everything if the directory speaks of bytes that were never put there."""
        if self._promised:
            self.forget()

    def forget(self) -> None:
        """Nothing that is on the device is to be believed any more."""
        self._renew()

    def present(self, ngrams: Ngrams) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool `[N]`: which n-grams are here."""
        return self._cache.present(0, ngrams)

    def stats(self) -> dict[str, int]:
        """As `Cache.stats` and its counts; `capacity_bytes` is the device's."""
        return {
            **self._cache.stats(),
            **self._cache.counts(0),
            "capacity_bytes": self.capacity,
        }

    def check_integrity(self) -> None:
        self._cache.check_integrity()

    def close(self) -> None:
        self._cache.close(0)
        self.memory = torch.empty(0, dtype=torch.uint8)


def require_free(wanted: int, device: torch.device) -> None:
    """Refuse to take more than a device has free.

    Raises:
        ConfigError: both numbers are named.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # What torch keeps for later is free for this, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if wanted > free:
        raise ConfigError(
            f"hbm: {format_size(wanted)} wanted, but {device} has {format_size(free)} of "
            f"{format_size(total)} free; ask for less, or load the model with less beside it"
        )
