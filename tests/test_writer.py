"""The writer: layout on disk, sameness of fingerprints, nothing left behind after errors."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from array_source import BF16, SCHEMA, ArraySource, array_source
from python_process import run_python
from table_files import rows_of

from engram.errors import CheckpointError, CorruptTableError, SpecError, StoreError
from engram.rows import RowFormat
from engram.store import destination as place
from engram.store import readback, writer
from engram.store.checks import digest
from engram.store.layout import BlockLayout
from engram.store.manifest import TOKEN_MAP_KEY, Schema, read_manifest
from engram.store.pack import pack_rows_twin
from engram.store.readback import Readback
from engram.store.tree import placed_values, read_meta
from engram.store.writer import build_table


@pytest.mark.parametrize("row_bytes", [0, 4077])
def test_rows_that_no_block_holds(tmp_path, row_bytes):
    schema = Schema("{}", RowFormat("fp8", 4077, 1.0), ((0, 1),))
    with pytest.raises(StoreError, match="4077 bytes cannot be stored"):
        build_table(tmp_path / "table", schema, ArraySource({}))
    with pytest.raises(StoreError):
        BlockLayout(row_bytes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extent_blocks", [1, 16, 7168])
def test_what_is_on_disk(tmp_path, extent_blocks):
    path = tmp_path / "table"
    source = array_source()
    manifest = build_table(path, SCHEMA, source, extent_blocks=extent_blocks)
    assert {entry.name for entry in path.iterdir()} == {"data.mdb", "table.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]
    for name, mode in (("data.mdb", 0o600), ("table.json", 0o600), (".", 0o700)):
        assert stat.S_IMODE((path / name).stat().st_mode) == mode
    found, physical = read_manifest(path)
    assert found == manifest
    for layer, rows in rows_of(path).items():
        np.testing.assert_array_equal(rows, source.rows[layer])
    layout = manifest.layout
    assert [(e.layer, e.first_row, e.rows) for e in manifest.extents] == [
        (layer, first, min(layout.rows_per_extent, rows - first))
        for layer, rows in SCHEMA.layers
        for first in range(0, rows, layout.rows_per_extent)
    ]
    data = np.fromfile(path / "data.mdb", np.uint8)
    assert data.size == physical.file_bytes
    for extent, page in zip(manifest.extents, physical.extent_pages, strict=True):
        rows = source.rows[extent.layer][extent.first_row : extent.first_row + extent.rows]
        assert extent.digest == digest(rows)
        value = data[page * 4096 + 16 : page * 4096 + 16 + layout.value_bytes(extent.rows)]
        twin = pack_rows_twin(rows, layout, manifest.table_seed, extent.layer, extent.first_row)
        np.testing.assert_array_equal(value, twin)
    start = physical.token_map_page * 4096 + 16
    token_map = data[start : start + physical.token_map_bytes].view(np.int32)
    np.testing.assert_array_equal(token_map, SCHEMA.token_map)


def test_small_token_map_lies_within_lmdbs_own_pages(tmp_path):
    schema = Schema("{}", BF16, ((0, 10),), np.arange(20, dtype=np.int32))
    build_table(tmp_path / "table", schema, array_source(schema))
    _, physical = read_manifest(tmp_path / "table")
    assert physical.token_map_page is None
    assert physical.token_map_bytes == 80


def test_lmdb_itself_reads_the_same(tmp_path):
    import lmdb

    path = tmp_path / "table"
    build_table(path, SCHEMA, array_source(), extent_blocks=1)
    with (
        lmdb.open(str(path), readonly=True, lock=False, map_size=1 << 30) as environment,
        environment.begin() as transaction,
    ):
        expected = list(transaction.cursor())
    descriptor = os.open(path / "data.mdb", os.O_RDONLY)
    found = list(placed_values(descriptor, read_meta(descriptor)))
    assert [(value.key, value.length) for value in found] == [
        (key, len(value)) for key, value in expected
    ]
    for value, (_, content) in zip(found, expected, strict=True):
        if value.page is not None:
            assert os.pread(descriptor, value.length, value.page * 4096 + 16) == content
    os.close(descriptor)


def test_fingerprint_is_that_of_the_content(tmp_path):
    first = build_table(tmp_path / "1", SCHEMA, array_source(), extent_blocks=16)
    again = build_table(
        tmp_path / "2", SCHEMA, array_source(), extent_blocks=16, journal_bytes=1, table_seed=3
    )
    assert again.fingerprint == first.fingerprint
    other = array_source()
    other.rows[4][2998, 63] ^= 1
    changed = build_table(tmp_path / "3", SCHEMA, other, extent_blocks=16)
    assert changed.fingerprint != first.fingerprint


def test_progress_counts_row_bytes(tmp_path):
    seen = []
    build_table(
        tmp_path / "table",
        SCHEMA,
        array_source(),
        extent_blocks=16,
        progress=lambda *step: seen.append(step),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (5999 * 64, 5999 * 64)
    assert len(seen) == 8


REFUSED_LAYERS = [(), ((4, 10), (1, 10)), ((1, 10), (1, 10)), ((1, 0),)]


@pytest.mark.parametrize("layers", REFUSED_LAYERS)
def test_schemas_without_rows_or_order(tmp_path, layers):
    with pytest.raises(SpecError, match="ascending order"):
        build_table(tmp_path / "table", Schema("{}", BF16, layers), ArraySource({}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [CheckpointError("broken"), MemoryError("no memory")])
def test_source_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        build_table(tmp_path / "table", SCHEMA, array_source(error=error), extent_blocks=16)
    assert not list(tmp_path.iterdir())


def test_interrupt_keeps_what_was_done(tmp_path):
    seen = []

    def interrupt(done, total):
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    options = {"extent_blocks": 16, "journal_bytes": 1}
    with pytest.raises(KeyboardInterrupt):
        build_table(tmp_path / "table", SCHEMA, array_source(), progress=interrupt, **options)
    assert not (tmp_path / "table").exists()
    undisturbed = build_table(tmp_path / "other", SCHEMA, array_source(), **options)
    seen.clear()
    resumed = build_table(
        tmp_path / "table",
        SCHEMA,
        array_source(),
        progress=lambda done, total: seen.append(done),
        **options,
    )
    assert seen[0] > 0
    assert resumed == undisturbed


@pytest.mark.parametrize("part", ["row", "check", "slack"])
def test_damage_before_the_read_back_is_found(tmp_path, monkeypatch, part):
    """Bytes that change between writing and reading back end the import."""
    offset = {"row": 16 + 70, "check": 16 + 60 * 64 + 1, "slack": 16 + 60 * 68}[part]
    real = Readback.extent

    def flip_first(self, page, layer, first_row, rows):
        path = place.private_path(tmp_path / "table") / "data.mdb"
        with path.open("r+b") as stream:
            stream.seek(page * 4096 + offset)
            byte = stream.read(1)[0]
            stream.seek(page * 4096 + offset)
            stream.write(bytes([byte ^ 4]))
        return real(self, page, layer, first_row, rows)

    monkeypatch.setattr(Readback, "extent", flip_first)
    with pytest.raises(CorruptTableError, match=r"could not be read back .*layer 1 row \d"):
        build_table(tmp_path / "table", SCHEMA, array_source(), extent_blocks=16)
    assert not list(tmp_path.iterdir())


def test_reading_process_that_ended_while_it_waited(tmp_path):
    build_table(tmp_path / "1", SCHEMA, array_source())
    (_, waiting), *_ = readback._idle
    waiting.kill()
    waiting.wait()
    build_table(tmp_path / "2", SCHEMA, array_source())


def test_reading_process_that_is_killed_at_work(tmp_path, monkeypatch):
    real = Readback.extent

    def kill_first(self, *place):
        real(self, *place)
        self._process.kill()
        return real(self, *place)

    monkeypatch.setattr(Readback, "extent", kill_first)
    with pytest.raises(CorruptTableError, match="reads the table back has died"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["manifest", "token map"])
def test_what_opening_would_refuse_is_not_published(tmp_path, monkeypatch, part):
    """Both values lie in a leaf, so that no digest but the whole tree's covers them."""
    real = writer._Import._write_rest

    def spoil(self, environment, manifest):
        if part == "manifest":
            real(self, environment, replace(manifest, source={"kind": "another"}))
            return
        real(self, environment, manifest)
        with environment.begin(write=True) as transaction:
            transaction.put(TOKEN_MAP_KEY, np.arange(1, 21, dtype="<i4").tobytes())

    monkeypatch.setattr(writer._Import, "_write_rest", spoil)
    schema = Schema("{}", BF16, ((0, 10),), np.arange(20, dtype=np.int32))
    with pytest.raises(CorruptTableError, match=f"could not be read back .*{part}"):
        build_table(tmp_path / "table", schema, array_source(schema))
    assert not list(tmp_path.iterdir())


