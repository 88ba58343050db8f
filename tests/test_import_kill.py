"""kill -9 of an import: never an openable half, and the next one finishes the same table."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import count

import numpy as np
import pytest
from table_files import rows_of

from engram.errors import StoreError
from engram.rows import RowFormat
from engram.store import journal
from engram.store.destination import private_path
from engram.store.journal import JOURNAL_FILE, Journal
from engram.store.manifest import Schema, read_manifest
from engram.store.synth import SyntheticSource
from engram.store.tree import placed_values, read_meta
from engram.store.writer import build_table

ROWS = 50_000
SCHEMA = Schema(
    "{}", RowFormat("fp8-ue8m0", 128), ((1, ROWS), (14, ROWS - 7)), np.arange(3000, dtype=np.int32)
)
OPTIONS = {"extent_blocks": 64, "journal_bytes": 1 << 20}
KILLS = 10
LAST_PAGE = 16 + 24 + 2 * 48
"""Byte of a meta page where LMDB keeps the last page in use."""

IMPORT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_import_kill import OPTIONS, SCHEMA
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

def progress(done, total):
    print(done, total, flush=True)

print("started", flush=True)
build_table(Path(sys.argv[1]), SCHEMA, SyntheticSource(SCHEMA), progress=progress, **OPTIONS)
"""


def build(path, source=None, schema=SCHEMA, **options):
    """Import and return (manifest, row bytes that were done at the first report)."""
    seen = []
    manifest = build_table(
        path,
        schema,
        source or SyntheticSource(schema),
        progress=lambda done, total: seen.append(done),
        **(OPTIONS | options),
    )
    return manifest, seen[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "table"
    manifest, first = build(path)
    return manifest, rows_of(path), first


def start(path):
    return subprocess.Popen(
        [sys.executable, "-c", IMPORT, str(path), *sys.path], stdout=subprocess.PIPE, text=True
    )


def assert_finished(path, manifest, undisturbed):
    expected, rows, _ = undisturbed
    assert manifest == expected
    assert read_manifest(path)[0].fingerprint == expected.fingerprint
    found = rows_of(path)
    for layer, packed in rows.items():
        np.testing.assert_array_equal(found[layer], packed)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def assert_nothing_to_open(path):
    assert {entry.name for entry in path.parent.iterdir()} <= {private_path(path).name}
    with pytest.raises(StoreError, match="is not a table"):
        read_manifest(path)


def killed(path, reports, seconds):
    """Start an import, let it live for some reports and a moment more, and kill it."""
    process = start(path)
    for _ in range(1 + reports):
        process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    process.communicate()


def test_killed_ten_times_then_finished(tmp_path, undisturbed):
    """Each import goes on with what the ones before it left, until one gets to the end."""
    chance = random.Random(20260101)
    paths = (tmp_path / str(number) / "table" for number in count())
    path, noted = next(paths), 0
    path.parent.mkdir()
    kills = 0
    while kills < KILLS:
        killed(path, chance.randint(0, 9), chance.uniform(0, 0.01))
        if path.exists():
            assert_finished(path, read_manifest(path)[0], undisturbed)
            path, noted = next(paths), 0
            path.parent.mkdir()
            continue
        kills += 1
        assert_nothing_to_open(path)
        notes = Journal.read(private_path(path))
        before, noted = noted, 0 if notes is None else len(notes.digests)
        assert noted >= before, "a killed import went back behind its notes"
    manifest, first = build(path)
    assert noted == 0 or first != undisturbed[2], "the last import started over"
    assert_finished(path, manifest, undisturbed)


def test_killed_while_it_finishes(tmp_path, undisturbed):
    """After the last row there are syncs, the tree's digest, the manifest and the rename."""
    for number, delay in enumerate((0.0, 0.005, 0.02)):
        path = tmp_path / str(number) / "table"
        path.parent.mkdir()
        process = start(path)
        for line in process.stdout:
            done, _, total = line.partition(" ")
            if done == total.strip():
                break
        time.sleep(delay)
        process.kill()
        process.communicate()
        if path.exists():
            manifest = read_manifest(path)[0]
        else:
            assert_nothing_to_open(path)
            manifest, _ = build(path)
        assert_finished(path, manifest, undisturbed)


class InterruptError(BaseException):
    """As a KeyboardInterrupt: what was done stays."""


def interrupted(path, after_extents):
    """Leave an import unfinished, with notes in its journal; returns its private directory."""
    reports = count(1)

    def progress(done, total):
        if next(reports) == after_extents:
            raise InterruptError

    with pytest.raises(InterruptError):
        build_table(path, SCHEMA, SyntheticSource(SCHEMA), progress=progress, **OPTIONS)
    assert_nothing_to_open(path)
    directory = private_path(path)
    notes = Journal.read(directory)
    assert 0 < len(notes.digests) < after_extents
    return directory, notes


def test_goes_on_behind_the_last_extent(tmp_path, undisturbed):
    path = tmp_path / "table"
    _, notes = interrupted(path, 20)
    manifest, first = build(path)
    before = [0]
    for extent in manifest.extents:
        before.append(before[-1] + extent.rows * 132)
    assert first in before
    assert first >= before[len(notes.digests)]
    assert_finished(path, manifest, undisturbed)


def test_after_a_boot_it_starts_over(tmp_path, undisturbed, monkeypatch):
    path = tmp_path / "table"
    interrupted(path, 20)
    other = tmp_path.parent / f"{tmp_path.name}-boot_id"
    other.write_text("another boot\n")
    monkeypatch.setattr(journal, "_BOOT_ID", other)
    manifest, first = build(path)
    assert first == undisturbed[2], "it went on although the machine was restarted"
    assert_finished(path, manifest, undisturbed)


@pytest.mark.parametrize("what", ["source", "token map", "extent size"])
def test_another_import_starts_over(tmp_path, what):
    path = tmp_path / "table"
    interrupted(path, 20)
    source, schema, options = None, SCHEMA, {}
    if what == "source":
        source = SyntheticSource(SCHEMA, seed=1)
    elif what == "token map":
        token_map = np.arange(3000, dtype=np.int32)[::-1].copy()
        schema = Schema(SCHEMA.spec, SCHEMA.row_format, SCHEMA.layers, token_map)
    else:
        options = {"extent_blocks": 65}
    manifest, first = build(path, source, schema, **options)
    assert first == manifest.extents[0].rows * 132
    alone, _ = build(tmp_path / "alone", source, schema, **options)
    assert manifest == alone


def flip(path, position):
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 16]))


