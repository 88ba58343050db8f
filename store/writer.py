"""Making a table: rows in, one new directory out, or nothing at all.

Three hands work at once, each on an extent of its own: one thread reads and packs the next one,
the calling thread gives the current one to LMDB, and one thread sees the last ones to the device
while another process reads them back. Memory is that of a few extents, whatever the table.

**Why it is safe.** LMDB runs without syncs, so until the last sync a power cut may leave anything
in the private directory; nobody reads it before. After a failed commit or sync LMDB lets the next
one succeed, so any error throws the whole import away. After a kill the page cache still holds
every write, so extents that LMDB's tree names are there; the journal says up to where they were
synced and read back, and all later ones are read back again.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import lmdb
import numpy as np
import xxhash

from engram.errors import CorruptTableError, DestinationError, SpecError
from engram.rows import Bytes
from engram.store import destination as place
from engram.store.datafile import spans, tree_digest
from engram.store.journal import JOURNAL_FILE, Journal, boot_id
from engram.store.layout import EXTENT_BLOCKS, PAGE_BYTES, BlockLayout
from engram.store.manifest import (
    DATA_FILE,
    MANIFEST_FILE,
    MANIFEST_KEY,
    TOKEN_MAP_KEY,
    Extent,
    Manifest,
    Physical,
    Schema,
    extent_key,
    write_manifest,
)
from engram.store.pack import pack_rows
from engram.store.readback import PIECE_BLOCKS, Readback
from engram.store.source import RowSource, table_seed_of
from engram.store.tree import PlacedValue, last_value, placed_values, read_meta

Progress = Callable[[int, int], None]
"""Called with (row bytes done, row bytes in all), after every extent."""

JOURNAL_BYTES = 4 << 30
"""Bytes written between two notes in the journal."""
_MAP_SLACK_BYTES = 256 << 20
_BEHIND_MAX = 3
"""Extents that may be written and not yet read back: they stay in the page cache."""

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class _Part:
    """One extent to be: rows of a model layer."""

    layer: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class _Packed:
    value: Bytes
    digest: str


def build_table(
    destination: Path,
    schema: Schema,
    source: RowSource,
    *,
    table_seed: int | None = None,
    extent_blocks: int = EXTENT_BLOCKS,
    progress: Progress | None = None,
    journal_bytes: int = JOURNAL_BYTES,
) -> Manifest:
    """Make the table `destination` and return its manifest.

    Nothing is visible at `destination` until every byte was synced and read back by another
    process. An import that was killed goes on where it stopped, if schema and source are the
    same and the machine was not restarted; otherwise it starts over.

    Args:
        destination: directory to create.
        schema: what the table holds.
        source: its rows.
        table_seed: seeds the row checks; by default it follows from schema and source.
        extent_blocks: blocks of a full extent.
        progress: told of the bytes done.
        journal_bytes: how much may have to be written again after a kill.

    Raises:
        DestinationError: exists, too little space, a network file system, another import into it
            is running, or writing failed; nothing is left behind.
        CheckpointError: the source cannot be read; nothing is left behind.
        CorruptTableError: what was read back is not what was written; nothing is left behind.
        StoreError: rows that do not fit a block.
        SpecError: a schema without rows.
    """
    destination = Path(os.path.abspath(destination))
    layout = BlockLayout(schema.row_format.row_bytes, extent_blocks)
    _check_schema(schema)
    seed = table_seed_of(schema, source.digest) if table_seed is None else table_seed
    place.check_destination(destination, _needed_bytes(schema, layout))
    with place.private_directory(destination) as directory, _storage_errors(destination):
        place.check_destination(destination, 0)
        job = _Import(directory, schema, source, layout, seed, progress, journal_bytes)
        manifest = job.run()
        place.publish(directory, destination)
    return manifest


def _check_schema(schema: Schema) -> None:
    layers = [layer for layer, _ in schema.layers]
    if not layers or layers != sorted(set(layers)) or min(rows for _, rows in schema.layers) < 1:
        raise SpecError(
            f"a table needs layers in ascending order, each with rows, not {list(schema.layers)}"
        )


def _needed_bytes(schema: Schema, layout: BlockLayout) -> int:
    token_map_bytes = 0 if schema.token_map is None else schema.token_map.nbytes
    return layout.file_bytes([rows for _, rows in schema.layers]) + token_map_bytes


@contextmanager
def _storage_errors(destination: Path) -> Iterator[None]:
    """Turn what LMDB and the system say about writing into one line."""
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise DestinationError(
            f"writing {destination} failed ({error}) with "
            f"{place.free_space(destination.parent)} bytes free there; the import was thrown away: "
            "check space and device, then import again"
        ) from error


class _Import:
    """One import into a locked private directory."""

    def __init__(
        self,
        directory: Path,
        schema: Schema,
        source: RowSource,
        layout: BlockLayout,
        seed: int,
        progress: Progress | None,
        journal_bytes: int,
    ) -> None:
        self._directory = directory
        self._schema = schema
        self._source = source
        self._layout = layout
        self._seed = seed
        self._progress = progress
        self._journal_bytes = journal_bytes
        self._parts = [
            _Part(layer, first, min(layout.rows_per_extent, rows - first))
            for layer, rows in schema.layers
            for first in range(0, rows, layout.rows_per_extent)
        ]
        self._done_bytes = list(
            accumulate((part.rows * layout.row_bytes for part in self._parts), initial=0)
        )
        self._digests: list[str] = []

    def run(self) -> Manifest:
        """Write, sync and read back everything; what is left is to publish the directory."""
        with Readback(self._directory, self._layout, self._seed) as readback:
            journal = self._resume(readback) or self._start_over()
            environment = self._open()
            try:
                self._write_extents(environment, readback, journal)
                manifest = self._manifest()
                self._write_rest(environment, manifest)
                environment.sync(True)
            finally:
                environment.close()
            self._describe(manifest)
            readback.finish()
        (self._directory / JOURNAL_FILE).unlink()
        return manifest

    def _identity(self) -> dict[str, object]:
        schema = self._schema
        return {
            "spec": schema.spec,
            "row_format": schema.row_format.to_dict(),
            "layers": [list(layer) for layer in schema.layers],
            "token_map": schema.token_map_digest,
            "source": self._source.digest,
            "table_seed": self._seed,
            "extent_blocks": self._layout.extent_blocks,
        }

    def _start_over(self) -> Journal:
        for entry in self._directory.iterdir():
            entry.unlink()
        self._digests = []
        self._open().close()
        journal = Journal(self._identity(), boot_id())
        journal.write(self._directory)
        return journal

    def _resume(self, readback: Readback) -> Journal | None:
        """Take over what a killed import left, or None where that cannot be trusted."""
        journal = Journal.read(self._directory)
        if journal is None or (journal.identity, journal.boot) != (self._identity(), boot_id()):
            return None
        try:
            values = self._extents_found()
            if len(values) < len(journal.digests):
                return None
            digests = list(journal.digests[: journal.previous])
            self._report(len(digests))
            for value, part in list(zip(values, self._parts, strict=False))[len(digests) :]:
                assert value.page is not None
                digests.append(readback.extent(value.page, part.layer, part.first_row, part.rows))
                self._report(len(digests))
        except CorruptTableError:
            return None
        if tuple(digests[: len(journal.digests)]) != journal.digests:
            return None
        self._digests = digests
        return journal

    def _extents_found(self) -> list[PlacedValue]:
        """Extents that LMDB's tree names; they must be the first of those planned.

        Raises:
            CorruptTableError: they are not.
        """
        with self._data_file() as descriptor:
            values = [
                value
                for value in placed_values(descriptor, read_meta(descriptor))
                if value.key not in (MANIFEST_KEY, TOKEN_MAP_KEY)
            ]
        for value, part in zip(values, self._parts, strict=False):
            self._check_place(value, part)
        if len(values) > len(self._parts):
            raise CorruptTableError("the unfinished import holds more than it should")
        return values

    def _check_place(self, value: PlacedValue | None, part: _Part) -> PlacedValue:
        if (
            value is None
            or value.page is None
            or value.key != extent_key(part.layer, part.first_row)
            or value.length != self._layout.value_bytes(part.rows)
        ):
            raise CorruptTableError(
                f"layer {part.layer} row {part.first_row} is not where LMDB was told to put it; "
                "import again"
            )
        return value

    @contextmanager
    def _data_file(self) -> Iterator[int]:
        descriptor = os.open(self._directory / DATA_FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self) -> lmdb.Environment:
        # Never writemap: a full disk would then end the process with SIGBUS.
        return lmdb.open(
            str(self._directory),
            map_size=_needed_bytes(self._schema, self._layout) + _MAP_SLACK_BYTES,
            mode=0o600,
            sync=False,
            lock=False,
            readahead=False,
        )

    def _write_extents(
        self, environment: lmdb.Environment, readback: Readback, journal: Journal
    ) -> None:
        buffers = [
            np.empty(self._layout.extent_blocks * PAGE_BYTES, np.uint8)
            for _ in range(min(2, len(self._parts)))
        ]
        noted = len(journal.digests)
        with (
            self._data_file() as descriptor,
            ThreadPoolExecutor(1, "engram-pack") as packers,
            _Follower(descriptor, readback) as follower,
        ):

            def pack(index: int) -> Future[_Packed] | None:
                if index == len(self._parts):
                    return None
                return packers.submit(self._pack, self._parts[index], buffers[index % 2])

            pending = pack(len(self._digests))
            while pending is not None:
                packed, part = pending.result(), self._parts[len(self._digests)]
                pending = pack(len(self._digests) + 1)
                with environment.begin(write=True) as transaction:
                    transaction.put(
                        extent_key(part.layer, part.first_row), packed.value.data, append=True
                    )
                written = self._check_place(last_value(descriptor, read_meta(descriptor)), part)
                follower.follow(written, part, packed.digest)
                self._digests.append(packed.digest)
                self._report(len(self._digests))
                done = self._done_bytes[len(self._digests)] - self._done_bytes[noted]
                if done >= self._journal_bytes:
                    follower.catch_up()
                    environment.sync(True)
                    journal = journal.advanced(self._digests)
                    journal.write(self._directory)
                    noted = len(self._digests)
            follower.catch_up()

    def _pack(self, part: _Part, buffer: Bytes) -> _Packed:
        """Read one extent's rows and lay them out as LMDB's value, piece by piece."""
        layout = self._layout
        value = buffer[: layout.value_bytes(part.rows)]
        piece = np.empty((PIECE_BLOCKS * layout.rows_per_block, layout.row_bytes), np.uint8)
        state = xxhash.xxh3_128((part.rows * layout.row_bytes).to_bytes(8, "little"))
        for number, first in enumerate(range(0, part.rows, len(piece))):
            rows = piece[: min(len(piece), part.rows - first)]
            self._source.read(part.layer, part.first_row + first, rows)
            state.update(rows.data)
            start = number * PIECE_BLOCKS * PAGE_BYTES
            span = value[start : start + PIECE_BLOCKS * PAGE_BYTES]
            pack_rows(rows, layout, self._seed, part.layer, part.first_row + first, span)
        return _Packed(value, state.hexdigest())

    def _report(self, extents: int) -> None:
        if self._progress is not None:
            self._progress(self._done_bytes[extents], self._done_bytes[-1])

    def _manifest(self) -> Manifest:
        schema = self._schema
        return Manifest(
            spec=schema.spec,
            row_format=schema.row_format,
            layers=schema.layers,
            token_map_digest=schema.token_map_digest,
            table_seed=self._seed,
            extent_blocks=self._layout.extent_blocks,
            extents=tuple(
                Extent(part.layer, part.first_row, part.rows, found)
                for part, found in zip(self._parts, self._digests, strict=True)
            ),
            source={**self._source.description, "digest": self._source.digest},
        )

    def _write_rest(self, environment: lmdb.Environment, manifest: Manifest) -> None:
        with environment.begin(write=True) as transaction:
            transaction.put(MANIFEST_KEY, json.dumps(manifest.to_dict()).encode())
            if self._schema.token_map is not None:
                transaction.put(TOKEN_MAP_KEY, self._schema.token_map.astype("<i4").tobytes())

    def _describe(self, manifest: Manifest) -> None:
        """Find where everything lies and write `table.json`."""
        with self._data_file() as descriptor:
            meta = read_meta(descriptor)
            # Pages that were freed again within a commit may never have been written.
            size = max(os.fstat(descriptor).st_size, (meta.last_page + 1) * PAGE_BYTES)
            os.ftruncate(descriptor, size)
            values = {value.key: value for value in placed_values(descriptor, meta)}
            token_map = values.get(TOKEN_MAP_KEY)
            pages = [
                self._check_place(values.get(extent_key(part.layer, part.first_row)), part).page
                for part in self._parts
            ]
            physical = Physical(
                file_bytes=size,
                extent_pages=tuple(page for page in pages if page is not None),
                token_map_page=None if token_map is None else token_map.page,
                token_map_bytes=0 if token_map is None else token_map.length,
                tree_digest="",
            )
            found = tree_digest(descriptor, size, spans(manifest, physical))
        write_manifest(
            self._directory, manifest, Physical(**{**vars(physical), "tree_digest": found})
        )
        (self._directory / MANIFEST_FILE).chmod(0o600)


class _Follower:
    """Sees written extents to the device, reads them back, and drops them from the page cache."""

    def __init__(self, descriptor: int, readback: Readback) -> None:
        self._descriptor = descriptor
        self._readback = readback
        self._thread = ThreadPoolExecutor(1, "engram-follow")
        self._behind: deque[Future[None]] = deque()

    def __enter__(self) -> _Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def follow(self, value: PlacedValue, part: _Part, expected: str) -> None:
        """Take on one more extent; waits while too many are underway, and raises their errors."""
        self._behind.append(self._thread.submit(self._see_to, value, part, expected))
        while len(self._behind) > _BEHIND_MAX:
            self._behind.popleft().result()

    def catch_up(self) -> None:
        """Wait for all, and raise their errors."""
        while self._behind:
            self._behind.popleft().result()

    def _see_to(self, value: PlacedValue, part: _Part, expected: str) -> None:
        assert value.page is not None
        offset, count = value.page * PAGE_BYTES, value.pages * PAGE_BYTES
        _write_back(self._descriptor, offset, count, _WRITE)
        found = self._readback.extent(value.page, part.layer, part.first_row, part.rows)
        if found != expected:
            raise CorruptTableError(
                f"layer {part.layer} rows from {part.first_row} read back differ from the source; "
                "check the memory and the device, then import again"
            )
        _write_back(self._descriptor, offset, count, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
        os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def _write_back(descriptor: int, offset: int, count: int, flags: int) -> None:
    """sync_file_range(2): only a push; that all is on the device is for the last sync to say."""
    _libc.sync_file_range(
        ctypes.c_int(descriptor),
        ctypes.c_int64(offset),
        ctypes.c_int64(count),
        ctypes.c_uint(flags),
    )