def interrupted(path):
    """Leave an import into `path` that stopped after five of eight extents."""
    seen = []

    def interrupt(done, total):
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_table(path, SCHEMA, array_source(), progress=interrupt, **RESUMABLE)
    return place.private_path(path)


RESUMABLE = {"extent_blocks": 16, "journal_bytes": 1}


@pytest.mark.parametrize("where", [12, 16, "root"])
def test_resume_over_garbage_starts_over(tmp_path, where):
    """The root page's end of offsets, its first offset, or its number lead out of the file."""
    data = interrupted(tmp_path / "table") / "data.mdb"
    descriptor = os.open(data, os.O_RDWR)
    root = read_meta(descriptor).root
    if where == "root":
        for meta in (0, 4096):
            os.pwrite(descriptor, (2**60).to_bytes(8, "little"), meta + 128)
    else:
        os.pwrite(descriptor, b"\xff\xff", root * 4096 + where)
    with pytest.raises(CorruptTableError):
        list(placed_values(descriptor, read_meta(descriptor)))
    os.close(descriptor)
    assert_starts_over(tmp_path / "table")


def test_resume_without_a_data_file_starts_over(tmp_path):
    (interrupted(tmp_path / "table") / "data.mdb").unlink()
    assert_starts_over(tmp_path / "table")


