"""What the RAM tier's kernels copy, row by row, against loops over single rows."""

from __future__ import annotations

import numpy as np
from arenas import ArenaReader, bundle_bytes, cache_of, fill, ngrams_of, row_of
from hypothesis import given, settings
from hypothesis import strategies as st

from engram._ngrams import number_ngrams, number_twin
from engram.ram import _crew, _staging
from engram.ram.copies import Copies
from engram.ram.layout import STAGED_HEAD_BYTES, BundleLayout
from engram.ram.memory import Memory
from engram.ram.staged import Staged
from engram.rows import Rows
from engram.tiers import Ngrams, Selection


@st.composite
def geometries(draw):
    """(bundle, min_order, selection) of any shape, rows of odd sizes, with and without scales."""
    min_order, orders = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    bundle = BundleLayout(
        layers=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        value_bytes=draw(st.integers(1, 70)),
        scale_bytes=draw(st.sampled_from([0, 0, 1, 4, 9])),
        max_order=min_order + orders - 1,
    )
    columns = st.lists(
        st.integers(0, orders * bundle.heads - 1), min_size=1, max_size=12, unique=True
    )
    layers = draw(st.lists(st.integers(0, bundle.layers - 1), min_size=1, unique=True))
    chosen = draw(st.one_of(columns, st.just(list(range(orders * bundle.heads)))))
    selection = Selection(tuple(layers), tuple(chosen), bundle.heads, min_order, orders)
    return bundle, min_order, selection


def room_for(bundle, rows):
    """Rows filled with a byte each, to see what is left alone."""
    values = np.full((rows, bundle.value_bytes), 0xEE, np.uint8)
    scales = np.full((rows, bundle.scale_bytes), 0xEE, np.uint8) if bundle.scale_bytes else None
    return Rows(values, scales)


def set_row(out, place, values, scales):
    out.values[place] = values
    if out.scales is not None:
        out.scales[place] = scales


def require_equal(found, expected):
    assert np.array_equal(found.values, expected.values)
    assert (found.scales is None) == (expected.scales is None)
    if found.scales is not None:
        assert np.array_equal(found.scales, expected.scales)


def expected_lookup(bundle, min_order, selection, windows):
    layers, columns = selection.layers, selection.columns
    out = room_for(bundle, len(windows) * len(layers) * len(columns))
    place = 0
    for window in windows.tolist():
        for layer in layers:
            for column in columns:
                order, head = divmod(column, bundle.heads)
                contents = bundle_bytes(0, window[: min_order + order], bundle)
                set_row(out, place, *row_of(bundle, contents, layer, head))
                place += 1
    return out


def used_keys(selection, windows):
    orders = selection.min_order + np.flatnonzero(np.diff(selection.order_bounds))
    return [tuple(window[:order]) for window in windows.tolist() for order in orders.tolist()]


@given(geometries(), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_lookups_copy_hits_and_deliver_misses(geometry, tokens, part, seed):
    bundle, min_order, selection = geometry
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, 5, (tokens, bundle.max_order), dtype=np.int32)
    cache = cache_of(256, bundle=bundle, min_order=min_order)
    keys = list(dict.fromkeys(used_keys(selection, windows)))
    kept = [key for key in keys if rng.random() < part]
    if kept:
        fill(cache, 0, kept)
    reader = ArenaReader(cache, min_order=min_order)
    expected = expected_lookup(bundle, min_order, selection, windows)
    out = room_for(bundle, len(expected.values))
    reader.lookup(windows, selection, out)
    require_equal(out, expected)
    missed = [key for key in keys if key not in set(kept)]
    assert reader.fetched == ([missed] if missed else [])


@given(geometries(), st.integers(0, 30), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_reads_put_rows_where_they_are_wanted(geometry, count, part, seed):
    bundle, min_order, selection = geometry
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, 5, (count, bundle.max_order), dtype=np.int32)
    keys = list(dict.fromkeys(used_keys(selection, windows)))
    ngrams = ngrams_of(keys, bundle.max_order)
    cache = cache_of(256, bundle=bundle, min_order=min_order)
    kept = [key for key in keys if rng.random() < part]
    if kept:
        fill(cache, 0, kept)
    rows = ngrams.row_count(selection)
    places = rng.permutation(rows + 4)[:rows]
    out, expected = room_for(bundle, rows + 4), room_for(bundle, rows + 4)
    ArenaReader(cache, min_order=min_order).read(ngrams, selection, out, places)
    row = 0
    for key in keys:
        contents = bundle_bytes(0, key, bundle)
        for layer in selection.layers:
            for column in selection.columns:
                order, head = divmod(column, bundle.heads)
                if min_order + order == len(key):
                    set_row(expected, places[row], *row_of(bundle, contents, layer, head))
                    row += 1
    require_equal(out, expected)


def test_a_lookup_so_large_that_threads_share_it():
    bundle = BundleLayout(layers=2, heads=4, value_bytes=100, scale_bytes=4, max_order=3)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 6, (700, 3), dtype=np.int32)
    selection = Selection((1, 0), tuple(rng.permutation(8).tolist()), 4, 2, 2)
    keys = list(dict.fromkeys(used_keys(selection, windows)))
    cache = cache_of(512, bundle=bundle, slots_per_slab=64)
    fill(cache, 0, keys[::2])
    reader = ArenaReader(cache)
    expected = expected_lookup(bundle, 2, selection, windows)
    assert expected.values.nbytes > 4 * _crew.WORTHWHILE_BYTES
    for _ in range(20):
        out = room_for(bundle, len(expected.values))
        reader.fetched.clear()
        reader.lookup(windows, selection, out)
        require_equal(out, expected)
        assert reader.fetched == [keys[1::2]]
    hits, misses, lookups = reader.memory.words(11)[8:].tolist()
    assert (hits + misses, lookups) == (20 * 1400, 20)


