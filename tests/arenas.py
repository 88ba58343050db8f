"""Small RAM tiers whose bundles prove themselves, and the arena's layout read in plain Python."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from unittest import mock

import numpy as np

from engram._failures import Failures
from engram.ram import cache as cache_module
from engram.ram.bundle_tier import BundleTier
from engram.ram.cache import Cache, CachedTable
from engram.ram.epochs import Epochs
from engram.ram.layout import (
    BUCKET_ENTRIES,
    HEAD_IDS,
    HEAD_ORDER,
    HEAD_TABLE,
    PAGE_BYTES,
    ArenaLayout,
    BundleLayout,
    pack_view,
)
from engram.ram.memory import Memory
from engram.tiers import Ngrams, Prefetch

BUNDLE = BundleLayout(layers=2, heads=2, value_bytes=24, scale_bytes=8, max_order=3)
MIN_ORDER, ORDERS = 2, 2
_MASK = 2**64 - 1


def cache_of(
    slots,
    tables=1,
    *,
    bundle=BUNDLE,
    min_order=MIN_ORDER,
    shared=False,
    seed=1,
    slots_per_slab=16,
):
    """A cache of exactly so many slots, in several slabs, its hashes seeded for good."""
    layout = ArenaLayout(bundle.slot_bytes, bundle.head_bytes, slots_per_slab, slots)
    known = [CachedTable(f"{n:032x}", min_order, bundle) for n in range(tables)]
    with mock.patch.object(cache_module.secrets, "randbits", return_value=seed):
        return Cache(known, layout, shared=shared)


def ngrams_of(keys, max_order=BUNDLE.max_order):
    """`Ngrams` of tuples of ids."""
    windows = np.full((len(keys), max_order), -1, np.int32)
    for window, key in zip(windows, keys, strict=True):
        window[: len(key)] = key
    return Ngrams(windows, np.array([len(key) for key in keys], np.int32))


def keys_of(ngrams):
    """Tuples of ids of `Ngrams`."""
    windows = ngrams.windows.tolist()
    return [tuple(w[:n]) for w, n in zip(windows, ngrams.orders.tolist(), strict=True)]


def bundle_bytes(table, key, bundle=BUNDLE):
    """uint8 `[slot_bytes]`: the only right content for an n-gram of a table."""
    name = repr((table, tuple(map(int, key)))).encode()
    return np.frombuffer(hashlib.shake_128(name).digest(bundle.slot_bytes), np.uint8)


def fill(cache, number, keys, *, prefetched=False, left_out=()):
    """Fill with the right bundles of `keys`; those at the positions `left_out` have none."""
    bundle = cache.bundles[number]
    stored = np.stack([bundle_bytes(number, key, bundle) for key in keys])
    addresses = stored.ctypes.data + bundle.slot_bytes * np.arange(len(keys), dtype=np.int64)
    addresses[list(left_out)] = 0
    ngrams = ngrams_of(keys, bundle.max_order)
    cache.fill(number, ngrams, addresses, prefetched=prefetched)


def row_of(bundle, contents, layer, head):
    """(values, scales) of one row of a bundle's bytes."""
    base = layer * bundle.heads * (bundle.value_bytes + bundle.scale_bytes)
    values = contents[base + head * bundle.value_bytes :][: bundle.value_bytes]
    base += bundle.heads * bundle.value_bytes
    return values, contents[base + head * bundle.scale_bytes :][: bundle.scale_bytes]


