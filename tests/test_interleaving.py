"""Two processes on very few slots: no torn row by the sequence, no changed byte under an epoch.

Each rule is also broken on purpose, so that these tests are known to see what they look for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from arena_reader import universe
from arenas import Arena, ArenaReader, bundle_bytes, cache_of, hash_twin, ngrams_of, tag_twin

from engram.ram.layout import PAGE_BYTES, BundleLayout
from engram.ram.memory import SEALS_OF_READER, Memory, _libc
from engram.rows import Rows
from engram.tiers import Selection

BUNDLE = BundleLayout(layers=2, heads=8, value_bytes=512, scale_bytes=8, max_order=3)
"""Large, so that copies take long enough to be caught at: without the second look at the sequence
some hundred rows of these lookups were wrong."""
KEYS = [tuple(w[:order]) for w in universe().tolist() for order in (2, 3)]


class Pair:
    """A cache in this process, and another process that reads it."""

    def __init__(self, slots):
        self.cache = cache_of(slots, bundle=BUNDLE, shared=True)
        self.reader = Memory.shared("reader", self.cache.layout.reader_bytes, SEALS_OF_READER)
        self.cache.add_reader(0, self.reader)
        memories = (*self.cache.slabs, self.cache.directories[0], self.reader)
        descriptors = [os.dup(memory.descriptor) for memory in memories]
        offer = {
            "bundle": dataclasses.asdict(BUNDLE),
            "layout": dataclasses.asdict(self.cache.layout),
            "seed": self.cache.seed,
            "slabs": descriptors[:-2],
            "directory": descriptors[-2],
            "reader": descriptors[-1],
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("arena_reader.py")), json.dumps(offer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for descriptor in descriptors:
            os.close(descriptor)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, mode, count):
        self.process.stdin.write(f"{mode} {count}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module", params=[6, 16])
def pair(request):
    pair = Pair(request.param)
    yield pair
    pair.close()


class Fills:
    """Endless fills of `KEYS` in random order."""

    def __init__(self, cache):
        self._cache = cache
        self._rng = np.random.default_rng(1)
        self._contents = np.stack([bundle_bytes(0, key, BUNDLE) for key in KEYS])

    def once(self):
        picked = self._rng.integers(0, len(KEYS), 2000)
        addresses = self._contents.ctypes.data + picked * BUNDLE.slot_bytes
        self._cache.fill(0, ngrams_of([KEYS[n] for n in picked]), addresses)


@contextmanager
def writing(cache):
    """Meanwhile slots are evicted and written without pause."""
    fills, over = Fills(cache), threading.Event()

    def write():
        while not over.is_set():
            fills.once()

    fills.once()  # compiles
    before = cache.stats()["evicted"]
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    cache.check_integrity()
    assert cache.stats()["evicted"] > before


def test_no_row_is_ever_torn_or_anothers(pair):
    with writing(pair.cache):
        seen = pair.ask("lookups", 150_000)
    assert seen["wrong"] == 0
    assert 1_000 < seen["hits"] < seen["reads"], "both hits and misses, or nothing was at stake"


def test_a_reader_that_does_not_look_twice_is_caught(pair):
    with writing(pair.cache):
        seen = pair.ask("careless", 10**9)
    assert seen["wrong"] > 0


def test_what_is_held_never_changes(pair):
    with writing(pair.cache):
        seen = pair.ask("in_place", 20_000)
    assert seen["wrong"] == 0
    assert seen["reads"] > 1000


def test_a_writer_that_ignores_epochs_is_caught(pair):
    pair.cache.remove_reader(pair.reader)
    try:
        with writing(pair.cache):
            seen = pair.ask("in_place_until_wrong", 10**6)
    finally:
        pair.cache.add_reader(0, pair.reader)
    assert seen["wrong"] > 0


def forked(work):
    """A child that does `work` and nothing else; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def looked_up(cache, key):
    """(values of one layer's first row of a window that begins with `key`, whether it missed)."""
    reader = ArenaReader(cache)
    order = len(key)
    column = (order - 2) * BUNDLE.heads
    out = Rows(np.empty((1, BUNDLE.value_bytes), np.uint8), np.empty((1, 8), np.uint8))
    window = np.array([[*key, *[0] * (3 - order)]], np.int32)
    reader.lookup(window, Selection((0,), (column,), BUNDLE.heads, 2, 2), out)
    return out.values[0], bool(reader.fetched)


def test_nobody_trusts_a_slot_whose_writer_died_in_it():
    """The writer reads the new bundle from memory that is not there, halfway through."""
    cache = cache_of(1, bundle=BUNDLE, shared=True)
    arena, old, new = Arena(cache), KEYS[1], KEYS[4]
    source = Memory.private(2 * PAGE_BYTES)
    source.bytes()[:] = 0xAB
    second_page = ctypes.c_void_p(source.address + PAGE_BYTES)
    assert _libc.mprotect(second_page, ctypes.c_size_t(PAGE_BYTES), 0) == 0
    bundle = bundle_bytes(0, old, BUNDLE)
    cache.fill(0, ngrams_of([old]), np.array([bundle.ctypes.data]))
    assert not looked_up(cache, old)[1]

    broken = np.array([source.address + PAGE_BYTES // 2], np.int64)
    child = forked(lambda: cache.fill(0, ngrams_of([new]), broken))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
    assert arena.head(0) == (3, 0, new), "odd, and its key the new one's"
    # A reader may have seen either entry just before.
    for key in (old, new):
        arena.entries(0)[0, 0] = tag_twin(hash_twin(cache.seed, key)) << 32
        values, missed = looked_up(cache, key)
        assert missed
        assert np.array_equal(values, bundle_bytes(0, key, BUNDLE)[: BUNDLE.value_bytes])
    # Only that the sequence was odd stood between a reader and a mixture.
    arena.head_words(0)[0] = 4
    values, missed = looked_up(cache, new)
    assert not missed
    assert not np.array_equal(values, bundle_bytes(0, new, BUNDLE)[: BUNDLE.value_bytes])


def test_writers_killed_anywhere_leave_no_wrong_slot_behind():
    rng = np.random.default_rng(2)
    whole = 0
    for _ in range(40):
        cache = cache_of(6, bundle=BUNDLE, shared=True)
        fills = Fills(cache)

        def write(fills=fills):
            while True:
                fills.once()

        child = forked(write)
        arena = Arena(cache)
        while not arena.head(0)[0]:
            time.sleep(0.0005)
        time.sleep(rng.random() / 500)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for slot in range(6):
            sequence, _, key = arena.head(slot)
            if sequence and sequence % 2 == 0:
                assert np.array_equal(arena.bundle(slot), bundle_bytes(0, key, BUNDLE))
                whole += 1
        for key in KEYS:
            values, _ = looked_up(cache, key)
            assert np.array_equal(values, bundle_bytes(0, key, BUNDLE)[: BUNDLE.value_bytes])
    assert whole > 40