@given(geometries())
@settings(deadline=None)
def test_copies_are_those_of_single_rows_merged(geometry):
    bundle, _, selection = geometry
    copies = Copies.of(bundle, selection)
    token_rows = len(selection.layers) * len(selection.columns)
    for order in range(selection.orders):
        pieces = copies.pieces[copies.bounds[order] : copies.bounds[order + 1]].tolist()
        places = [
            j for j, column in enumerate(selection.columns) if column // bundle.heads == order
        ]
        assert copies.order_used[order] == bool(places)
        contents = np.arange(bundle.layers * bundle.layer_bytes)
        found = [
            np.full(token_rows * each, -1) for each in (bundle.value_bytes, bundle.scale_bytes)
        ]
        expected = [part.copy() for part in found]
        for source, part, target, size in pieces:
            assert (found[part][target : target + size] == -1).all(), "nothing is written twice"
            found[part][target : target + size] = contents[source : source + size]
        for i, layer in enumerate(selection.layers):
            for j in places:
                place = i * len(selection.columns) + j
                row = row_of(bundle, contents, layer, selection.columns[j] % bundle.heads)
                for part, piece in zip(expected, row, strict=True):
                    part[place * len(piece) : (place + 1) * len(piece)] = piece
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    everything = Selection(
        tuple(range(bundle.layers)),
        tuple(range(selection.orders * bundle.heads)),
        bundle.heads,
        selection.min_order,
        selection.orders,
    )
    parts = 1 + (bundle.scale_bytes > 0)
    pieces = Copies.of(bundle, everything).pieces
    assert len(pieces) <= selection.orders * bundle.layers * parts, "as few as can be"


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=60))
@settings(deadline=None)
def test_ngrams_are_numbered_as_by_a_dict(keys):
    ngrams = ngrams_of(keys, 4)
    firsts, number = number_ngrams(ngrams)
    assert (firsts.tolist(), number.tolist()) == number_twin(ngrams)


@given(geometries(), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_rows_are_staged_as_bundles_and_copied_for_others(geometry, count, seed):
    bundle, min_order, _ = geometry
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, 9, (count, bundle.max_order)).tolist()
    orders = rng.integers(min_order, bundle.max_order + 1, count).tolist()
    keys = [tuple(window[:order]) for window, order in zip(windows, orders, strict=True)]
    ngrams = ngrams_of(keys, bundle.max_order)
    cache = cache_of(8, tables=2, bundle=bundle, min_order=min_order)
    wanted = rng.random(count) < 0.7
    stride = bundle.staged_bytes
    base, other = Memory.private(count * stride), Memory.private(count * stride)
    source = room_for(bundle, int(wanted.sum()) * bundle.layers * bundle.heads)
    contents = [
        bundle_bytes(1, key, bundle) for key, each in zip(keys, wanted, strict=True) if each
    ]
    place = 0
    for each in contents:
        for layer in range(bundle.layers):
            for head in range(bundle.heads):
                set_row(source, place, *row_of(bundle, each, layer, head))
                place += 1
    scales = np.empty((0, 0), np.uint8) if source.scales is None else source.scales
    asked = (ngrams.windows, ngrams.orders, 7, source.values, scales, base.address, stride)
    for turn in (1, 2):
        _staging.stage(cache.views[1], *asked, wanted.astype(np.uint8))
        require_entries(base, ngrams, wanted, 7, bundle, contents, 2 * turn)
    places = np.flatnonzero(wanted)
    before = base.bytes().copy()
    _staging.copy_staged(base.address + stride * places, other.address, stride, 8)
    assert np.array_equal(base.bytes(), before)
    some = ngrams.take(places)
    require_entries(other, some, np.ones(len(some), bool), 8, bundle, contents, 2)
    assert not other.bytes()[len(some) * stride :].any()


def require_entries(memory, ngrams, wanted, request_id, bundle, contents, sequence):
    """Entry by entry: those wanted are answers with these contents, the others as they were."""
    contents = iter(contents)
    for n, entry in enumerate(memory.bytes().reshape(-1, bundle.staged_bytes)[: len(ngrams)]):
        if not wanted[n]:
            assert not entry.any()
            continue
        one = Ngrams(ngrams.windows[n : n + 1], ngrams.orders[n : n + 1])
        address = memory.address + n * bundle.staged_bytes
        assert Staged(one, 1, bundle, address, request_id).whole()
        assert not Staged(one, 0, bundle, address, request_id).whole()
        assert not Staged(one, 1, bundle, address, request_id + 1).whole()
        assert entry[STAGED_HEAD_BYTES:][:8].view(np.uint64)[0] == sequence
        found = entry[STAGED_HEAD_BYTES + bundle.head_bytes :]
        used = bundle.layers * bundle.layer_bytes
        assert np.array_equal(found[:used], next(contents)[:used])
