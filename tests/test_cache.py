"""The RAM tier's memory against plain dicts and lists: what it keeps, in which order it lets go."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
from arenas import (
    BUNDLE,
    MIN_ORDER,
    ORDERS,
    Arena,
    ArenaReader,
    buckets_twin,
    bundle_bytes,
    cache_of,
    fill,
    hash_twin,
    keys_of,
    ngrams_of,
    row_of,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from policy_twin import PolicyTwin

from engram.ram import _policy
from engram.ram.layout import STAGED_HEAD_BYTES
from engram.ram.memory import Memory
from engram.ram.staged import Staged
from engram.rows import Rows
from engram.tiers import Ngrams, Selection

COLUMNS = ORDERS * BUNDLE.heads
_WHY_LEFT = ("unused", "once", "cold")
few_ids = st.integers(0, 5)
keys = st.one_of(st.tuples(few_ids, few_ids), st.tuples(few_ids, few_ids, few_ids))
key_lists = st.lists(keys, min_size=1, max_size=12, unique=True)


@st.composite
def selections(draw):
    layers = draw(st.permutations(range(BUNDLE.layers)))[: draw(st.integers(1, BUNDLE.layers))]
    columns = draw(st.permutations(range(COLUMNS)))[: draw(st.integers(1, COLUMNS))]
    return Selection(tuple(layers), tuple(columns), BUNDLE.heads, MIN_ORDER, ORDERS)


def room_for(rows):
    values = np.full((rows, BUNDLE.value_bytes), 0xEE, np.uint8)
    return Rows(values, np.full((rows, BUNDLE.scale_bytes), 0xEE, np.uint8))


def used_orders(selection):
    return [MIN_ORDER + o for o in np.flatnonzero(np.diff(selection.order_bounds))]


def require_same(cache, twin):
    """The cache is whole, holds what its twin holds in the same order, and every byte is right."""
    cache.check_integrity()
    arena, writer, numbers = Arena(cache), cache._writer, cache._writer.numbers
    limbo = [key for key, _ in twin.limbo]
    for ring, head, count, expected in (
        (writer.small, _policy.SMALL_HEAD, _policy.SMALL_COUNT, twin.small),
        (writer.main, _policy.MAIN_HEAD, _policy.MAIN_COUNT, twin.main),
        (writer.limbo, _policy.LIMBO_HEAD, _policy.LIMBO_COUNT, limbo),
    ):
        slots = ring[(numbers[head] + np.arange(numbers[count])) % len(ring)].tolist()
        assert [arena.head(slot)[1:] for slot in slots] == list(expected)
    for table, key in twin.bucket_of:
        slot = arena.slot(table, key)
        assert arena.head(slot)[0] % 2 == 0
        assert np.array_equal(arena.bundle(slot), bundle_bytes(table, key))


class CacheMachine(RuleBasedStateMachine):
    """Several tables in one tiny arena, read by several readers, beside the twin of its policy."""

    readers = Bundle("readers")
    holds = Bundle("holds")

    @initialize(
        target=readers,
        slots=st.sampled_from([0, 1, 2, 3, 5, 8, 16, 40, 100, 200]),
        tables=st.integers(1, 3),
        seed=st.integers(0, 2**63 - 1),
    )
    def begin(self, slots, tables, seed):
        self.cache = cache_of(slots, tables, seed=seed)
        self.arena = Arena(self.cache)
        self.twin = PolicyTwin(slots, tables, seed, self.cache.layout.buckets)
        self.held = []
        own = [self._reader(ArenaReader(self.cache, number)) for number in range(tables)]
        return multiple(*own)

    def _reader(self, tier):
        reader = SimpleNamespace(
            tier=tier, table=tier.number, touches=Counter(), held=[], lookups=0, found=Counter()
        )
        self.twin.readers.append(reader)
        return reader

    def _see(self, reader, key):
        """Whether the twin has the key; the reader counts that."""
        hit = (reader.table, key) in self.twin.bucket_of
        reader.found[hit] += 1
        if hit:
            self.twin.touch(reader, (reader.table, key))
        return hit

    @rule(table=st.integers(0, 2), keys=key_lists, prefetched=st.booleans(), data=st.data())
    def fill_some(self, table, keys, prefetched, data):
        table %= len(self.cache.directories)
        left_out = data.draw(st.sets(st.integers(0, len(keys) - 1), max_size=2))
        self._fill(table, keys, prefetched, left_out)

    @rule(table=st.integers(0, 2), seed=st.integers(0, 2**32 - 1), prefetched=st.booleans())
    def flood(self, table, seed, prefetched):
        rng = np.random.default_rng(seed)
        count = max(1, self.cache.layout.slots)
        found = {tuple(rng.integers(0, 9, rng.integers(2, 4)).tolist()) for _ in range(count)}
        self._fill(table % len(self.cache.directories), sorted(found), prefetched, ())

    def _fill(self, table, keys, prefetched, left_out):
        fill(self.cache, table, keys, prefetched=prefetched, left_out=left_out)
        if self.cache.layout.slots:
            for position, key in enumerate(keys):
                if position not in left_out:
                    self.twin.fill((table, key), prefetched)

    @rule(reader=readers, seed=st.integers(0, 2**32 - 1), selection=selections())
    def lookup(self, reader, seed, selection):
        rng = np.random.default_rng(seed)
        tokens = int(rng.integers(0, 30))
        windows = rng.integers(0, 6, (tokens, BUNDLE.max_order), dtype=np.int32)
        layers, columns = len(selection.layers), len(selection.columns)
        out = room_for(tokens * layers * columns)
        reader.tier.fetched.clear()
        reader.tier.lookup(windows, selection, out)
        reader.lookups += 1
        used = used_orders(selection)
        asked = [tuple(window[:order]) for window in windows.tolist() for order in used]
        missed = [key for key in asked if not self._see(reader, key)]
        assert reader.tier.fetched == ([list(dict.fromkeys(missed))] if missed else [])
        shaped = out.reshape((tokens, layers, columns))
        for token, window in enumerate(windows.tolist()):
            self._check(reader.table, window, selection, shaped, token)

    def _check(self, table, window, selection, shaped, token):
        for i, layer in enumerate(selection.layers):
            for j, column in enumerate(selection.columns):
                order, head = divmod(column, BUNDLE.heads)
                contents = bundle_bytes(table, window[: MIN_ORDER + order])
                values, scales = row_of(BUNDLE, contents, layer, head)
                assert np.array_equal(shaped.values[token, i, j], values)
                assert np.array_equal(shaped.scales[token, i, j], scales)

    @rule(reader=readers, keys=key_lists, selection=selections(), seed=st.integers(0, 99))
    def read(self, reader, keys, selection, seed):
        used = used_orders(selection)
        keys = [key for key in keys if len(key) in used]
        ngrams = ngrams_of(keys)
        count = ngrams.row_count(selection)
        places = np.random.default_rng(seed).permutation(count + 3)[:count]
        out = room_for(count + 3)
        reader.tier.fetched.clear()
        reader.tier.read(ngrams, selection, out, places)
        reader.lookups += 1
        missed = [key for key in keys if not self._see(reader, key)]
        assert reader.tier.fetched == ([missed] if missed else [])
        row = 0
        for key in keys:
            contents = bundle_bytes(reader.table, key)
            for layer in selection.layers:
                for column in selection.columns:
                    order, head = divmod(column, BUNDLE.heads)
                    if MIN_ORDER + order == len(key):
                        values, scales = row_of(BUNDLE, contents, layer, head)
                        assert np.array_equal(out.values[places[row]], values)
                        assert np.array_equal(out.scales[places[row]], scales)
                        row += 1
        assert row == count
        untouched = np.setdiff1d(np.arange(count + 3), places)
        assert (out.values[untouched] == 0xEE).all()

    @rule(table=st.integers(0, 2), keys=key_lists, request_id=st.integers(1, 2**63 - 1))
    def stage_present(self, table, keys, request_id):
        table %= len(self.cache.directories)
        memory = Memory.private(len(keys) * BUNDLE.staged_bytes)
        ngrams = ngrams_of(keys)
        missed = self.cache.stage_present(table, ngrams, memory.address, request_id)
        present = [(table, key) in self.twin.bucket_of for key in keys]
        assert (missed == 0).tolist() == present
        assert self.cache.present(table, ngrams).tolist() == present
        entries = memory.bytes().reshape(len(keys), -1)
        for n, key in enumerate(keys):
            one = Ngrams(ngrams.windows[n : n + 1], ngrams.orders[n : n + 1])
            address = memory.address + n * BUNDLE.staged_bytes
            assert Staged(one, table, BUNDLE, address, request_id).whole() == present[n]
            if present[n]:
                contents = entries[n, STAGED_HEAD_BYTES + BUNDLE.head_bytes :]
                assert np.array_equal(contents, bundle_bytes(table, key))

    @precondition(lambda self: len(self.twin.readers) < 6)
    @rule(target=readers, table=st.integers(0, 2))
    def add_reader(self, table):
        return self._reader(ArenaReader.added(self.cache, table % len(self.cache.directories)))

    @rule(reader=readers)
    def remove_reader(self, reader):
        """What it held may go; the tables' own readers stay, or nobody could look."""
        if reader.tier.memory in self.cache.own_readers:
            return
        self.cache.remove_reader(reader.tier.memory)
        self.cache.remove_reader(reader.tier.memory)
        self.twin.readers = [each for each in self.twin.readers if each is not reader]
        self.held = [hold for hold in self.held if hold.reader is not reader]

    @rule(target=holds, reader=readers, seed=st.integers(0, 2**32 - 1))
    def hold(self, reader, seed):
        """Find slots under an epoch; from now on their bytes stay."""
        epoch = reader.tier.own_epochs.enter()
        assert epoch == self.twin.epoch
        reader.held.append(epoch)
        rng = np.random.default_rng(seed)
        windows = rng.integers(0, 6, (int(rng.integers(0, 20)), 3), dtype=np.int32)
        slots = reader.tier.probe(windows)
        reader.lookups += 1
        bytes_of = {}
        for window, found in zip(windows.tolist(), slots.tolist(), strict=True):
            for o, slot in enumerate(found):
                key = tuple(window[: MIN_ORDER + o])
                assert (slot >= 0) == self._see(reader, key)
                assert slot == self.arena.slot(reader.table, key)
                if slot >= 0:
                    bytes_of[slot] = bundle_bytes(reader.table, key)
        hold = SimpleNamespace(reader=reader, epoch=epoch, bytes_of=bytes_of)
        if any(each is reader for each in self.twin.readers):
            self.held.append(hold)
        return hold

    @rule(hold=consumes(holds))
    def let_go(self, hold):
        hold.reader.tier.own_epochs.leave(hold.epoch)
        hold.reader.held.remove(hold.epoch)
        self.held = [each for each in self.held if each is not hold]

    @rule()
    def stats(self):
        self.twin.settle_prefetches()
        stats, counts = self.cache.stats(), self.twin.counts
        assert stats["admitted"] == counts["admitted"]
        assert stats["not_admitted"] == counts["refused"]
        assert stats["evicted"] == counts["evicted"]
        assert stats["prefetched_useful"] == counts["useful"]
        assert stats["prefetched_wasted"] == counts["wasted"]
        assert stats["slots_used"] == counts["admitted"] - counts["evicted"]
        assert stats["slots_in_limbo"] == len(self.twin.limbo) <= self.twin.limbo_max
        for number, left in enumerate(self.twin.left):
            mine = self.cache.table_stats(number)
            assert left == +Counter({why: mine[f"evicted_{why}"] for why in _WHY_LEFT})
            used = mine["held_bytes"] // self.cache._slot_bytes
            assert used == sum(self.twin.used[number].values())

    @invariant()
    def whole(self):
        require_same(self.cache, self.twin)

    @invariant()
    def what_is_held_stays(self):
        for hold in self.held:
            for slot, contents in hold.bytes_of.items():
                assert np.array_equal(self.arena.bundle(slot), contents)

    @invariant()
    def counters_add_up(self):
        for reader in self.twin.readers:
            words = reader.tier.memory.words(11)[8:].tolist()
            assert words == [reader.found[True], reader.found[False], reader.lookups]


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCacheAgainstItsTwin = CacheMachine.TestCase


