"""Sizes of the RAM tier: within the budget, and using it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engram.ram.layout import ArenaLayout


@given(
    st.integers(0, 1 << 40),
    st.integers(1, 200).map(lambda lines: 64 * lines),
    st.sampled_from([64, 128]),
    st.integers(1, 40),
)
def test_a_layout_fits_its_budget_and_uses_it(budget, slot_bytes, head_bytes, tables):
    layout = ArenaLayout.within(budget, slot_bytes, head_bytes, tables)
    assert layout.total_bytes(tables) <= budget or not layout.slots
    assert layout.slots_per_slab & (layout.slots_per_slab - 1) == 0
    assert layout.buckets * 8 >= 2 * layout.slots
    slabs = sum(layout.slab_bytes(number) for number in range(layout.slabs)) if layout.slots else 0
    if layout.slabs < 2000:
        assert layout.total_bytes(tables) == slabs + tables * layout.directory_bytes
    # Half, because a directory can double for one slot more; all but pages where there is one.
    whole = layout.slots * (slot_bytes + head_bytes + tables * 16)
    assert whole >= budget // 2 - tables * 8192 - 128 * head_bytes - 65536


def test_nothing_fits_into_nothing():
    assert ArenaLayout.within(0, 4224, 64, 1).slots == 0
    assert ArenaLayout.within(4096, 4224, 64, 1).slots == 0


def test_a_large_tier_is_nearly_all_bundles():
    layout = ArenaLayout.within(8 << 30, 4224, 64, 1)
    assert layout.slots * 4224 > 0.97 * (8 << 30)
    assert layout.slabs <= 256
