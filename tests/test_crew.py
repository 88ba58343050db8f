"""Large lookups with helpers: the same bytes, from many threads at once, and after a fork."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from conftest import small_v41
from dict_tier import DictTier

from engram.ram import _crew
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat
from engram.table import Table

ROW_FORMAT = RowFormat("fp8-ue8m0", 64)


@pytest.fixture
def table(monkeypatch):
    """All n-grams of a few tokens in memory; every lookup of it is worth help."""
    monkeypatch.setattr(_crew, "WORTHWHILE_BYTES", 0)
    model = DictTier(small_v41(), ROW_FORMAT, 7)
    table = Table(ram_tiers({"a": model}, 4 << 20, shared=False)["a"])
    table.lookup(np.arange(60) % 20)
    yield table
    table._tier.check_integrity()


@pytest.fixture
def crew(monkeypatch):
    """Two helpers, however many processors there are."""
    made = _crew.Crew(2)
    monkeypatch.setattr(_crew, "_crew", made)
    yield made
    made.quit()
    assert not any(thread.is_alive() for thread in made._threads)


def _expected(tokens):
    return Table(DictTier(small_v41(), ROW_FORMAT, 7)).lookup(tokens).packed()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 60, 500])
def test_the_same_bytes_with_help(table, crew, count):
    tokens = np.arange(count) % 20
    before = table.stats()["tiers"][0]
    assert np.array_equal(table.lookup(tokens).packed(), _expected(tokens))
    after = table.stats()["tiers"][0]
    counted = {name: after[name] - before[name] for name in ("lookups", "hits", "misses")}
    # The first three windows of a text differ from those in its midst.
    assert counted == {"lookups": 1, "hits": 3 * count, "misses": 0}


def test_misses_are_found_with_help(table, crew):
    tokens = np.random.default_rng(0).integers(0, 600, 300)
    for _ in range(2):
        assert np.array_equal(table.lookup(tokens).packed(), _expected(tokens))


def test_helpers_that_fell_asleep_wake_up(table, crew):
    tokens = np.arange(400) % 20
    for _ in range(5):
        time.sleep(0.05)
        assert np.array_equal(table.lookup(tokens).packed(), _expected(tokens))


def test_many_callers_at_once(table, crew):
    """One has help, the others work alone."""
    tokens = np.arange(200) % 20
    expected, wrong = _expected(tokens), []

    def work():
        for _ in range(100):
            if not np.array_equal(table.lookup(tokens).packed(), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_busy_crew_does_nothing(table, crew):
    words = crew._words[(crew.address - crew._words.ctypes.data) // 8 :]
    words[_crew._LOCK] = 1
    tokens = np.arange(100) % 20
    assert np.array_equal(table.lookup(tokens).packed(), _expected(tokens))
    assert words[_crew._LOCK] == 1
    words[_crew._LOCK] = 0


def test_a_forked_child_has_a_crew_of_its_own(table, crew):
    tokens = np.arange(200) % 20
    expected = _expected(tokens)
    child = os.fork()
    if not child:
        # Without helpers of the parent, and with an empty cache.
        same = all(np.array_equal(table.lookup(tokens).packed(), expected) for _ in range(3))
        os._exit(0 if same and _crew._crew is not crew else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(table.lookup(tokens).packed(), expected)


def test_threads_that_cannot_be_started_are_done_without(table, monkeypatch):
    start, started = threading.Thread.start, []

    def refuse(thread):
        if thread.name == "engram-copy" and started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    made = _crew.Crew(3)
    monkeypatch.setattr(_crew, "_crew", made)
    tokens = np.arange(200) % 20
    assert np.array_equal(table.lookup(tokens).packed(), _expected(tokens))
    assert len(made._threads) == 1
    made.quit()