def test_a_long_run_of_few_hot_and_many_cold_ngrams():
    """Long enough for hot n-grams to go round the main queue, and for ghosts to come back."""
    cache, rng = cache_of(24), np.random.default_rng(0)
    twin = PolicyTwin(24, 1, cache.seed, cache.layout.buckets)
    own = SimpleNamespace(touches=Counter(), held=[])
    twin.readers.append(own)
    reader = ArenaReader(cache)
    selection = Selection((0,), tuple(range(COLUMNS)), BUNDLE.heads, MIN_ORDER, ORDERS)
    for turn in range(400):
        some = {(0, int(n)) for n in np.minimum(200, rng.zipf(1.3, 12))}
        keys, prefetched = sorted(some), bool(turn % 3 == 0)
        fill(cache, 0, keys, prefetched=prefetched)
        for key in keys:
            twin.fill((0, key), prefetched)
        again = [key for key in keys if rng.random() < 0.7] * 2
        ngrams = ngrams_of(again)
        count = ngrams.row_count(selection)
        reader.read(ngrams, selection, room_for(count), np.arange(count))
        for key in again:
            if (0, key) in twin.bucket_of:
                twin.touch(own, (0, key))
        require_same(cache, twin)
    assert min(twin.counts[each] for each in ("evicted", "useful", "wasted")) > 50
    assert cache.stats()["admitted"] == twin.counts["admitted"]


