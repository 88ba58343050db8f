"""Gathering rows: exact from any thread and either way, refused before anything is written."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_tables import ROW_FORMAT, build, data_file, everything, expected, read

from engram.errors import RowIntegrityError, SelectionError, StoreError
from engram.rows import RowFormat, Rows
from engram.store import gather, guard
from engram.store.geometry import BAD_CHECK, REFUSED, Geometry, gather_twin
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES, BlockLayout
from engram.store.manifest import read_manifest
from engram.store.pack import pack_rows_twin
from engram.store.reader import StoreReader

NO_SCALES = np.empty((0, 0), np.uint8)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("store") / "table")


@pytest.fixture(params=[False, True], ids=["pread", "map"])
def reader(request, table):
    opened = StoreReader(table, guard=request.param)
    yield opened
    opened.close()


def drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_all_rows_are_exact(reader):
    layers, row_ids = everything(reader)
    wanted = expected(reader, layers, row_ids)
    for _ in range(3):
        assert np.array_equal(read(reader, layers, row_ids), wanted)


def test_the_map_is_used_once_rows_are_in_the_page_cache(table):
    with_map = StoreReader(table, guard=True)
    layers, row_ids = everything(with_map)
    read(with_map, layers, row_ids)
    assert with_map._calm >= gather.CALM_ROWS


def test_cold_rows_are_exact(reader):
    layers, row_ids = everything(reader)
    order = np.random.default_rng(1).permutation(len(row_ids))
    layers, row_ids = layers[order], row_ids[order]
    for count in (1, 48, len(row_ids)):
        drop_cache(data_file(reader.path))
        found = read(reader, layers[:count], row_ids[:count])
        assert np.array_equal(found, expected(reader, layers[:count], row_ids[:count]))


def test_rows_go_to_their_places_and_no_others_are_touched(reader):
    rng = np.random.default_rng(2)
    row_ids = rng.integers(0, 777, 300)
    layers = rng.integers(0, 2, 300).astype(np.int32)
    places = rng.permutation(500)[:300]
    out = Rows.empty((500,), ROW_FORMAT)
    out.values[:], out.scales[:] = 7, 9
    reader.gather(layers, row_ids, places, out)
    assert np.array_equal(out.packed()[places], expected(reader, layers, row_ids))
    untouched = np.setdiff1d(np.arange(500), places)
    assert (out.values[untouched] == 7).all()
    assert (out.scales[untouched] == 9).all()


def test_no_rows_at_all(reader):
    assert read(reader, np.empty(0, np.int32), np.empty(0, np.int64)).shape == (0, 66)


@pytest.mark.parametrize(
    ("layer", "row", "place"),
    [(2, 0, 0), (-1, 0, 0), (0, 1000, 0), (1, 777, 0), (0, -1, 0), (0, 0, 5), (0, 0, -1)],
)
def test_what_does_not_exist_is_refused_before_anything(reader, layer, row, place):
    out = Rows.empty((5,), ROW_FORMAT)
    out.values[:] = 7
    layers = np.array([0, layer], np.int32)
    row_ids, places = np.array([3, row]), np.array([0, place])
    with pytest.raises(SelectionError, match="request 1"):
        reader.gather(layers, row_ids, places, out)
    assert (out.values == 7).all()
    if 0 <= place < 5:
        with pytest.raises(SelectionError, match="request 1"):
            reader.touch(layers, row_ids)


def test_arrays_that_do_not_fit_are_refused(reader):
    good = (np.zeros(4, np.int32), np.arange(4), np.arange(4))
    out = Rows.empty((4,), ROW_FORMAT)
    for position, wrong in enumerate(
        [np.zeros(4, np.int64), np.zeros(4, np.int32), np.zeros(8, np.int64)[::2]]
    ):
        arrays = list(good)
        arrays[position] = wrong
        with pytest.raises(SelectionError):
            reader.gather(*arrays, out)
    with pytest.raises(SelectionError):
        reader.gather(*(array[:3] if i else array for i, array in enumerate(good)), out)
    with pytest.raises(SelectionError, match="scales"):
        reader.gather(*good, Rows(out.values, None))
    with pytest.raises(SelectionError, match="values"):
        reader.gather(*good, Rows(out.values[:, :-1].copy(), out.scales))


def test_threads_at_once_and_a_close_in_the_middle(table):
    opened = StoreReader(table, guard=True)
    layers, row_ids = everything(opened)
    wanted = expected(opened, layers, row_ids)
    started = threading.Barrier(9)

    def work(seed: int) -> int:
        order = np.random.default_rng(seed).permutation(len(row_ids))
        started.wait()
        for turn in range(50):
            try:
                found = read(opened, layers[order], row_ids[order])
            except StoreError:
                return turn
            assert np.array_equal(found, wanted[order])
        return 50

    with ThreadPoolExecutor(8) as pool:
        turns = [pool.submit(work, seed) for seed in range(8)]
        started.wait()
        opened.close()
        assert all(turn.result() <= 50 for turn in turns)


def test_eight_threads_are_exact(reader):
    layers, row_ids = everything(reader)
    wanted = expected(reader, layers, row_ids)

    def work(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        results = []
        for _ in range(20):
            chosen = rng.integers(0, len(row_ids), 400)
            if seed == 0:
                drop_cache(data_file(reader.path))
            results.append(
                np.array_equal(read(reader, layers[chosen], row_ids[chosen]), wanted[chosen])
            )
        return all(results)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_forked_child_reads_the_same(reader):
    layers, row_ids = everything(reader)
    wanted = expected(reader, layers, row_ids)
    read(reader, layers, row_ids)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(read(reader, layers, row_ids), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(read(reader, layers, row_ids), wanted)


def test_touch_brings_blocks_into_the_page_cache(reader):
    layers, row_ids = everything(reader)
    descriptor = os.open(data_file(reader.path), os.O_RDONLY)
    drop_cache(data_file(reader.path))
    reader.touch(layers, row_ids)
    pages = read_manifest(reader.path)[1].extent_pages
    for page in pages:
        # Waits for the read that was started, however long it takes.
        os.pread(descriptor, 1, page * PAGE_BYTES)
        assert os.preadv(descriptor, [bytearray(1)], page * PAGE_BYTES, os.RWF_NOWAIT) == 1
    os.close(descriptor)


@st.composite
def layouts(draw):
    """A row format, rows of up to three layers, and which rows to ask for."""
    row_format = draw(
        st.sampled_from(
            [
                RowFormat("fp8-ue8m0", 32),
                RowFormat("bf16", 1),
                RowFormat("fp32", 1019),
                RowFormat("nvfp4", 16, 0.5),
                RowFormat("nf4", 6),
                RowFormat("fp8", 37, 2.0),
            ]
        )
    )
    blocks = draw(st.integers(1, 5))
    per_block = BlockLayout(row_format.row_bytes).rows_per_block
    most = min(per_block * blocks * 3, 3000)
    rows = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    return row_format, blocks, rows, draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_kernel_and_twin_agree(tmp_path_factory, layout):
    row_format, extent_blocks, rows_of_layers, seed, flips = layout
    rng = np.random.default_rng(seed)
    blocks = BlockLayout(row_format.row_bytes, extent_blocks)
    layers, values = [], []
    for position, rows in enumerate(rows_of_layers):
        model_layer = 3 * position + int(rng.integers(3))
        layers.append((model_layer, rows, len(values)))
        for first in range(0, rows, blocks.rows_per_extent):
            count = min(blocks.rows_per_extent, rows - first)
            data = rng.integers(0, 256, (count, row_format.row_bytes), dtype=np.uint8)
            values.append(pack_rows_twin(data, blocks, seed, model_layer, first))
    pages, file = np.zeros(len(values), np.int64), [np.zeros(PAGE_BYTES, np.uint8)]
    for extent in rng.permutation(len(values)):
        pages[extent] = sum(map(len, file)) // PAGE_BYTES
        file += [np.zeros(PAGE_HEADER_BYTES, np.uint8), values[extent]]
    whole = np.concatenate(file)
    for byte in rng.integers(PAGE_BYTES, len(whole), flips):
        whole[byte] ^= 1 << rng.integers(8)
    refused = (rng.random(len(values)) < 0.1).astype(np.uint8)
    geometry = Geometry(
        row_format.value_bytes,
        row_format.row_bytes,
        blocks.rows_per_block,
        extent_blocks,
        seed,
        np.array(layers, np.int64),
        pages,
        refused,
    )
    count = 200
    asked = rng.integers(0, len(layers), count).astype(np.int32)
    row_ids = (rng.random(count) * np.array(rows_of_layers)[asked]).astype(np.int64)
    places = rng.permutation(count)

    def room() -> Rows:
        out = Rows.empty((count,), row_format)
        out.values[:] = 0
        if out.scales is not None:
            out.scales[:] = 0
        return out

    wanted = room()
    fates = gather_twin(geometry, whole, asked, row_ids, places, wanted)
    assert set(fates) <= {0, BAD_CHECK, REFUSED}
    path = tmp_path_factory.mktemp("file") / "data"
    whole.tofile(path)
    descriptor = os.open(path, os.O_RDONLY)
    for base in (0, whole.ctypes.data):
        for calm in (0, gather.CALM_ROWS):
            out, found = room(), np.empty(count, np.uint8)
            scales = NO_SCALES if out.scales is None else out.scales
            result = gather.gather(
                geometry.packed,
                descriptor,
                base,
                guard.ensure(),
                calm,
                asked,
                row_ids,
                places,
                out.values,
                scales,
                found,
            )
            assert result >= 0
            assert np.array_equal(found, fates)
            assert np.array_equal(out.packed(), wanted.packed())
    os.close(descriptor)


def test_failed_rows_are_named_and_the_others_are_valid(tmp_path):
    path = build(tmp_path / "t")
    pages = read_manifest(path)[1].extent_pages
    for guarded in (False, True):
        opened = StoreReader(path, guard=guarded)
        layers, row_ids = everything(opened)
        wanted = expected(opened, layers, row_ids)
        with data_file(path).open("r+b") as file:
            file.seek(pages[0] * PAGE_BYTES + PAGE_HEADER_BYTES + 3 * 66)
            file.write(bytes(66))
        out = Rows.empty((len(row_ids),), ROW_FORMAT)
        with pytest.raises(RowIntegrityError, match="layer 1 rows 3: damaged bytes") as caught:
            opened.gather(layers, row_ids, np.arange(len(row_ids)), out)
        assert caught.value.failures == {1: (3,)}
        whole = np.arange(len(row_ids)) != 3
        assert np.array_equal(out.packed()[whole], wanted[whole])


def test_a_file_cut_short_under_plain_reads(tmp_path):
    path = build(tmp_path / "t")
    opened = StoreReader(path, guard=False)
    layers, row_ids = everything(opened)
    wanted = expected(opened, layers, row_ids)
    last = opened.manifest.extents[-1]
    os.truncate(data_file(path), read_manifest(path)[1].extent_pages[-1] * PAGE_BYTES)
    out = Rows.empty((len(row_ids),), ROW_FORMAT)
    with pytest.raises(RowIntegrityError, match="too short") as caught:
        opened.gather(layers, row_ids, np.arange(len(row_ids)), out)
    assert set(caught.value.failures) == {4}
    assert caught.value.row_ids[0] == last.first_row
    whole = (layers == 0) | (row_ids < last.first_row)
    assert np.array_equal(out.packed()[whole], wanted[whole])


def test_a_device_that_fails_is_named(tmp_path):
    path = build(tmp_path / "t")
    opened = StoreReader(path, guard=False)
    # Reading a directory fails with an error, as reading a broken device does.
    directory = os.open(tmp_path, os.O_RDONLY)
    os.dup2(directory, opened._file.descriptor)
    os.close(directory)
    with pytest.raises(RowIntegrityError, match="I/O error"):
        read(opened, *everything(opened))
