"""The writer: layout on disk, sameness of fingerprints, refusals, nothing left behind."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files import rows_of

from engram.errors import (
    CheckpointError,
    CorruptTableError,
    DestinationError,
    SpecError,
    StoreError,
)
from engram.rows import RowFormat
from engram.store import destination as place
from engram.store.checks import digest
from engram.store.layout import BlockLayout
from engram.store.manifest import Schema, read_manifest
from engram.store.pack import ALL_SOUND, pack_rows, pack_rows_twin, unpack_rows
from engram.store.readback import Readback
from engram.store.synth import SyntheticSource
from engram.store.tree import placed_values, read_meta
from engram.store.writer import build_table

BF16 = RowFormat("bf16", 32)
SCHEMA = Schema("{}", BF16, ((1, 3000), (4, 2999)), np.arange(2000, dtype=np.int32))


class ArraySource:
    """Rows out of memory; with an `error`, only the first 2,000 of a layer can be read."""

    def __init__(self, rows, error=None):
        self.description = {"kind": "array"}
        self.rows = rows
        self.error = error
        self.digest = "array"

    def read(self, layer, first_row, out):
        if self.error is not None and first_row + len(out) > 2000:
            raise self.error
        out[:] = self.rows[layer][first_row : first_row + len(out)]


def array_source(schema=SCHEMA, **options):
    rng = np.random.default_rng(1)
    width = schema.row_format.row_bytes
    rows = {layer: rng.integers(0, 256, (n, width), np.uint8) for layer, n in schema.layers}
    return ArraySource(rows, **options)


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


@pytest.mark.parametrize("what", ["directory", "file", "dangling link"])
def test_destination_that_exists(tmp_path, what):
    path = tmp_path / "table"
    {
        "directory": path.mkdir,
        "file": path.touch,
        "dangling link": lambda: path.symlink_to("nowhere"),
    }[what]()
    with pytest.raises(DestinationError, match="exists; remove it"):
        build_table(path, SCHEMA, array_source())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_destination_without_parent(tmp_path):
    with pytest.raises(DestinationError, match="is not a directory; create it"):
        build_table(tmp_path / "no" / "table", SCHEMA, array_source())


def test_too_little_space_names_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "free_space", lambda directory: 1234)
    with pytest.raises(DestinationError, match=r"has 1234 bytes free, the table needs \d{6,};"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


MOUNTS = r"""
22 27 0:21 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /mnt rw shared:1 master:2 - xfs /dev/vdb rw
31 30 0:31 / /mnt/far\040away rw - nfs4 server:/x rw
32 22 0:32 / /mnt/over rw - ext4 /dev/vdc rw
33 22 0:33 / /mnt/over rw - fuse.sshfs host: rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/mnt", "xfs"),
        ("/mnt/far away/tables", "nfs4"),
        ("/mnt/farther", "xfs"),
        ("/mnt/over/y", "fuse.sshfs"),
    ],
)
def test_file_system_of_a_path(path, kind):
    assert place.file_system_of(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "ceph"])
def test_network_file_systems_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(place, "file_system_of", lambda path: kind)
    with pytest.raises(DestinationError, match=f"network file system \\({kind}\\)"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


def test_second_import_into_the_same_destination(tmp_path):
    private = place.private_path(tmp_path / "table")
    private.mkdir()
    (private / "data.mdb").write_bytes(b"of the other import")
    descriptor = os.open(private, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DestinationError, match=r"another import into .* is running"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert (private / "data.mdb").read_bytes() == b"of the other import"
    os.close(descriptor)
    build_table(tmp_path / "table", SCHEMA, array_source())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_destination_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "table"

    def appear(done, total):
        if done == total:
            path.mkdir()

    with pytest.raises(DestinationError, match=r"cannot be renamed .* File exists"):
        build_table(path, SCHEMA, array_source(), progress=appear)
    assert not list(path.iterdir())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_rename_without_help_of_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "_libc", object())
    build_table(tmp_path / "table", SCHEMA, array_source())
    (tmp_path / "other").mkdir()
    with pytest.raises(DestinationError, match="File exists"):
        place._rename_new(tmp_path / "table", tmp_path / "other")
    assert rows_of(tmp_path / "table").keys() == {1, 4}


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


def test_another_digest_than_the_sources_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(Readback, "extent", lambda *_: "0" * 32)
    with pytest.raises(CorruptTableError, match="read back differ from the source"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, signal, sys
from pathlib import Path
from engram.errors import DestinationError
from engram.rows import RowFormat
from engram.store.manifest import Schema
from engram.store.synth import build_synthetic

schema = Schema("{}", RowFormat("bf16", 32), ((1, 200000),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
try:
    build_synthetic(Path(sys.argv[1]), schema)
except DestinationError as error:
    print(error)
"""


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_file_that_cannot_grow(tmp_path):
    """A limit on file size fails in the middle of a write, as a full disk does."""
    said = run_python(LIMITED, tmp_path / "table")
    assert "failed" in said
    assert "thrown away" in said
    assert "bytes free there" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB; needs the right to mount."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_disk_that_fills_up_meanwhile(small_disk):
    """The preflight passes; then someone else takes the space."""
    schema = Schema("{}", BF16, ((1, 200_000),))

    def fill(done, total):
        path = small_disk / "someone-elses"
        if not path.exists():
            path.write_bytes(bytes(14 << 20))

    with pytest.raises(DestinationError, match=r"failed .* with \d+ bytes free there"):
        build_table(
            small_disk / "table", schema, SyntheticSource(schema), extent_blocks=64, progress=fill
        )
    assert [entry.name for entry in small_disk.iterdir()] == ["someone-elses"]
    with pytest.raises(DestinationError, match="bytes free, the table needs"):
        build_table(small_disk / "table", schema, SyntheticSource(schema))
    (small_disk / "someone-elses").unlink()
    build_table(small_disk / "table", schema, SyntheticSource(schema), extent_blocks=64)


MEASURED = """
import resource, sys
from pathlib import Path
from engram.rows import RowFormat
from engram.store.manifest import Schema
from engram.store.synth import build_synthetic

schema = Schema("{}", RowFormat("fp8-ue8m0", 256), ((1, 1_000_000), (14, 1_000_000)))
build_synthetic(Path(sys.argv[1]), schema)
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(who).ru_maxrss)
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