def assert_starts_over(path):
    seen = []
    build_table(
        path, SCHEMA, array_source(), progress=lambda done, _: seen.append(done), **RESUMABLE
    )
    assert len(seen) == 8
    assert [entry.name for entry in path.parent.iterdir()] == ["table"]


def test_starting_over_forgets_the_journal_first(tmp_path, monkeypatch):
    private = interrupted(tmp_path / "table")
    listed, unlink = Path.iterdir, Path.unlink

    def kill_after(path, **options):
        unlink(path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))))
    monkeypatch.setattr(Path, "unlink", kill_after)
    with pytest.raises(KeyboardInterrupt):
        build_table(tmp_path / "table", SCHEMA, array_source(), table_seed=5)
    assert os.listdir(private) == ["data.mdb"]


def test_another_digest_than_the_sources_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(Readback, "extent", lambda *_: "0" * 32)
    with pytest.raises(CorruptTableError, match="read back differ from the source"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


MEASURED = """
import re, sys
from pathlib import Path
from engram.rows import RowFormat
from engram.store import readback
from engram.store.manifest import Schema
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

schema = Schema("{}", RowFormat("fp8-ue8m0", 256), ((1, 1_000_000), (14, 1_000_000)))
build_table(Path(sys.argv[1]), schema, SyntheticSource(schema))
((_, reading),) = readback._idle
for who in ("self", reading.pid):
    # Unlike ru_maxrss, which exec inherits from whoever forked: here, from a large pytest.
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path(f"/proc/{who}/status").read_text())[1])
"""


def test_memory_stays_bounded(tmp_path):
    """Half a gigabyte in full extents; more of them would not need more."""
    own_kib, reading_kib = map(int, run_python(MEASURED, tmp_path / "table").split())
    assert own_kib < 512 << 10
    assert reading_kib < 512 << 10
    manifest, _ = read_manifest(tmp_path / "table")
    assert len(manifest.extents) == 20
    path = tmp_path / "table" / "data.mdb"
    assert path.stat().st_size > 512 << 20
    path.unlink()
