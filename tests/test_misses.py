"""The miss path: each n-gram read once for all who ask, and failures named to exactly those."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from arenas import keys_of
from dict_tier import DictTier
from gated_tier import (
    BUNDLE,
    EVERYTHING,
    FORMAT,
    SEED,
    SPEC,
    Asked,
    held_up,
    ram_tier,
    some_ngrams,
    until,
    waiting,
)

from engram.errors import (
    CorruptTableError,
    OverloadError,
    RowIntegrityError,
    SpecMismatchError,
    StoreError,
)
from engram.ram import misses as misses_module
from engram.ram.memory import Memory
from engram.ram.misses import TURN_NGRAMS
from engram.rows import Rows
from engram.tiers import Selection


@pytest.fixture
def tier():
    tier = ram_tier()
    yield tier
    tier.backing.gate.open()
    tier.close()
    tier.check_integrity()


def test_each_ngram_is_read_once_for_all_who_ask(tier):
    first = held_up(tier, some_ngrams(0, 20))
    others = [Asked(tier, some_ngrams(5 * n, 30), request_id=10 + n) for n in range(6)]
    waiting(tier, 6)
    tier.backing.gate.open()
    for asked in (first, *others):
        asked.done().require_staged()
        assert not asked.failures
    read = Counter(key for call in tier.backing.calls for key in call)
    assert len(tier.backing.calls) == 2, "all who waited were served in one turn"
    assert set(read.values()) == {1}
    assert set(read) == set(keys_of(some_ngrams(0, 55)))
    counts = tier.misses.counters.read()
    assert counts["ngrams_read"] == 55
    assert counts["ngrams_shared"] == 6 * 30 - 55


def test_request_ids_may_use_all_64_bits(tier):
    first = held_up(tier, some_ngrams(0, 3))
    others = [Asked(tier, some_ngrams(2, 3), request_id=n) for n in (2**64 - 1, 2**63, 1)]
    waiting(tier, 3)
    tier.backing.gate.open()
    for asked in (first, *others):
        asked.done().require_staged()
    Asked(tier, some_ngrams(0, 9), request_id=2**64 - 2).done().require_staged()


def test_without_an_arena_those_who_wait_together_still_share():
    tier = ram_tier(0)
    first = held_up(tier, some_ngrams(100, 1))
    others = [Asked(tier, some_ngrams(0, 30), request_id=n) for n in range(1, 5)]
    waiting(tier, 4)
    tier.backing.gate.open()
    for asked in (first, *others):
        asked.done().require_staged()
    assert tier.backing.calls[1:] == [keys_of(some_ngrams(0, 30))]
    tier.close()


def test_a_turn_takes_as_many_requests_as_it_may_read(tier, monkeypatch):
    monkeypatch.setattr(misses_module, "TURN_NGRAMS", 50)
    first = held_up(tier, some_ngrams(900, 1))
    others = []
    for n in range(5):
        others.append(Asked(tier, some_ngrams(100 * n, 20), request_id=n + 1))
        waiting(tier, n + 1)
    tier.backing.gate.open()
    for asked in (first, *others):
        asked.done().require_staged()
    assert [len(call) for call in tier.backing.calls] == [1, 40, 40, 20]


def test_who_is_served_goes_on_while_others_are_read_for(tier, monkeypatch):
    monkeypatch.setattr(misses_module, "TURN_NGRAMS", 20)
    asked = [held_up(tier, some_ngrams(900, 1))]
    for n in range(6):
        asked.append(Asked(tier, some_ngrams(100 * n, 20), request_id=n + 2))
        waiting(tier, n + 1)
    for n in range(7):
        tier.backing.gate.let(1)
        asked[n].done()
        assert not any(later.over for later in asked[n + 1 :])
    for each in asked:
        each.require_staged()


def test_a_full_queue_refuses_and_serves_those_in_it(tier, monkeypatch):
    monkeypatch.setattr(misses_module, "WAITING_NGRAMS_MAX", 25)
    first = held_up(tier, some_ngrams(0, 5))
    second = Asked(tier, some_ngrams(10, 20))
    waiting(tier, 1)
    refused = Asked(tier, some_ngrams(50, 6)).done()
    assert isinstance(refused.error, OverloadError)
    assert "20 n-grams wait" in str(refused.error)
    third = Asked(tier, some_ngrams(60, 5))
    waiting(tier, 2)
    tier.backing.gate.open()
    for asked in (first, second, third):
        asked.done().require_staged()
    assert refused.untouched
    assert tier.misses.counters.read()["requests_refused"] == 1


def test_who_waits_too_long_is_told_so_and_nothing_is_written_for_it_later(tier):
    first = held_up(tier, some_ngrams(0, 5))
    late = Asked(tier, some_ngrams(10, 5), timeout_s=0.02).done()
    assert isinstance(late.error, OverloadError)
    assert "time limit" in str(late.error)
    assert not first.over
    tier.backing.gate.open()
    first.done().require_staged()
    assert late.untouched
    assert len(tier.backing.calls) == 1


def test_what_is_being_read_is_waited_for_though_the_limit_passes(tier):
    """Somebody reads it already, so its memory must not be left before that has ended."""
    first = held_up(tier, some_ngrams(0, 5))
    others = [Asked(tier, some_ngrams(10, 5), request_id=n, timeout_s=1.0) for n in (2, 3)]
    waiting(tier, 2)
    tier.backing.gate.let(1)
    first.done().require_staged()
    until(lambda: len(tier.backing.calls) == 2)
    time.sleep(1.2)
    assert not any(asked.over for asked in others)
    tier.backing.gate.open()
    for asked in others:
        asked.done().require_staged()


def _one_of(ngrams, position, layer, column):
    """(model layer, row id) of one row of one n-gram."""
    one = ngrams.take(slice(position, position + 1))
    selection = Selection.of(SPEC, [layer], [column])
    _, ids = SPEC.ngram_rows(
        one.windows,
        one.orders,
        selection.layer_array,
        selection.column_array,
        selection.ordered,
        selection.order_bounds,
    )
    return layer, int(ids[0])


def test_failures_are_named_to_exactly_those_who_asked():
    ngrams = some_ngrams(0, 30)
    layer, row = _one_of(ngrams, 5, SPEC.layer_ids[1], SPEC.heads * 2 + 3)
    tier = ram_tier(damaged=[(layer, row)])
    bad = keys_of(ngrams)[5]
    first = held_up(tier, some_ngrams(500, 3))
    with_it = [Asked(tier, ngrams, request_id=n + 2) for n in range(2)]
    without = Asked(tier, some_ngrams(6, 30), request_id=9)
    waiting(tier, 3)
    tier.backing.gate.open()
    first.done().require_staged()
    without.done().require_staged()
    assert not without.failures
    for asked in with_it:
        asked.done().require_staged(but={bad})
        assert asked.failures.rows == {layer: [row]}
    present = tier.cache.present(tier.number, ngrams)
    assert present.tolist() == [position != 5 for position in range(30)], "never kept"
    again = Asked(tier, ngrams).done()
    assert again.failures.rows == {layer: [row]}
    assert tier.backing.calls[-1] == [bad], "only what is not there is read again"
    tier.close()


def test_a_lookup_fails_only_for_rows_it_selects():
    ngrams = some_ngrams(0, 12)
    layer, column = SPEC.layer_ids[1], SPEC.heads * 2 + 3
    damaged = _one_of(ngrams, 5, layer, column)
    tier = ram_tier(damaged=[damaged])
    others = [each for each in range(SPEC.num_columns) if each != column]
    for selection, fails in (
        (EVERYTHING, True),
        (Selection.of(SPEC, [layer], [column]), True),
        (Selection.of(SPEC, None, others), False),
        (Selection.of(SPEC, SPEC.layer_ids[:1]), False),
        (EVERYTHING, True),
    ):
        count = ngrams.row_count(selection)
        found, expected = (Rows.empty((count,), FORMAT) for _ in range(2))
        places = np.arange(count)
        DictTier(SPEC, FORMAT, SEED).read(ngrams, selection, expected, places)
        if fails:
            with pytest.raises(RowIntegrityError) as caught:
                tier.read(ngrams, selection, found, places)
            assert caught.value.failures == {damaged[0]: (damaged[1],)}
        else:
            tier.read(ngrams, selection, found, places)
        different = (found.packed() != expected.packed()).any(axis=1)
        assert different.sum() <= fails, "all other rows are valid"
    tier.close()


@pytest.mark.parametrize(
    "error",
    [StoreError("gone"), CorruptTableError("torn"), SpecMismatchError("other", "heads")],
    ids=lambda error: type(error).__name__,
)
def test_everybody_hears_why_the_reading_failed(tier, error):
    first = held_up(tier, some_ngrams(0, 5))
    ngrams = some_ngrams(10, 5)
    others = [Asked(tier, ngrams, request_id=n + 2) for n in range(3)]
    waiting(tier, 3)
    tier.backing.broken = {keys_of(ngrams)[2]: error}
    tier.backing.gate.open()
    first.done().require_staged()
    for asked in others:
        asked.done()
        assert type(asked.error) is type(error)
        assert str(asked.error) == str(error)
        assert vars(asked.error) == vars(error)
    assert len({id(asked.error) for asked in others}) == 3, "each its own, with its own traceback"
    assert not tier.cache.present(tier.number, ngrams).any()
    tier.backing.broken = {}
    Asked(tier, ngrams).done().require_staged()


def test_an_error_nobody_foresaw_reaches_everybody_as_an_error(tier):
    first = held_up(tier, some_ngrams(0, 5))
    ngrams = some_ngrams(10, 5)
    others = [Asked(tier, ngrams, request_id=n + 2) for n in range(3)]
    waiting(tier, 3)
    tier.backing.broken = {keys_of(ngrams)[0]: OSError("unplugged")}
    tier.backing.gate.open()
    first.done()
    errors = [asked.done().error for asked in others]
    assert sorted(type(error).__name__ for error in errors) == [
        "OSError",
        "OverloadError",
        "OverloadError",
    ]
    tier.backing.broken = {}
    Asked(tier, ngrams).done().require_staged()


@pytest.mark.parametrize("being_read", [False, True])
def test_an_interrupted_caller_leaves_nothing_behind_that_is_written_to(tier, being_read):
    """Its memory may be gone as soon as it has returned."""
    first = held_up(tier, some_ngrams(0, 5))
    memory = Memory.private(TURN_NGRAMS * BUNDLE.staged_bytes)
    done = []

    def meanwhile():
        waiting(tier, 1)
        if being_read:
            other = Asked(tier, some_ngrams(20, 5))
            waiting(tier, 2)
            tier.backing.gate.let(1)
            until(lambda: len(tier.backing.calls) == 2)
            done.append(other)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        tier.backing.gate.open()

    thread = threading.Thread(target=meanwhile)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        tier.misses.read(some_ngrams(10, 5), memory.address, request_id=3)
    before = memory.bytes().copy()
    thread.join()
    for asked in (first, *done):
        asked.done()
    Asked(tier, some_ngrams(30, 1)).done().require_staged()
    assert np.array_equal(memory.bytes(), before)


def test_many_threads_on_a_tiny_arena_get_every_byte_right():
    tier = ram_tier(60_000)
    assert 20 < tier.cache.layout.slots < 60
    wrong = []

    def look(seed):
        for first, count in _drawn([seed]):
            ngrams = some_ngrams(first, count)
            asked = Rows.empty((ngrams.row_count(EVERYTHING),), FORMAT)
            places = np.arange(len(asked.values))
            tier.read(ngrams, EVERYTHING, asked, places)
            expected = Rows.empty((len(places),), FORMAT)
            DictTier(SPEC, FORMAT, SEED).read(ngrams, EVERYTHING, expected, places)
            if not np.array_equal(asked.packed(), expected.packed()):
                wrong.append(keys_of(ngrams))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = tier.stats()
    assert stats["evicted"] > 50
    assert stats["hits"] + stats["misses"] == sum(count for _, count in _drawn(range(8)))
    tier.check_integrity()
    tier.close()


def _drawn(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            yield int(rng.integers(0, 60)), int(rng.integers(1, 20))