def test_an_ngram_whose_buckets_are_full_is_not_kept():
    cache = cache_of(16)
    twin = PolicyTwin(16, 1, cache.seed, cache.layout.buckets)
    everything = [(a, b) for a in range(40) for b in range(40)]
    both_in_0 = [
        key
        for key in everything
        if buckets_twin(hash_twin(cache.seed, key), cache.layout.buckets) == (0, 0)
    ][:12]
    assert len(both_in_0) == 12
    fill(cache, 0, both_in_0)
    for key in both_in_0:
        twin.fill((0, key), False)
    require_same(cache, twin)
    assert cache.present(0, ngrams_of(both_in_0)).tolist() == [True] * 8 + [False] * 4
    assert cache.stats()["not_admitted"] == 4
    fill(cache, 0, [(99, n) for n in range(8)])
    assert cache.present(0, ngrams_of([(99, n) for n in range(8)])).all(), "others have room"


def test_admission_stops_while_limbo_is_full_and_goes_on_after():
    cache = cache_of(64)
    arena = Arena(cache)
    reader = ArenaReader.added(cache)
    fill(cache, 0, [(0, n) for n in range(64)])
    with reader.holding():
        before = {n: arena.slot(0, (0, n)) for n in range(64)}
        for first in range(1, 20):
            fill(cache, 0, [(first, n) for n in range(30)])
            stats = cache.stats()
            assert stats["slots_in_limbo"] == 4, "as many as limbo takes, then no more"
            assert stats["admitted"] == 64
            cache.check_integrity()
        assert cache.present(0, ngrams_of([(0, n) for n in range(64)])).sum() == 60
        for n, slot in before.items():
            assert np.array_equal(arena.bundle(slot), bundle_bytes(0, (0, n)))
    fill(cache, 0, [(20, n) for n in range(30)])
    assert cache.present(0, ngrams_of([(20, n) for n in range(30)])).all()
    cache.check_integrity()


def test_the_same_ids_in_two_tables_never_meet():
    cache = cache_of(40, tables=2)
    fill(cache, 0, [(1, 2), (1, 2, 3)])
    found = [cache.present(table, ngrams_of([(1, 2), (1, 2, 3)])).tolist() for table in (0, 1)]
    assert found == [[True, True], [False, False]]
    # A reader of table 1 whose directory leads to the other's slots, as one that was just
    # reused would: the key beside the slot names the table.
    arena = Arena(cache)
    arena.entries(1)[:] = arena.entries(0)
    assert not cache.present(1, ngrams_of([(1, 2), (1, 2, 3)])).any()
    reader = ArenaReader(cache, 1)
    selection = Selection((0,), (0,), BUNDLE.heads, MIN_ORDER, ORDERS)
    out = room_for(1)
    reader.lookup(np.array([[1, 2, 3]], np.int32), selection, out)
    assert np.array_equal(out.values[0], row_of(BUNDLE, bundle_bytes(1, (1, 2)), 0, 0)[0])
    assert [keys_of(ngrams_of(each)) for each in reader.fetched] == [[(1, 2)]]
