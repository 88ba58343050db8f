"""What a closed embedded table gives back, and what goes on in other threads meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import small_v41
from dict_tier import DictTier

from engram.errors import SelectionError, StoreError
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat
from engram.table import Table

ROW_FORMAT = RowFormat("fp8-ue8m0", 64)


def _mapped(address):
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(first <= address < last for first, last in ranges)


def _table(budget=4 << 20):
    return Table(ram_tiers({"a": DictTier(small_v41(), ROW_FORMAT, 7)}, budget, shared=False)["a"])


def test_the_memory_goes_with_close():
    table = _table(64 << 20)
    table.lookup(np.arange(50))
    addresses = [slab.address for slab in table._tier.cache.slabs]
    assert all(map(_mapped, addresses))
    table.close()
    table.close()
    assert not any(map(_mapped, addresses))
    table._tier.check_integrity()
    assert table.stats()["tiers"][0]["lookups"] == 1


def test_lookups_under_way_keep_their_memory():
    """Closed under threads that look up: right rows or a clear refusal, never a crash."""
    expected = Table(DictTier(small_v41(), ROW_FORMAT, 7)).lookup(np.arange(200) % 50).packed()
    for _ in range(20):
        table, wrong, refused = _table(), [], []

        def work(table=table, wrong=wrong, refused=refused):
            while not refused:
                try:
                    rows = table.lookup(np.arange(200) % 50)
                except StoreError as error:
                    refused.append(str(error))
                else:
                    wrong += [1] * (not np.array_equal(rows.packed(), expected))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        table.lookup(np.arange(200) % 50)
        table.close()
        for thread in threads:
            thread.join()
        assert not wrong
        assert all("closed" in said for said in refused)


def test_one_table_of_an_arena_is_closed():
    models = {name: DictTier(small_v41(), ROW_FORMAT, seed) for name, seed in (("a", 1), ("b", 2))}
    tiers = ram_tiers(models, 4 << 20, shared=False)
    first, second = Table(tiers["a"]), Table(tiers["b"])
    wanted = second.lookup(np.arange(20)).packed()
    first.close()
    assert np.array_equal(second.lookup(np.arange(20)).packed(), wanted)
    with pytest.raises(StoreError, match="closed"):
        first.lookup(np.arange(3))
    second.close()


def test_a_buffer_must_be_rows():
    table = _table()
    with pytest.raises(SelectionError, match=r"engram\.Rows, not ndarray"):
        table.lookup([1, 2], out=np.zeros((2, 2, 24, 64), np.uint8))
