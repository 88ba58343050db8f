"""Distinct n-grams of a batch: the compiled search against a dict, and rows back to tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engram._ngrams import (
    copy_repeated_rows,
    copy_repeats,
    distinct_ngrams,
    distinct_rows,
    first_twin,
    places_of,
)
from engram.rows import Rows
from engram.tiers import Selection


@st.composite
def cases(draw):
    """Windows over few ids, so that n-grams repeat, with a selection over random orders."""
    min_order = draw(st.integers(1, 2))
    orders = draw(st.integers(1, 4))
    heads = draw(st.integers(1, 3))
    columns = draw(
        st.lists(st.integers(0, orders * heads - 1), min_size=1, unique=True, max_size=12)
    )
    layers = draw(st.lists(st.integers(0, 2), min_size=1, unique=True))
    tokens = draw(st.integers(0, 40))
    ids = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    windows = np.random.default_rng(seed).integers(
        0, ids, (tokens, min_order + orders - 1), dtype=np.int32
    )
    return windows, Selection(tuple(layers), tuple(columns), heads, min_order, orders)


@given(cases())
@settings(deadline=None)
def test_first_tokens_are_those_of_a_dict(case):
    windows, selection = case
    ngrams, tokens, first = distinct_ngrams(windows, selection.min_order, selection)
    used = np.diff(selection.order_bounds) > 0
    assert np.array_equal(first, first_twin(windows, selection.min_order, used))
    assert len(ngrams) == len({tuple(w) for w in ngrams.windows.tolist()}), "each n-gram once"
    for window, order, token in zip(ngrams.windows, ngrams.orders, tokens, strict=True):
        assert np.array_equal(window[:order], windows[token, :order])
        assert (window[order:] == -1).all()


@given(cases())
@settings(deadline=None)
def test_every_token_gets_the_rows_of_its_ngrams(case):
    windows, selection = case
    ngrams, tokens, first = distinct_ngrams(windows, selection.min_order, selection)
    places = places_of(ngrams, tokens, selection)
    assert len(places) == ngrams.row_count(selection) == len(set(places.tolist()))
    layers, columns = len(selection.layers), len(selection.columns)
    out = Rows(
        np.full((len(windows) * layers * columns, 8), 0xEE, np.uint8),
        np.full((len(windows) * layers * columns, 3), 0xEE, np.uint8),
    )
    row = 0
    for window, order in zip(ngrams.windows, ngrams.orders, strict=True):
        for layer in selection.layers:
            for column in selection.columns:
                if selection.min_order + column // selection.heads == order:
                    out.values[places[row]] = _content(window[:order], layer, column)
                    out.scales[places[row]] = _content(window[:order], layer, column)[:3]
                    row += 1
    # Positions of an order are asked for in the selection's own order, as the loop above does.
    copy_repeats(first, selection, out)
    shaped = out.reshape((len(windows), layers, columns))
    for token, window in enumerate(windows):
        for i, layer in enumerate(selection.layers):
            for j, column in enumerate(selection.columns):
                order = selection.min_order + column // selection.heads
                expected = _content(window[:order], layer, column)
                assert np.array_equal(shaped.values[token, i, j], expected)
                assert np.array_equal(shaped.scales[token, i, j], expected[:3])


def _content(ids, layer, column):
    return np.frombuffer(
        np.int64(hash((tuple(int(i) for i in ids), layer, column))).tobytes(), np.uint8
    )


@given(st.lists(st.integers(0, 30), max_size=60))
@settings(deadline=None)
def test_repeated_rows_are_found_and_filled(ids):
    row_ids = np.array(ids, np.int64) * (2**33 + 1)
    places, first = distinct_rows(row_ids)
    assert [ids[p] for p in places] == list(dict.fromkeys(ids))
    out = Rows(np.zeros((len(ids), 8), np.uint8), None)
    out.values[places] = row_ids[places].view(np.uint8).reshape(-1, 8)
    copy_repeated_rows(first, out)
    assert np.array_equal(out.values.reshape(-1).view(np.int64), row_ids)