@pytest.mark.parametrize(
    "what", ["noted row", "later row", "tree", "meta", "last page", "journal", "digest", "note"]
)
def test_what_cannot_be_trusted_starts_over(tmp_path, undisturbed, what):
    path = tmp_path / "table"
    directory, notes = interrupted(path, 20)
    data = directory / "data.mdb"
    with data.open("rb") as stream:
        meta = read_meta(stream.fileno())
        pages = [value.page for value in placed_values(stream.fileno(), meta)]
    if what == "noted row":
        flip(data, pages[0] * 4096 + 500)
    elif what == "later row":
        flip(data, pages[len(notes.digests)] * 4096 + 500)
    elif what == "tree":
        flip(data, meta.root * 4096)
    elif what == "meta":
        flip(data, 16)
    elif what == "last page":
        for page in (0, 1):
            flip(data, page * 4096 + LAST_PAGE + 6)
    elif what == "note":
        journal_file = directory / JOURNAL_FILE
        text = journal_file.read_text()
        changed = "0" if notes.digests[0][0] != "0" else "1"
        journal_file.write_text(text.replace(notes.digests[0], changed + notes.digests[0][1:]))
        assert Journal.read(directory) is None
    elif what == "journal":
        (directory / JOURNAL_FILE).write_text("{")
    else:
        digests = ("0" * 32,) * len(notes.digests)
        Journal(notes.identity, notes.boot, digests).write(directory)
    manifest, first = build(path)
    assert first == undisturbed[2], "it went on from what cannot be trusted"
    assert_finished(path, manifest, undisturbed)
