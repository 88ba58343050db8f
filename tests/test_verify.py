"""The scrub lists exactly what is damaged, whatever state the table is in."""

from __future__ import annotations

import errno
import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
from store_tables import LAYERS, TOKEN_MAP, build, data_file, flip

from engram.errors import StoreError
from engram.store import scrub, verify
from engram.store.checks import row_check_twin
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES
from engram.store.manifest import MANIFEST_FILE, read_manifest
from engram.store.verify import verify_table

ROW_BYTES = 66


@pytest.fixture
def table(tmp_path) -> Path:
    return build(tmp_path / "t")


def page(table: Path, extent: int, block: int = 0) -> int:
    """Byte where a block's page begins."""
    return (read_manifest(table)[1].extent_pages[extent] + block) * PAGE_BYTES


def places(table: Path) -> list[tuple]:
    """(kind, layer, extent, block, rows) of everything that is damaged."""
    report = verify_table(table)
    assert report.sound == (not report.damage)
    return [(each.kind, each.layer, each.extent, each.block, each.rows) for each in report.damage]


def test_a_sound_table(table):
    steps = []
    report = verify_table(table, progress=lambda done, total: steps.append((done, total)))
    manifest = read_manifest(table)[0]
    assert report.sound
    assert report.rows == sum(rows for _, rows in LAYERS)
    assert report.blocks == sum(manifest.layout.blocks(each.rows) for each in manifest.extents)
    assert report.fingerprint == manifest.fingerprint
    assert steps[-1] == (report.bytes, report.bytes)
    assert steps == sorted(steps)
    assert json.loads(json.dumps(report.to_dict()))["sound"] is True
    assert "every byte is as it was written" in report.lines()[-1]


def test_a_damaged_row_and_a_damaged_check(table):
    per_block = read_manifest(table)[0].layout.rows_per_block
    flip(data_file(table), page(table, 1, 2) + PAGE_HEADER_BYTES + 3 * ROW_BYTES + 65, 7)
    flip(data_file(table), page(table, 1, 3) + PAGE_HEADER_BYTES + per_block * ROW_BYTES + 4)
    first = 4 * per_block
    assert places(table) == [
        ("row check", 1, 1, 2, (first + 2 * per_block + 3,)),
        ("row check", 1, 1, 3, (first + 3 * per_block + 1,)),
    ]
    report = verify_table(table, threads=1)
    damage = report.damage[0]
    assert damage.page == read_manifest(table)[1].extent_pages[1] + 2
    assert (damage.first_row, damage.last_row) == (first + 2 * per_block, first + 3 * per_block - 1)
    assert f"block 2, page {damage.page}" in report.lines()[0]
    assert "damaged places: 2;" in report.lines()[-1]


def test_slack_behind_the_checks_and_between_blocks(table):
    flip(data_file(table), page(table, 0, 2) - 1)
    flip(data_file(table), page(table, 0, 3) + 15)
    extents = read_manifest(table)[0].extents
    last = len(extents) - 1
    rows = extents[last].rows % read_manifest(table)[0].layout.rows_per_block
    block = read_manifest(table)[0].layout.blocks(extents[last].rows) - 1
    flip(data_file(table), page(table, last, block) + PAGE_HEADER_BYTES + rows * (ROW_BYTES + 4))
    assert places(table) == [
        ("slack", 1, 0, 1, ()),
        ("slack", 1, 0, 3, ()),
        ("slack", 4, last, block, ()),
    ]


def test_every_byte_of_an_extents_header(table):
    for byte in range(PAGE_HEADER_BYTES):
        flip(data_file(table), page(table, 2) + byte, byte % 8)
        found = places(table)
        assert ("header", 1, 2, 0, ()) in found
        assert {kind for kind, *_ in found} <= {"header", "structure"}
        flip(data_file(table), page(table, 2) + byte, byte % 8)


def test_pages_of_lmdb_token_map_and_manifest(table):
    token_map_page = read_manifest(table)[1].token_map_page
    for byte, kind in (
        (24, "structure"),
        (token_map_page * PAGE_BYTES + PAGE_HEADER_BYTES + 5, "token map"),
        (token_map_page * PAGE_BYTES + 3, "structure"),
        (token_map_page * PAGE_BYTES + PAGE_HEADER_BYTES + TOKEN_MAP.nbytes, "structure"),
    ):
        flip(data_file(table), byte)
        assert places(table) == [(kind, None, None, None, ())]
        flip(data_file(table), byte)
    flip(table / MANIFEST_FILE, 300)
    assert places(table) == [("manifest", None, None, None, ())]
    assert verify_table(table).lines()[0].startswith("manifest: ")


