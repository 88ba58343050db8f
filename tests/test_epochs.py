"""Epochs: which of those that a reader's threads hold the writer sees, and what a fork leaves."""

from __future__ import annotations

import os
import time
import traceback

import numpy as np
from arenas import Arena, ArenaReader, bundle_bytes, cache_of, fill, ngrams_of
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.ram.epochs import Epochs
from engram.ram.layout import PAGE_BYTES, WORD_EPOCH
from engram.ram.memory import SEALS_OF_READER, Memory


def seen(memory):
    """The epoch that the writer sees."""
    return int(memory.words(WORD_EPOCH + 1)[WORD_EPOCH])


@given(st.lists(st.integers(-3, 9), max_size=40))
@settings(deadline=None)
def test_the_writer_sees_the_oldest_epoch_that_is_held(steps):
    """Steps >= 0 leave the i-th that is held, -1 enters, others let the writer go on."""
    reader, directory = Memory.private(PAGE_BYTES), Memory.private(PAGE_BYTES)
    now = directory.words(WORD_EPOCH + 1)
    now[WORD_EPOCH] = 1
    epochs, held = Epochs(reader, directory), []
    for step in steps:
        if step >= 0 and held:
            epochs.leave(held.pop(step % len(held)))
        elif step == -1:
            held.append(epochs.enter())
            assert held[-1] == int(now[WORD_EPOCH])
        else:
            now[WORD_EPOCH] += 1
        assert seen(reader) == min(held, default=0)


def in_child(check):
    """Run `check` in a forked child; it must return."""
    child = os.fork()
    if child == 0:
        try:
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_epoch_held_at_a_fork_does_not_stop_the_childs_admission():
    cache = cache_of(40)
    reader = ArenaReader(cache)
    for first in range(9):
        fill(cache, 0, [(first, n) for n in range(40)])

    def check():
        for first in range(200):
            keys = [(first, n) for n in range(40)]
            fill(cache, 0, keys)
            assert cache.present(0, ngrams_of(keys)).sum() > 30
        cache.check_integrity()

    with reader.holding():
        in_child(check)
        assert seen(reader.memory) == reader.own_epochs._held[0]


def test_a_closed_arena_does_not_keep_a_child_from_renewing_the_others():
    """They stand in no order, so there are closed ones before and after."""
    caches = [cache_of(40) for _ in range(9)]
    for cache in caches:
        fill(cache, 0, [(0, n) for n in range(40)])
    for cache in caches[::2]:
        cache.close(0)

    def check():
        for cache in caches[1::2]:
            assert cache.stats()["slots_used"] == 0
            fill(cache, 0, [(1, 1)])
            cache.check_integrity()
        for cache in caches[::2]:
            cache.close(0)

    in_child(check)


def test_a_child_lets_go_of_nothing_that_its_parent_holds():
    """Reader memory that came from elsewhere is one for both."""
    cache = cache_of(40, shared=True)
    memory = Memory.shared("reader", cache.layout.reader_bytes, SEALS_OF_READER)
    cache.add_reader(0, memory)
    reader, arena = ArenaReader(cache, memory=memory), Arena(cache)
    fill(cache, 0, [(0, n) for n in range(40)])
    with reader.holding():
        slots = reader.probe(np.array([[0, n, 0] for n in range(40)], np.int32))[:, 0]
        held = seen(memory)
        in_child(lambda: reader.own_epochs.leave(held))
        assert seen(memory) == held > 0
        for first in range(1, 20):
            fill(cache, 0, [(first, n) for n in range(40)])
        for n, slot in enumerate(slots.tolist()):
            assert np.array_equal(arena.bundle(slot), bundle_bytes(0, (0, n)))
    assert seen(memory) == 0


def test_how_long_a_reader_has_kept_slots_from_being_used_again():
    cache = cache_of(40)
    reader = ArenaReader.added(cache)

    def age_s():
        return cache.memory_stats()["oldest_epoch_age_s"]

    fill(cache, 0, [(0, n) for n in range(40)])
    with reader.holding():
        time.sleep(0.02)
        assert age_s() == 0, "nobody waits for its slots yet"
        fill(cache, 0, [(1, n) for n in range(20)])
        assert cache.memory_stats()["limbo_bytes"] > 0
        time.sleep(0.02)
        first = age_s()
        assert first >= 0.02
        fill(cache, 0, [(2, n) for n in range(20)])
        assert age_s() >= first
    assert age_s() == 0
    fill(cache, 0, [(3, n) for n in range(20)])
    assert age_s() == 0


def test_readers_that_hit_everything_cannot_keep_the_writer_going_round():
    cache = cache_of(6000, slots_per_slab=1024)
    reader = ArenaReader.added(cache)
    fill(cache, 0, [(0, n) for n in range(6000)])
    reader.memory.bytes()[PAGE_BYTES:] = 255
    fill(cache, 0, [(1, 0)])
    # One after the other moved on to the main queue; at some point one goes, hit or not.
    present = cache.present(0, ngrams_of([(1, 0), (0, 4095), (0, 4096), (0, 4097)]))
    assert present.tolist() == [True, True, False, True]
    cache.check_integrity()
