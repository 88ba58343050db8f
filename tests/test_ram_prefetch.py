"""Prefetches into the RAM tier: below lookups, cancelled, counted, amid closing and forking."""

from __future__ import annotations

import os
import threading
import traceback

import numpy as np
import pytest
from arenas import keys_of
from dict_tier import DictTier
from gated_tier import EVERYTHING, FORMAT, SEED, SPEC, Asked, held_up, ram_tier, some_ngrams, until

from engram.errors import StoreError
from engram.ram import misses as misses_module
from engram.ram.misses import PREFETCH_NGRAMS
from engram.rows import Rows


@pytest.fixture
def tier():
    tier = ram_tier(2 << 20)
    yield tier
    tier.backing.gate.open()
    tier.close()
    tier.check_integrity()


def counted(tier, name):
    return tier.misses.counters.read()[name]


def idle(tier):
    """Wait until no prefetch is left."""
    until(lambda: not tier.misses._background._pending)


def require_rows(tier, ngrams):
    """Read `ngrams`; every byte must be right."""
    found, expected = (Rows.empty((ngrams.row_count(EVERYTHING),), FORMAT) for _ in range(2))
    places = np.arange(len(found.values))
    tier.read(ngrams, EVERYTHING, found, places)
    DictTier(SPEC, FORMAT, SEED).read(ngrams, EVERYTHING, expected, places)
    assert np.array_equal(found.packed(), expected.packed())


def test_what_was_prefetched_is_no_miss_and_counts_as_useful_once(tier):
    ngrams = some_ngrams(0, 40)
    tier.prefetch(ngrams)
    idle(tier)
    calls = len(tier.backing.calls)
    for _ in range(3):
        require_rows(tier, ngrams)
    assert len(tier.backing.calls) == calls
    stats = tier.stats()
    assert (stats["hits"], stats["misses"]) == (120, 0)
    assert (stats["prefetched_read"], stats["prefetched_useful"]) == (40, 40)
    tier.prefetch(some_ngrams(0, 41))
    idle(tier)
    assert counted(tier, "prefetched_present") == 40
    assert tier.backing.calls[calls:] == [keys_of(some_ngrams(40, 1))]


def test_prefetched_and_never_asked_for_is_counted_as_wasted():
    tier = ram_tier(60_000)
    slots = tier.cache.layout.slots
    tier.prefetch(some_ngrams(0, 10))
    idle(tier)
    for first in range(100, 100 + 6 * slots, slots):
        require_rows(tier, some_ngrams(first, slots))
    stats = tier.stats()
    assert (stats["prefetched_wasted"], stats["prefetched_useful"]) == (10, 0)
    tier.close()


def test_a_lookup_goes_before_the_rest_of_a_prefetch(tier):
    tier.backing.gate.shut()
    tier.prefetch(some_ngrams(0, 3 * PREFETCH_NGRAMS))
    until(lambda: len(tier.backing.calls) == 1)
    asked = Asked(tier, some_ngrams(700, 9))
    until(lambda: tier.misses._waiting)
    tier.backing.gate.let(2)
    asked.done().require_staged()
    tier.backing.gate.open()
    idle(tier)
    assert [len(call) for call in tier.backing.calls] == [PREFETCH_NGRAMS, 9] + [
        PREFETCH_NGRAMS
    ] * 2


def test_a_lookup_that_overtakes_is_not_read_again(tier):
    """What a lookup asks for while its prefetch waits is read once, for both."""
    ngrams = some_ngrams(0, 2 * PREFETCH_NGRAMS)
    tier.backing.gate.shut()
    tier.prefetch(ngrams)
    until(lambda: len(tier.backing.calls) == 1)
    overtaking = ngrams.take(slice(100, 160))
    asked = Asked(tier, overtaking)
    until(lambda: tier.misses._waiting)
    tier.backing.gate.open()
    asked.done().require_staged()
    idle(tier)
    read = [key for call in tier.backing.calls for key in call]
    assert sorted(read) == sorted(keys_of(ngrams)), "each once"
    assert counted(tier, "prefetched_late") == 160 - PREFETCH_NGRAMS
    assert counted(tier, "prefetched_read") == PREFETCH_NGRAMS + 256 - 160


