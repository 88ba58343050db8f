"""The simulator does what its twins do, and at level 0 what the RAM tier does, in bounded room."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import pytest
from arenas import hash_twin
from conftest import small_v41
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tidy import ROOT

from engram.errors import ConfigError, TraceError
from engram.sizing import _miniature
from engram.sizing._twins import MiniatureTwin, RecencyTwin
from engram.sizing.curve import SAMPLES_MIN, Curve, Sampled
from engram.sizing.replay import size_for
from engram.sizing.simulator import (
    LEVEL_LIVE,
    LEVEL_MAX,
    STATE_BYTES_MAX,
    Simulator,
    hash_ngrams,
    hash_windows,
    sizes_from,
    state_bytes,
)

sys.path.append(str(ROOT / "benchmarks"))
RealTier = import_module("real_tier").RealTier

# Few different ones, some of which only coarse samples leave out.
keys = st.integers(0, 40).map(lambda n: hash_twin(0, (n,)))
batches = st.lists(st.lists(keys, max_size=30), max_size=40)


def fed(simulator, lookups):
    hashes = np.array([each for lookup in lookups for each in lookup], np.uint64)
    starts = np.cumsum([0, *map(len, lookups)])
    simulator.feed(hashes, starts)
    return simulator


def zipf(count, seed, ids=600):
    return (np.random.default_rng(seed).zipf(1.3, count) % ids).astype(np.int32)


@given(batches, st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("twin", [MiniatureTwin, RecencyTwin])
def test_miniatures_do_what_their_twins_do(twin, lookups, sizes):
    simulator = fed(Simulator(sizes, recency=twin is RecencyTwin), lookups)
    for number, (level, slots) in enumerate(sizes):
        expected = twin(level, slots)
        for lookup in lookups:
            expected.lookup(lookup)
        counted = simulator.bank.counts[number].sum(axis=0).tolist()
        assert counted == [expected.accesses, expected.misses, expected.reads]
        if twin is MiniatureTwin:
            require_same(simulator.bank, number, expected)


def require_same(bank, number, twin):
    numbers = bank.numbers[number]
    for ring, head, count, expected in (
        (bank.small, _miniature.SMALL_HEAD, _miniature.SMALL_COUNT, twin.small),
        (bank.main, _miniature.MAIN_HEAD, _miniature.MAIN_COUNT, twin.main),
    ):
        places = (numbers[head] + np.arange(numbers[count])) % ring.shape[1]
        slots = ring[number, places]
        assert bank.keys[number, slots].tolist() == list(expected)
        assert bank.touches[number, slots].tolist() == [twin.touches[key] for key in expected]


@pytest.mark.parametrize("slots", [1, 7, 64, 300, 2500])
def test_level_0_is_the_ram_tier(slots):
    spec = small_v41()
    windows = spec.windows(zipf(6000, seed=slots))
    # Lookups that miss no more than the small queue holds: see `engram.sizing._miniature.run`.
    step = max(1, slots // 16)
    lookups = [np.ascontiguousarray(windows[at : at + step]) for at in range(0, 6000, step)]
    tier = RealTier(spec, slots)
    tier.run(lookups)
    simulator = Simulator([(0, slots)])
    for lookup in lookups:
        simulator.feed(hash_windows(lookup, spec.min_order))
    counted = simulator.bank.counts[0].sum(axis=0).tolist()
    assert counted == [tier.accesses, tier.misses, tier.reads]


def test_a_sample_predicts_the_whole():
    hashes = hash_ngrams(zipf(400_000, 1, 60_000)[:, None], np.ones(400_000, np.uint8))
    starts = np.arange(0, len(hashes) + 1, 200)
    whole, sample = Simulator([(0, 1 << 13)]), Simulator([(4, 1 << 9)])
    for simulator in (whole, sample):
        simulator.feed(hashes, starts)
    true, guess = (each.curve().points[0] for each in (whole, sample))
    assert true.error == 0
    assert abs(guess.hits - true.hits) < 0.02
    assert guess.samples < len(hashes) / 8 or guess.error > 0
    assert abs(guess.reads - true.reads) < 0.02


def test_hashes_are_those_of_the_ram_tier():
    spec = small_v41()
    windows = spec.windows(zipf(50, 3))
    orders = range(spec.min_order, spec.max_order + 1)
    expected = [hash_twin(0, window[:order]) for window in windows.tolist() for order in orders]
    assert hash_windows(windows, spec.min_order).tolist() == expected
    repeated = np.repeat(windows, len(orders), axis=0)
    named = np.tile(np.array(list(orders), np.uint8), len(windows))
    assert hash_ngrams(repeated, named).tolist() == expected


@pytest.mark.parametrize("level", [0, LEVEL_LIVE, LEVEL_MAX])
@pytest.mark.parametrize("largest", [1, 1 << 20, 1 << 40])
def test_the_state_is_bounded(level, largest):
    sizes = sizes_from(level, largest)
    simulator = Simulator(sizes)
    assert simulator.nbytes == state_bytes(sizes) <= STATE_BYTES_MAX
    real = [slots << level for level, slots in sizes]
    assert real == sorted(set(real))
    before = simulator.nbytes
    simulator.feed(np.arange(50_000, dtype=np.uint64))
    assert simulator.nbytes == before


@given(st.integers(1, 1 << 40), st.integers(0, 20))
def test_a_size_is_close_to_what_was_asked_for(slots, finest):
    level, mini = size_for(slots, finest)
    assert level >= finest
    assert abs((mini << level) - slots) <= max(1 << finest, slots / 1000)


def test_counts_begin_anew_and_contents_stay():
    simulator = fed(Simulator([(0, 4096)]), [list(range(2000))])
    assert simulator.curve().points[0].hits == 0
    simulator.forget_counts()
    fed(simulator, [list(range(2000))])
    curve = simulator.curve()
    assert (curve.points[0].hits, curve.accesses, curve.enough) == (1, 2000, 4096)


def test_too_little_says_nothing():
    with pytest.raises(TraceError, match="longer recording"):
        fed(Simulator([(0, 16)]), [list(range(SAMPLES_MIN - 1))]).curve()


@pytest.mark.parametrize("sizes", [[], [(0, 0)], [(-1, 4)], [(LEVEL_MAX + 1, 4)]])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ConfigError, match="sizes"):
        Simulator(sizes)


def test_a_curve_between_its_points():
    def sampled(slots, misses):
        counts = np.zeros((_miniature.GROUPS, 3), np.int64)
        counts[0] = 2000, misses, misses
        return Sampled(slots, 0, counts, misses > 200)

    # What a larger size seems to miss more is chance, and beyond one that never evicts is nothing.
    curve = Curve.of(
        [sampled(n, m) for n, m in ((7, 1600), (15, 1700), (31, 200), (63, 0))], 2000, 1
    )
    assert [point.slots for point in curve.points] == [7, 15, 31]
    assert curve.enough == 31
    found = [curve.hits_at(slots) for slots in (0, 7, 15, 31, 1000)]
    assert found == pytest.approx([0, 0.2, 0.2, 0.9, 0.9])
    assert curve.slots_for(0.91) is None
    for hits in (0.0, 0.1, 0.5, 0.9):
        assert curve.hits_at(curve.slots_for(hits)) == pytest.approx(hits)
    assert curve.reads_at(31) == pytest.approx(0.1)
