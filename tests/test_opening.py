"""Opening tables: what is sound opens anywhere and often, all else gets one clear line."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_tables import LAYERS, TOKEN_MAP, build, data_file, everything, expected, read

from engram.errors import CorruptTableError, StoreError
from engram.rows import RowFormat
from engram.store import datafile
from engram.store.layout import PAGE_BYTES
from engram.store.manifest import MANIFEST_FILE, read_manifest, write_manifest
from engram.store.reader import StoreReader


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("store") / "table")


def test_token_map_and_manifest(table):
    reader = StoreReader(table, guard=False)
    assert np.array_equal(reader.token_map, TOKEN_MAP)
    assert reader.manifest.layers == LAYERS
    assert reader.layers == (1, 4)


def test_a_table_without_token_map_and_scales(tmp_path):
    path = build(tmp_path / "t", RowFormat("bf16", 5), ((0, 90),), token_map=None)
    opened = StoreReader(path, guard=True)
    assert opened.token_map is None
    layers, row_ids = everything(opened)
    assert np.array_equal(read(opened, layers, row_ids), expected(opened, layers, row_ids))


def test_a_token_map_too_short_for_pages_of_its_own(tmp_path):
    path = build(tmp_path / "t", layers=((0, 70),), token_map=np.arange(20, dtype=np.int32))
    assert read_manifest(path)[1].token_map_page is None
    assert np.array_equal(StoreReader(path, guard=False).token_map, np.arange(20))


def test_two_readers_of_one_path(table):
    one, two = StoreReader(table, guard=True), StoreReader(table, guard=False)
    layers, row_ids = everything(one)
    wanted = expected(one, layers, row_ids)
    assert np.array_equal(read(one, layers, row_ids), wanted)
    one.close()
    assert np.array_equal(read(two, layers, row_ids), wanted)


def test_threads_open_one_table_at_once(table):
    def work(number: int) -> bool:
        opened = StoreReader(table, guard=bool(number % 2))
        layers, row_ids = everything(opened)
        return np.array_equal(
            read(opened, layers, row_ids), expected(opened, layers, row_ids)
        ) and np.array_equal(opened.token_map, TOKEN_MAP)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


def test_a_closed_reader_says_so_and_leaves_nothing(table):
    before = sorted(os.listdir("/proc/self/fd"))
    opened = StoreReader(table, guard=True)
    layers, row_ids = everything(opened)
    read(opened, layers, row_ids)
    opened.close()
    opened.close()
    with pytest.raises(StoreError, match="closed"):
        read(opened, layers, row_ids)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert str(data_file(table)) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / MANIFEST_FILE).unlink(), "is not a table"),
        (lambda path: data_file(path).unlink(), "is missing"),
        (lambda path: data_file(path).rename(path / "x"), "is missing"),
        (lambda path: os.truncate(data_file(path), 8192), "bytes"),
        (lambda path: os.truncate(path / MANIFEST_FILE, 100), "is damaged"),
    ],
)
def test_a_spoiled_table_is_refused_in_one_line(tmp_path, spoil, message):
    path = build(tmp_path / "t")
    spoil(path)
    for guarded in (False, True):
        with pytest.raises(StoreError, match=message) as caught:
            StoreReader(path, guard=guarded)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_data_file_that_is_none_is_refused(tmp_path):
    path = build(tmp_path / "t")
    target = data_file(path).rename(tmp_path / "elsewhere")
    data_file(path).symlink_to(target)
    with pytest.raises(StoreError, match="symbolic link"):
        StoreReader(path, guard=False)
    data_file(path).unlink()
    os.mkfifo(data_file(path))
    with pytest.raises(StoreError, match="not a regular file"):
        StoreReader(path, guard=False)
    data_file(path).unlink()
    data_file(path).mkdir()
    with pytest.raises(StoreError, match="not a regular file"):
        StoreReader(path, guard=False)


def test_a_table_behind_a_link_opens(table, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(table)
    opened = StoreReader(link, guard=False)
    layers, row_ids = everything(opened)
    assert np.array_equal(read(opened, layers, row_ids), expected(opened, layers, row_ids))


def test_a_file_without_permission_is_refused(table, monkeypatch):
    plain = os.open

    def refuse(path, flags):
        if path.name == "table.json":
            return plain(path, flags)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datafile.os, "open", refuse)
    with pytest.raises(StoreError, match="give it read permission"):
        StoreReader(table, guard=False)


def test_a_file_that_changes_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = build(tmp_path / "t")
    unchanged = datafile.read_embedded

    def meddle(*arguments):
        os.utime(data_file(path))
        return unchanged(*arguments)

    monkeypatch.setattr(datafile, "read_embedded", meddle)
    with pytest.raises(StoreError, match="changed while it was being opened"):
        StoreReader(path, guard=False)


def test_table_json_that_contradicts_itself_is_refused(tmp_path):
    path = build(tmp_path / "t")
    manifest, physical = read_manifest(path)
    pages = physical.extent_pages
    for wrong in (
        {"extent_pages": (pages[1], *pages[1:])},
        {"extent_pages": pages[:-1]},
        {"extent_pages": (10**9, *pages[1:])},
        {"extent_pages": (pages[1], pages[0], *pages[2:])},
        {"tree_digest": "0" * 32},
        {"token_map_page": physical.token_map_page + 1},
    ):
        write_manifest(path, manifest, type(physical)(**{**vars(physical), **wrong}))
        with pytest.raises(CorruptTableError):
            StoreReader(path, guard=False)


def test_a_manifest_that_is_not_the_data_files_is_refused(tmp_path):
    path = build(tmp_path / "t")
    manifest, physical = read_manifest(path)
    for wrong, message in (
        ({"source": {"kind": "elsewhere"}}, "manifest in the data file differs"),
        ({"token_map_digest": "0" * 32}, "token map is damaged"),
        ({"token_map_digest": None}, "token map is damaged"),
    ):
        write_manifest(path, replace(manifest, **wrong), physical)
        with pytest.raises(CorruptTableError, match=message):
            StoreReader(path, guard=False)


def test_opening_reads_no_rows(tmp_path, monkeypatch):
    path = build(tmp_path / "t", layers=((0, 60_000),), extent_blocks=256)
    read_bytes = 0
    plain = os.pread

    def count(descriptor, size, offset):
        nonlocal read_bytes
        read_bytes += size
        return plain(descriptor, size, offset)

    monkeypatch.setattr(datafile.os, "pread", count)
    StoreReader(path, guard=False).close()
    assert read_bytes < data_file(path).stat().st_size / 10


def test_extents_side_by_side_up_to_the_files_end(table):
    manifest, physical = read_manifest(table)
    sizes = [manifest.layout.blocks(extent.rows) for extent in manifest.extents]
    pages = tuple(2 + sum(sizes[:number]) for number in range(len(sizes)))
    end = pages[-1] + sizes[-1]
    tight = replace(physical, extent_pages=pages, file_bytes=end * PAGE_BYTES)
    assert datafile.spans(manifest, tight) == list(zip(pages, sizes, strict=True))
    for wrong in (
        {"file_bytes": (end - 1) * PAGE_BYTES},
        {"extent_pages": (1, *pages[1:])},
        {"extent_pages": (pages[0] + 1, *pages[1:])},
        {"extent_pages": (*pages[:-1], pages[-1] - 1)},
    ):
        with pytest.raises(CorruptTableError, match="overlap or leave the file"):
            datafile.spans(manifest, replace(tight, **wrong))


def test_extents_that_are_not_the_layers_rows(table):
    manifest, physical = read_manifest(table)
    first, second, *others = manifest.extents
    (layer, rows), *more = manifest.layers
    for wrong in (
        {"layers": ((layer, rows - 1), *more)},
        {"layers": ((layer + 1, rows), *more)},
        {"extents": (replace(first, rows=first.rows - 1), second, *others)},
        {"extents": (second, first, *others)},
    ):
        with pytest.raises(CorruptTableError, match="do not add up"):
            datafile.spans(replace(manifest, **wrong), physical)


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_file_with_fewer_pages_than_lmdb_uses(tmp_path, beyond):
    path = build(tmp_path / "t")
    manifest, physical = read_manifest(path)
    with data_file(path).open("r+b") as file:
        for meta in range(2):
            file.seek(meta * PAGE_BYTES + 136)
            file.write((physical.file_bytes // PAGE_BYTES - 1 + beyond).to_bytes(8, "little"))
        file.flush()
        found = datafile.tree_digest(
            file.fileno(), physical.file_bytes, datafile.spans(manifest, physical)
        )
    write_manifest(path, manifest, replace(physical, tree_digest=found))
    if beyond:
        with pytest.raises(CorruptTableError, match=r"LMDB uses \d+ pages, the data file has \d+"):
            StoreReader(path, guard=False)
    else:
        StoreReader(path, guard=False).close()