def test_what_is_cancelled_is_not_begun(tier):
    tier.backing.gate.shut()
    first = tier.prefetch(some_ngrams(0, 4 * PREFETCH_NGRAMS))
    second = tier.prefetch(some_ngrams(1000, 50))
    third = tier.prefetch(some_ngrams(2000, 50))
    until(lambda: len(tier.backing.calls) == 1)
    first.cancel()
    second.cancel()
    second.cancel()
    tier.backing.gate.open()
    idle(tier)
    assert [len(call) for call in tier.backing.calls] == [PREFETCH_NGRAMS, 50]
    assert tier.backing.calls[1] == keys_of(some_ngrams(2000, 50))
    assert counted(tier, "prefetches_cancelled") == 2
    third.cancel()
    require_rows(tier, some_ngrams(1000, 50))


def test_too_many_are_dropped_and_counted(tier, monkeypatch):
    monkeypatch.setattr(tier.misses._background, "_pending_max", 100)
    tier.backing.gate.shut()
    tier.prefetch(some_ngrams(0, 90))
    tier.prefetch(some_ngrams(100, 20))
    assert counted(tier, "prefetches_dropped") == 1
    tier.backing.gate.open()
    idle(tier)
    assert [len(call) for call in tier.backing.calls] == [90]
    require_rows(tier, some_ngrams(100, 20))


def test_a_prefetch_that_fails_hurts_nobody(tier):
    ngrams = some_ngrams(0, 30)
    tier.backing.broken = {keys_of(ngrams)[3]: StoreError("gone")}
    tier.prefetch(ngrams)
    idle(tier)
    assert counted(tier, "prefetched_failed") == 30
    tier.backing.broken = {}
    require_rows(tier, ngrams)


def test_without_an_arena_the_tier_below_prefetches():
    tier = ram_tier(0)
    ngrams = some_ngrams(0, 10)
    tier.prefetch(ngrams)
    assert [keys_of(each) for each in tier.backing.prefetched] == [keys_of(ngrams)]
    tier.close()


def test_closing_ends_a_prefetch_after_the_part_that_is_read(tier):
    tier.backing.gate.shut()
    tier.prefetch(some_ngrams(0, 6 * PREFETCH_NGRAMS))
    until(lambda: len(tier.backing.calls) == 1)
    closing = threading.Thread(target=tier.close)
    closing.start()
    until(lambda: tier.misses._closed)
    tier.backing.gate.open()
    closing.join(60)
    assert not closing.is_alive()
    assert len(tier.backing.calls) == 1
    with pytest.raises(StoreError, match="closed"):
        tier.prefetch(some_ngrams(0, 1))
    with pytest.raises(StoreError, match="closed"):
        require_rows(tier, some_ngrams(0, 1))


def test_a_forked_child_has_an_empty_arena_and_right_rows(tier):
    """The parent forks while one thread reads, one waits and a prefetch is queued."""
    known, unknown = some_ngrams(0, 60), some_ngrams(100, 30)
    require_rows(tier, known)
    first = held_up(tier, unknown)
    second = Asked(tier, some_ngrams(90, 20), request_id=2)
    tier.prefetch(some_ngrams(500, 300))
    until(lambda: tier.misses._waiting)
    child = os.fork()
    if child == 0:
        try:
            tier.backing.gate = type(tier.backing.gate)()
            tier.backing.calls.clear()
            assert tier.stats()["slots_used"] == 0
            require_rows(tier, known)
            require_rows(tier, unknown)
            assert sum(map(len, tier.backing.calls)) == 90
            require_rows(tier, known)
            assert sum(map(len, tier.backing.calls)) == 90
            tier.prefetch(some_ngrams(900, 40))
            idle(tier)
            assert tier.cache.present(0, some_ngrams(900, 40)).all()
            tier.check_integrity()
            tier.close()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    tier.backing.gate.open()
    first.done().require_staged()
    second.done().require_staged()
    idle(tier)
    calls = len(tier.backing.calls)
    require_rows(tier, known)
    require_rows(tier, some_ngrams(500, 300))
    assert len(tier.backing.calls) == calls, "the parent's arena is as it was"


def test_limits_leave_room_for_whole_turns():
    """A prefetch part and a lookup's part fit the memory that turns are read into."""
    assert PREFETCH_NGRAMS <= misses_module.TURN_NGRAMS
