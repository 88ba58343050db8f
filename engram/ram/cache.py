"""The writer of the RAM tier: one arena, and a directory for each table that shares it."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.errors import ConfigError, StoreError
from engram.ram import _fill, _policy, _staging
from engram.ram.epochs import OldestEpoch
from engram.ram.layout import (
    ABI,
    MAGIC,
    PAGE_BYTES,
    WORD_ABI,
    WORD_BOOT,
    WORD_BUCKETS,
    WORD_EPOCH,
    WORD_FINGERPRINT,
    WORD_HEAD_BYTES,
    WORD_MAGIC,
    WORD_SEED,
    WORD_SLABS,
    WORD_SLOT_BYTES,
    WORD_SLOTS,
    WORD_SLOTS_PER_SLAB,
    WORD_TABLE,
    ArenaLayout,
    BundleLayout,
    pack_view,
)
from engram.ram.memory import SEALS_OF_WRITER, Memory, owning
from engram.ram.reader_counts import ReaderCounts
from engram.tiers import Int32s, Int64s, Ngrams

_DIRECTORY = "engram-directory"
_RESERVED_AT_ONCE_BYTES = 256 << 20
"""Memory taken before a cache can be used; the rest follows in the background, because zeroing
takes a second for a few GiB and nobody should wait for it."""
_SETTLED_AT_ONCE = 1 << 18

_log = logging.getLogger("engram.ram")


@dataclass(frozen=True)
class CachedTable:
    """What the arena must know of a table."""

    fingerprint: str
    min_order: int
    bundle: BundleLayout


class Cache:
    """Bundles of one size in memory, for any number of readers. Methods may be called from
    several threads at once.

    A forked child gets an empty cache of its own if the memory is private, and must not use it
    if it is shared.

    Args:
        tables: those whose bundles it holds, numbered in this order.
        layout: sizes.
        shared: in sealed memfds, to be handed to other processes; else private.
        boot_id: 16 bytes that differ in every life of a sidecar.

    Raises:
        ConfigError: there is not so much memory.
    """

    def __init__(
        self,
        tables: Sequence[CachedTable],
        layout: ArenaLayout,
        *,
        shared: bool,
        boot_id: bytes | None = None,
    ) -> None:
        self.layout = layout
        self.boot_id = boot_id or secrets.token_bytes(16)
        self.seed = secrets.randbits(63)
        self.bundles = tuple(table.bundle for table in tables)
        self._tables = tuple(tables)
        self.shared = shared
        self.slabs = tuple(
            self._memory(f"engram-slab-{number}", layout.slab_bytes(number))
            for number in range(layout.slabs)
        )
        self.directories = tuple(
            self._memory(f"{_DIRECTORY}-{number}", layout.directory_bytes)
            for number in range(len(tables))
        )
        self._slab_addresses = np.array([slab.address for slab in self.slabs], np.int64)
        self.own_readers = tuple(Memory.private(layout.reader_bytes) for _ in tables)
        self.views = tuple(self._view(number) for number in range(len(tables)))
        self._open = set(range(len(tables)))
        self._renew()
        _ALL.add(self)
        self._reserve(_RESERVED_AT_ONCE_BYTES)
        if self._reserved < layout.slabs:
            threading.Thread(target=self._reserve, name="engram-reserve", daemon=True).start()

    def _reserve(self, bytes_max: int | None = None) -> None:
        """Take the memory of more slabs, so that writing to them can never fail, and use them."""
        layout, taken = self.layout, 0
        slabs = self.slabs
        while self._reserved < len(slabs) and (bytes_max is None or taken < bytes_max):
            slab = self._reserved
            try:
                slabs[slab].reserve()
            except ConfigError as error:
                _log.error("the RAM tier stays at %d of %d slabs: %s", slab, layout.slabs, error)
                return
            first = slab * layout.slots_per_slab
            with self.lock:
                if not self._open:
                    return
                _policy.add_slots(
                    self._writer, first, min(first + layout.slots_per_slab, layout.slots)
                )
                self._reserved += 1
                for directory in self.directories:
                    directory.words(WORD_SLABS + 1)[WORD_SLABS] = self._reserved
            taken += slabs[slab].size

    @property
    def reserved(self) -> int:
        """Slabs, from the first on, that have their memory."""
        return self._reserved

    def _memory(self, name: str, size: int) -> Memory:
        if not self.shared:
            return Memory.private(size)
        return Memory.shared(name, size, SEALS_OF_WRITER, reserve=name.startswith(_DIRECTORY))

    def _view(self, number: int) -> Int64s:
        table = self._tables[number]
        view = pack_view(
            self.layout,
            table.bundle,
            table.min_order,
            directory=self.directories[number].address,
            seed=self.seed,
            table=number,
            slabs=self._slab_addresses.ctypes.data,
            reader=self.own_readers[number].address,
        )
        # Whoever reads through it keeps what it points to, also while this is closed.
        return owning(view, (self.slabs, self.directories, self.own_readers, self._slab_addresses))

    def _renew(self) -> None:
        """Empty."""
        self.lock = threading.Lock()
        self._readers = list(self.own_readers)
        self._counts = tuple(ReaderCounts(own) for own in self.own_readers)
        self._oldest = OldestEpoch()
        self._reserved = 0
        slots = self.layout.slots
        limbo_max = max(4, slots // 32)
        ghosts = _policy.GHOST_WAYS * (1 + slots // _policy.GHOST_WAYS)
        self._writer = _policy.Writer(
            directories=np.array([each.address for each in self.directories], np.int64),
            readers=self._addresses(),
            state=np.full(slots, _policy.UNUSABLE, np.uint8),
            hits=np.zeros(slots, np.uint8),
            small=np.zeros(slots + 1, np.int32),
            main=np.zeros(slots + 1, np.int32),
            limbo=np.zeros(limbo_max + 1, np.int32),
            limbo_epochs=np.zeros(limbo_max + 1, np.uint64),
            ghosts=np.zeros((ghosts, 2), np.uint32),
            free=np.zeros(slots, np.int32),
            numbers=np.zeros(_policy.NUMBERS, np.int64),
            owners=np.zeros(slots, np.int32),
            counts=np.zeros((len(self._tables), _policy.COUNTS), np.int64),
        )
        self._writer.numbers[_policy.LIMBO_MAX] = limbo_max
        self._writer.numbers[_policy.EPOCH] = 1
        for reader in self.own_readers:
            # After a fork: an epoch held by a thread that does not exist here.
            reader.words(WORD_EPOCH + 1)[WORD_EPOCH] = 0
        for number, directory in enumerate(self.directories):
            directory.bytes()[PAGE_BYTES:] = 0
            self._write_header(number, directory.words(WORD_EPOCH + 1))

    def _write_header(self, number: int, words: np.ndarray) -> None:
        layout = self.layout
        words[WORD_MAGIC], words[WORD_ABI] = MAGIC, ABI
        words[WORD_BOOT : WORD_BOOT + 2] = np.frombuffer(self.boot_id, np.uint64)
        fingerprint = bytes.fromhex(self._tables[number].fingerprint)
        words[WORD_FINGERPRINT : WORD_FINGERPRINT + 2] = np.frombuffer(fingerprint, np.uint64)
        words[WORD_TABLE], words[WORD_SEED] = number, self.seed
        words[WORD_BUCKETS] = layout.buckets
        words[WORD_SLOT_BYTES], words[WORD_HEAD_BYTES] = layout.slot_bytes, layout.head_bytes
        words[WORD_SLOTS_PER_SLAB], words[WORD_SLOTS] = layout.slots_per_slab, layout.slots
        words[WORD_EPOCH] = 1

    def _addresses(self) -> Int64s:
        return np.array([reader.address for reader in self._readers], np.int64)

    def add_reader(self, number: int, memory: Memory) -> None:
        """Collect hits and counts from a reader's memory and honour its epoch, from now on.

        Args:
            number: of the table that it reads.
            memory: `layout.reader_bytes` long, mapped writable.
        """
        assert memory.size == self.layout.reader_bytes
        with self.lock:
            self._readers.append(memory)
            self._counts[number].add(memory)
            self._writer = self._writer._replace(readers=self._addresses())

    def remove_reader(self, memory: Memory) -> None:
        """Forget a reader, but what it counted: what it held may be reused. Safe if it is not
        known."""
        with self.lock:
            self._readers = [each for each in self._readers if each is not memory]
            for counts in self._counts:
                counts.remove(memory)
            self._writer = self._writer._replace(readers=self._addresses())

    def fill(
        self, number: int, ngrams: Ngrams, bundles: Int64s, *, prefetched: bool = False
    ) -> None:
        """Keep bundles, as far as admission allows.

        Args:
            number: of the table.
            ngrams: each once.
            bundles: int64 `[N]`, addresses of whole bundles, 0 to leave one out.
            prefetched: whether nobody has asked for them yet.
        """
        with self.lock:
            _fill.fill(
                self._open_view(number),
                ngrams.windows,
                ngrams.orders,
                bundles,
                prefetched,
                self._writer,
            )
            self._oldest.note(self._writer)

    def close(self, number: int) -> None:
        """Do without a table; with the last one the memory goes. Safe to call twice."""
        with self.lock:
            self._open.discard(number)
            if not self._open:
                self.slabs = self.directories = self.views = ()
                self._writer = self._writer._replace(directories=np.zeros(0, np.int64))

    def _open_view(self, number: int) -> Int64s:
        if number not in self._open:
            raise StoreError("the table is closed; open it again")
        return self.views[number]

    def stage_present(
        self, number: int, ngrams: Ngrams, target: int, request_id: int
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Write staged entries of the n-grams that are here; uint8 `[N]`, 1 for the others."""
        stride = self.bundles[number].staged_bytes
        with self.lock:
            missed: np.ndarray[Any, np.dtype[np.uint8]] = _staging.stage_present(
                self._open_view(number), ngrams.windows, ngrams.orders, request_id, target, stride
            )
        return missed

    def present(self, number: int, ngrams: Ngrams) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool `[N]`: which n-grams are here."""
        found = np.empty(len(ngrams), np.bool_)
        with self.lock:
            _fill.find_present(self._open_view(number), ngrams.windows, ngrams.orders, found)
        return found

    def counts(self, number: int) -> dict[str, int]:
        """What all readers of one table counted, see `engram.ram.reader_counts`."""
        with self.lock:
            return self._counts[number].read()

    def table_stats(self, number: int) -> dict[str, int]:
        """`held_bytes` of one table, and its counts since the start: see `stats`; n-grams that
        were evicted, by what they were `evicted_...`."""
        self._settle_prefetches()
        with self.lock:
            counts = self._writer.counts[number].tolist()
        return {
            "held_bytes": counts[_policy.HELD] * self._slot_bytes,
            **_counts_by_name(counts),
            "evicted_unused": counts[_policy.LEFT_UNUSED],
            "evicted_once": counts[_policy.LEFT_ONCE],
            "evicted_cold": counts[_policy.LEFT_COLD],
        }

    def _settle_prefetches(self) -> None:
        """Count prefetches that were useful, in parts, because misses wait for the lock."""
        for first in range(0, self.layout.slots, _SETTLED_AT_ONCE):
            with self.lock:
                _policy.settle_prefetches(self._writer, first, first + _SETTLED_AT_ONCE)

    @property
    def _slot_bytes(self) -> int:
        return self.layout.slot_bytes + self.layout.head_bytes

    def memory_stats(self) -> dict[str, float]:
        """Bytes of slabs and directories that have their memory, and of slots that wait until no
        reader can hold them; how long readers have kept the writer waiting for such."""
        with self.lock:
            limbo = int(self._writer.numbers[_policy.LIMBO_COUNT])
            age_s = self._oldest.age_s(self._writer)
            slabs, directories = self.slabs[: self._reserved], self.directories
        return {
            "slab_bytes": sum(slab.size for slab in slabs),
            "directory_bytes": sum(directory.size for directory in directories),
            "limbo_bytes": limbo * self._slot_bytes,
            "oldest_epoch_age_s": age_s,
        }

    def stats(self) -> dict[str, int]:
        """Slots by place, and counts since the start."""
        self._settle_prefetches()
        with self.lock:
            numbers = self._writer.numbers.tolist()
            counts = self._writer.counts.sum(axis=0).tolist()
        layout = self.layout
        return {
            "capacity_bytes": layout.total_bytes(len(self._tables)) if layout.slots else 0,
            "slots": layout.slots,
            "slots_used": numbers[_policy.SMALL_COUNT] + numbers[_policy.MAIN_COUNT],
            "slots_in_limbo": numbers[_policy.LIMBO_COUNT],
            "evicted": numbers[_policy.EVICTED],
            **_counts_by_name(counts),
        }

    def check_integrity(self) -> None:
        """Assert that every slot is in one place, and that entries and used slots match."""
        with self.lock:
            if self._open:
                self._check_integrity()

    def _check_integrity(self) -> None:
        writer, numbers = self._writer, self._writer.numbers
        queues = [
            _held(writer.small, numbers[_policy.SMALL_HEAD], numbers[_policy.SMALL_COUNT]),
            _held(writer.main, numbers[_policy.MAIN_HEAD], numbers[_policy.MAIN_COUNT]),
            _held(writer.limbo, numbers[_policy.LIMBO_HEAD], numbers[_policy.LIMBO_COUNT]),
            writer.free[: numbers[_policy.FREE_COUNT]],
            np.flatnonzero(writer.state == _policy.UNUSABLE),
        ]
        places = (_policy.SMALL, _policy.MAIN, _policy.LIMBO, _policy.FREE, _policy.UNUSABLE)
        for queue, place in zip(queues, places, strict=True):
            assert ((writer.state[queue] & 0x0F) == place).all()
        everything = np.concatenate(queues)
        assert len(everything) == self.layout.slots == len(np.unique(everything))
        linked = []
        for directory in self.directories:
            entries = directory.bytes()[PAGE_BYTES:].view(np.uint64)
            linked.append((entries[entries != 0] & 0xFFFFFFFF).astype(np.int64))
        used = np.sort(np.concatenate(queues[:2]))
        assert np.array_equal(np.sort(np.concatenate(linked)), used)
        for number, mine in enumerate(linked):
            assert (writer.owners[mine] == number).all()
            assert writer.counts[number, _policy.HELD] == len(mine)


def _counts_by_name(counts: Sequence[int]) -> dict[str, int]:
    return {
        "admitted": counts[_policy.ADMITTED],
        "not_admitted": counts[_policy.REFUSED],
        "prefetched_useful": counts[_policy.USEFUL],
        "prefetched_wasted": counts[_policy.LEFT_UNUSED],
    }


def _held(ring: Int32s, head: int, count: int) -> Int32s:
    return ring[(int(head) + np.arange(int(count))) % len(ring)]


_ALL: weakref.WeakSet[Cache] = weakref.WeakSet()


def _renew_after_fork() -> None:
    # The parent may have been writing; what it left behind is nobody's to finish.
    for cache in _ALL:
        if not cache.shared:
            cache._renew()
            cache._reserve()


os.register_at_fork(after_in_child=_renew_after_fork)
