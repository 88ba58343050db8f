"""The SIGBUS guard: holes cost their rows, everything else dies as it always did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_tables import LAYERS, build, data_file, everything, expected, read

from engram.errors import StoreError
from engram.store import guard
from engram.store.layout import PAGE_BYTES
from engram.store.manifest import read_manifest
from engram.store.reader import StoreReader

TESTS = Path(__file__).parent

PREAMBLE = """
import faulthandler, json, mmap, os, signal, sys, threading
import numpy as np
from store_tables import data_file, everything, expected, read
from engram.errors import RowIntegrityError
from engram.rows import Rows
from engram.store import guard
from engram.store.reader import StoreReader

path = sys.argv[1]
reader = StoreReader(path, guard=True)
layers, row_ids = everything(reader)
wanted = expected(reader, layers, row_ids)
assert np.array_equal(read(reader, layers, row_ids), wanted)


def failed_rows():
    out = Rows.empty((len(row_ids),), reader.manifest.row_format)
    out.values[:] = 0
    try:
        reader.gather(layers, row_ids, np.arange(len(row_ids)), out)
    except RowIntegrityError as error:
        wrong = np.flatnonzero((out.packed() != wanted).any(axis=1))
        named = {(error_layer, row) for error_layer, rows in error.failures.items() for row in rows}
        assert named == {(reader.layers[layers[i]], int(row_ids[i])) for i in wrong}
        return wrong.tolist()
    assert np.array_equal(out.packed(), wanted)
    return []


def foreign_hole():
    with open(path + "/foreign", "w+b") as file:
        file.write(bytes(8192))
        file.flush()
        view = mmap.mmap(file.fileno(), 8192, mmap.MAP_SHARED, mmap.PROT_READ)
        file.truncate(0)
        return view
"""


@pytest.fixture
def table(tmp_path) -> Path:
    return build(tmp_path / "t")


def run(table: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, str(table)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
        check=False,
    )


def answer(table: Path, script: str):
    done = run(table, script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cut_in(table: Path, extent: int, block: int) -> int:
    """Byte where the file ends if it is cut before this block."""
    return (read_manifest(table)[1].extent_pages[extent] + block) * PAGE_BYTES


def rows_from(table: Path, extent: int, block: int) -> tuple[int, int]:
    """(index among all rows of the block's first row, index of its extent's first row)."""
    manifest = read_manifest(table)[0]
    first = manifest.extents[extent]
    before = 0 if first.layer == LAYERS[0][0] else LAYERS[0][1]
    begin = before + first.first_row
    return begin + block * manifest.layout.rows_per_block, begin


def test_a_file_cut_under_a_map_costs_its_rows_and_then_their_extent(table):
    last = len(read_manifest(table)[0].extents) - 1
    cut = cut_in(table, last - 1, 2)
    found = answer(
        table,
        f"""
os.truncate(data_file(reader.path), {cut})
print(json.dumps([failed_rows(), failed_rows(), reader._file.map.holes > 0]))
""",
    )
    from_block, from_extent = rows_from(table, last - 1, 2)
    everything_after = sum(rows for _, rows in LAYERS)
    assert found == [
        list(range(from_block, everything_after)),
        list(range(from_extent, everything_after)),
        True,
    ]
    with pytest.raises(StoreError):
        StoreReader(table, guard=True)


def test_many_threads_meet_holes_at_once(table):
    found = answer(
        table,
        f"""
os.truncate(data_file(reader.path), {cut_in(table, 1, 0)})
busy = [threading.Thread(target=lambda: [np.ones((300, 300)) @ np.ones((300, 300))] * 50)]
results = []
threads = [threading.Thread(target=lambda: results.append(failed_rows())) for _ in range(8)]
for thread in threads + busy:
    thread.start()
for thread in threads + busy:
    thread.join()
print(json.dumps([len(results), all(r == results[0] for r in results), results[0][0]]))
""",
    )
    assert found == [8, True, rows_from(table, 1, 0)[0]]


@pytest.mark.parametrize("harm", ["foreign_hole()[4096]", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_other_bus_errors_still_kill(table, harm):
    done = run(table, harm)
    assert done.returncode == -signal.SIGBUS


def test_other_bus_errors_go_to_the_handler_before(table):
    done = run(table, "faulthandler.enable(); guard.ensure(); foreign_hole()[4096]")
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr


def test_a_handler_that_replaced_the_guard_is_noticed(table):
    found = answer(
        table,
        f"""
faulthandler.enable()
before = guard.installed()
os.truncate(data_file(reader.path), {cut_in(table, 1, 0)})
first = failed_rows()[0]
print(json.dumps([before, guard.installed(), first]))
""",
    )
    assert found == [False, True, rows_from(table, 1, 0)[0]]


def test_where_the_guard_cannot_stay_rows_are_read_without_the_map(table):
    found = answer(
        table,
        f"""
faulthandler.enable()
address = guard.ensure()
faulthandler.disable(); faulthandler.enable()
guard.ensure = lambda: address
os.truncate(data_file(reader.path), {cut_in(table, 1, 0)})
print(json.dumps([guard.installed(), failed_rows()[0], reader._file.map.holes]))
""",
    )
    assert found == [False, rows_from(table, 1, 0)[0], 0]


def test_maps_are_counted_and_given_back():
    free = int(np.count_nonzero(guard._entries[:, 1] == 0))
    taken = [guard.register((number + 1) * PAGE_BYTES, PAGE_BYTES) for number in range(free)]
    with pytest.raises(StoreError, match="close some"):
        guard.register(PAGE_BYTES, PAGE_BYTES)
    for each in taken:
        guard.unregister(each)
    again = guard.register(PAGE_BYTES, PAGE_BYTES)
    assert again.holes == 0
    assert not again.hole_offsets().size
    guard.unregister(again)


def test_closing_gives_the_map_back(table):
    free = np.count_nonzero(guard._entries[:, 1] == 0)
    for _ in range(3):
        opened = StoreReader(table, guard=True)
        layers, row_ids = everything(opened)
        assert np.array_equal(read(opened, layers, row_ids), expected(opened, layers, row_ids))
        opened.close()
        assert np.count_nonzero(guard._entries[:, 1] == 0) == free
    assert data_file(table).exists()