def test_blocks_swapped_within_and_between_layers(table):
    path = data_file(table)
    last = len(read_manifest(table)[0].extents) - 2
    for (extent, block), (other_extent, other_block) in (
        ((0, 1), (0, 2)),
        ((1, 1), (last, 1)),
    ):
        one, two = page(table, extent, block), page(table, other_extent, other_block)
        data = bytearray(path.read_bytes())
        before = bytes(data)
        data[one : one + PAGE_BYTES], data[two : two + PAGE_BYTES] = (
            data[two : two + PAGE_BYTES],
            data[one : one + PAGE_BYTES],
        )
        path.write_bytes(data)
        found = places(table)
        assert [each[:1] + each[2:4] for each in found] == [
            ("row check", extent, block),
            ("row check", other_extent, other_block),
        ]
        per_block = read_manifest(table)[0].layout.rows_per_block
        assert all(len(rows) == per_block for *_, rows in found)
        path.write_bytes(before)
    assert verify_table(table).sound


def test_a_row_replaced_together_with_its_check(table):
    manifest = read_manifest(table)[0]
    row = bytes(range(ROW_BYTES))
    check = row_check_twin(row, manifest.table_seed, 1, 0).to_bytes(4, "little")
    start = page(table, 0) + PAGE_HEADER_BYTES
    with data_file(table).open("r+b") as file:
        file.seek(start)
        file.write(row)
        file.seek(start + manifest.layout.rows_per_block * ROW_BYTES)
        file.write(check)
    assert places(table) == [("extent digest", 1, 0, None, ())]


def test_a_file_that_is_too_short(table):
    last = len(read_manifest(table)[0].extents) - 1
    blocks = read_manifest(table)[0].layout.blocks(read_manifest(table)[0].extents[last].rows)
    os.truncate(data_file(table), page(table, last) + 100)
    found = places(table)
    assert {kind for kind, *_ in found if kind not in ("token map", "structure")} == {"missing"}
    assert [block for kind, *_, block, _ in found if kind == "missing"] == list(range(blocks))


def test_blocks_that_the_device_cannot_read(table, monkeypatch):
    broken = page(table, 1, 1)

    def fails(start: int, count: int) -> bool:
        return start <= broken < start + count

    def preadv(descriptor, buffers, offset, flags=0, plain=os.preadv):
        if fails(offset, sum(len(buffer) for buffer in buffers)):
            raise OSError(errno.EIO, "Input/output error")
        return plain(descriptor, buffers, offset, flags)

    def pread(descriptor, count, offset, plain=os.pread):
        if fails(offset, count):
            raise OSError(errno.EIO, "Input/output error")
        return plain(descriptor, count, offset)

    monkeypatch.setattr(scrub.os, "preadv", preadv)
    monkeypatch.setattr(scrub.os, "pread", pread)
    (found,) = places(table)
    assert found[:4] == ("io", 1, 1, 1)
    assert len(found[4]) == read_manifest(table)[0].layout.rows_per_block


def test_file_systems_without_reads_that_do_not_wait(table, monkeypatch):
    def preadv(descriptor, buffers, offset, flags=0, plain=os.preadv):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(scrub.os, "preadv", preadv)
    flip(data_file(table), page(table, 0) + 20)
    assert places(table) == [("row check", 1, 0, 0, (0,))]


def test_a_missing_data_file_and_no_table_at_all(table):
    data_file(table).unlink()
    assert [kind for kind, *_ in places(table)] == ["file"]
    with pytest.raises(StoreError, match="is not a table"):
        verify_table(table.parent)


def test_the_list_is_bounded_but_everything_is_counted(table, monkeypatch):
    monkeypatch.setattr(verify, "DAMAGE_MAX", 3)
    data = np.fromfile(data_file(table), np.uint8)
    for block in range(4):
        data[page(table, 0, block) + 30] ^= 1
        data[page(table, 1, block) + 30] ^= 1
    data.tofile(data_file(table))
    report = verify_table(table)
    assert (len(report.damage), report.damaged_places) == (3, 8)
    assert "and 5 more" in report.lines()


def test_no_more_is_held_than_listed_and_a_few_extents(tmp_path, monkeypatch):
    table = build(tmp_path / "t", extent_blocks=1)
    extents = len(read_manifest(table)[0].extents)
    for extent in range(extents):
        flip(data_file(table), page(table, extent) + 30)
    monkeypatch.setattr(verify, "DAMAGE_MAX", 3)
    held: weakref.WeakSet[scrub.Damage] = weakref.WeakSet()
    real = scrub.ExtentScrub.run

    def run(self, *arguments):
        found = real(self, *arguments)
        held.update(found)
        return found

    monkeypatch.setattr(scrub.ExtentScrub, "run", run)
    most = []
    report = verify_table(table, threads=2, progress=lambda *_: most.append(len(held)))
    assert report.damaged_places == extents == len(most)
    assert [damage.extent for damage in report.damage] == [0, 1, 2]
    assert extents > 20
    assert max(most) <= 3 + 2 * 2 + 2
