"""Packing rows into blocks and back: equal to the twin, every flipped bit found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.errors import StoreError
from engram.store.layout import BlockLayout
from engram.store.pack import ALL_SOUND, join_rows, pack_rows, pack_rows_twin, unpack_rows


@settings(max_examples=80, deadline=None)
@given(
    row_bytes=st.integers(1, 4076) | st.sampled_from([264, 320, 160, 90, 84]),
    count=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    layer=st.integers(0, 200),
    first_row=st.integers(0, 2**40),
    whole_page=st.booleans(),
)
def test_packing_equals_twin_and_unpacks(row_bytes, count, seed, layer, first_row, whole_page):
    layout = BlockLayout(row_bytes)
    rows = np.random.default_rng(count).integers(0, 256, (count, row_bytes), np.uint8)
    end = layout.value_bytes(count)
    span = np.full(end + 16 * whole_page, 0xEE, np.uint8)
    pack_rows(rows, layout, seed, layer, first_row, span)
    np.testing.assert_array_equal(span[:end], pack_rows_twin(rows, layout, seed, layer, first_row))
    assert not span[end:].any()
    back = np.zeros_like(rows)
    assert unpack_rows(span, layout, seed, layer, first_row, back) == ALL_SOUND
    np.testing.assert_array_equal(back, rows)
    assert unpack_rows(span, layout, seed ^ 1, layer, first_row, back) == 0
    assert unpack_rows(span, layout, seed, layer + 1, first_row, back) == 0
    assert unpack_rows(span, layout, seed, layer, first_row + 1, back) == 0


@settings(max_examples=100, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_unpacking_finds_every_flipped_bit(place, bit):
    layout = BlockLayout(264)
    rows = np.random.default_rng(0).integers(0, 256, (40, 264), np.uint8)
    span = pack_rows_twin(rows, layout, 5, 1, 0).copy()
    position = int(place * span.size)
    span[position] ^= 1 << bit
    bad = unpack_rows(span, layout, 5, 1, 0, rows)
    block, offset = divmod(position, 4096)
    if offset < 15 * 264:
        expected = block * 15 + offset // 264
    elif offset < 15 * 268:
        expected = block * 15 + (offset - 15 * 264) // 4
    else:
        expected = block * 15
    # The last block has 10 rows, so its checks and zeros begin earlier.
    if block == 2 and offset >= 10 * 264:
        expected = 30 + ((offset - 10 * 264) // 4 if offset < 10 * 268 else 0)
    assert bad == expected


def test_packing_refuses_buffers_that_do_not_fit():
    layout = BlockLayout(264)
    rows = np.zeros((40, 264), np.uint8)
    for span in (np.zeros(3 * 4096 + 1, np.uint8), np.zeros(3 * 4096, np.int8)):
        with pytest.raises(StoreError):
            pack_rows(rows, layout, 0, 0, 0, span)
    with pytest.raises(StoreError, match=r"\[n, 264\]"):
        pack_rows(np.zeros((40, 263), np.uint8), layout, 0, 0, 0, np.zeros(3 * 4096, np.uint8))


@pytest.mark.parametrize(("value_bytes", "scale_bytes"), [(256, 8), (80, 4), (1, 1), (7, 3)])
def test_joining_equals_numpy(value_bytes, scale_bytes):
    rng = np.random.default_rng(value_bytes)
    values = rng.integers(0, 256, (50, value_bytes), np.uint8)
    scales = rng.integers(0, 256, (50, scale_bytes), np.uint8)
    rows = np.empty((50, value_bytes + scale_bytes), np.uint8)
    join_rows(values, scales, rows)
    np.testing.assert_array_equal(rows, np.concatenate([values, scales], axis=1))


def test_joining_refuses_arrays_that_do_not_fit():
    values, scales = np.zeros((5, 6), np.uint8), np.zeros((5, 2), np.uint8)
    for rows in (np.zeros((5, 9), np.uint8), np.zeros((4, 8), np.uint8), np.zeros(40, np.uint8)):
        with pytest.raises(StoreError, match="do not fit each other"):
            join_rows(values, scales, rows)
    with pytest.raises(StoreError, match="C-contiguous uint8"):
        join_rows(values, scales, np.zeros((5, 8), np.int8))
    with pytest.raises(StoreError, match="C-contiguous uint8"):
        join_rows(values, scales, np.zeros((8, 5), np.uint8).T)