class Arena:
    """What a cache's memory says, read as `engram.ram.layout` describes it."""

    def __init__(self, cache):
        self.layout, self.seed = cache.layout, cache.seed
        self._slabs = [slab.bytes() for slab in cache.slabs]
        self._directories = [directory.bytes() for directory in cache.directories]

    def _slab(self, slot):
        return self._slabs[slot // self.layout.slots_per_slab], slot % self.layout.slots_per_slab

    def head(self, slot):
        """(sequence, table, ids)."""
        slab, index = self._slab(slot)
        head = slab[index * self.layout.head_bytes :]
        order = int(head[HEAD_ORDER : HEAD_ORDER + 4].view(np.int32)[0])
        ids = head[HEAD_IDS : HEAD_IDS + 4 * max(0, order)].view(np.int32).tolist()
        table = int(head[HEAD_TABLE : HEAD_TABLE + 4].view(np.int32)[0])
        return int(head[:8].view(np.uint64)[0]), table, tuple(ids)

    def head_words(self, slot):
        """uint64, the head itself; the first is its sequence."""
        slab, index = self._slab(slot)
        return slab[index * self.layout.head_bytes :][: self.layout.head_bytes].view(np.uint64)

    def bundle(self, slot):
        """uint8 `[slot_bytes]`, the memory itself."""
        slab, index = self._slab(slot)
        return slab[self.layout.heads_bytes + index * self.layout.slot_bytes :][
            : self.layout.slot_bytes
        ]

    def entries(self, table):
        """uint64 `[buckets, 8]`, the memory itself."""
        words = self._directories[table][PAGE_BYTES:].view(np.uint64)
        return words[: self.layout.buckets * BUCKET_ENTRIES].reshape(-1, BUCKET_ENTRIES)

    def slot(self, table, key):
        """The slot an n-gram is in, by its entry and its whole key, or -1."""
        hashed = hash_twin(self.seed, key)
        for bucket in buckets_twin(hashed, self.layout.buckets):
            for word in self.entries(table)[bucket].tolist():
                if word >> 32 == tag_twin(hashed):
                    slot = word & 0xFFFFFFFF
                    return slot if self.head(slot)[1:] == (table, tuple(key)) else -1
        return -1


def mix64_twin(word):
    """splitmix64's finalizer in Python's integers."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def hash_twin(seed, key):
    """`engram.ram._probe.ngram_hash` in Python's integers."""
    for entry in key:
        seed = mix64_twin(seed ^ entry)
    return seed


def tag_twin(hashed):
    """`engram.ram._probe.tag_of`."""
    return (hashed >> 32) | 1


def buckets_twin(hashed, buckets):
    """Both buckets that may hold an n-gram's entry."""
    return hashed % buckets, (hashed ^ mix64_twin(tag_twin(hashed))) % buckets


class ArenaReader(BundleTier):
    """Reads one table of a cache; what it lacks comes from `bundle_bytes`.

    Attributes:
        fetched: n-grams that were not in the arena, call by call.
        memory: of this reader; the table's own of the cache, or one of its own.
    """

    name = "arena"

    def __init__(self, cache, number=0, *, min_order=MIN_ORDER, memory=None):
        super().__init__()
        self.bundle = cache.bundles[number]
        self.spec = SimpleNamespace(num_orders=self.bundle.max_order + 1 - min_order)
        self.number = number
        self.fetched = []
        self.memory = cache.own_readers[number] if memory is None else memory
        self._slabs = np.array([slab.address for slab in cache.slabs], np.int64)
        self._directory = cache.directories[number]
        self.own_epochs = Epochs(self.memory, self._directory)
        self.packed_view = pack_view(
            cache.layout,
            self.bundle,
            min_order,
            directory=self._directory.address,
            seed=cache.seed,
            table=number,
            slabs=self._slabs.ctypes.data,
            reader=self.memory.address,
        )

    @classmethod
    def added(cls, cache, number=0):
        """A reader with memory of its own, known to the cache."""
        memory = Memory.private(cache.layout.reader_bytes)
        cache.add_reader(number, memory)
        return cls(cache, number, memory=memory)

    def _view(self):
        return self.packed_view

    def in_place(self):
        return None

    def _epochs(self):
        return self.own_epochs

    def fetch(self, ngrams, selection, deliver):
        keys = keys_of(ngrams)
        self.fetched.append(keys)
        contents = np.stack([self._content(key) for key in keys])
        # In two parts, the later one first: order must not matter.
        half = len(keys) // 2
        addresses = contents.ctypes.data + self.bundle.slot_bytes * np.arange(len(keys))
        deliver(half, addresses[half:])
        if half:
            deliver(0, addresses[:half])
        return Failures()

    def _content(self, key):
        return bundle_bytes(self.number, key, self.bundle)

    def read_rows(self, layer, row_ids, out, places):
        raise NotImplementedError

    def prefetch(self, ngrams):
        return Prefetch()

    def stats(self):
        return {}

    def close(self):
        pass
