"""Making a table: rows in, one new directory out, or nothing at all.

Three hands work at once, each on an extent of its own: one thread reads and packs the next one,
the calling thread gives the current one to LMDB, and one thread has another process read the last
ones back and sees them to the device. Memory is that of a few extents, whatever the table.

**When it is read back.** An extent as soon as LMDB has written it, so from the page cache and
before any sync; manifest, token map and LMDB's own pages after the last sync and before the
directory gets its name. So it proves what was written, not that the device keeps it.

**Why it is safe.** LMDB runs without syncs, so until the last sync a power cut may leave anything
in the private directory; nobody reads it before. After a failed commit or sync LMDB lets the next
one succeed, so any error throws the whole import away. After a kill the page cache still holds
every write, so the extents that LMDB's tree names are there. All of them
are read back once more, and must be what the journal says of those it knows.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb
import numpy as np
import xxhash

from engram.errors import CorruptTableError, DestinationError, StoreError
from engram.rows import Bytes
from engram.store import destination as place
from engram.store.datafile import spans, tree_digest
from engram.store.follower import Follower, Written
from engram.store.journal import JOURNAL_FILE, Journal, boot_id
from engram.store.layout import EXTENT_BLOCKS, PAGE_BYTES
from engram.store.manifest import (
    DATA_FILE,
    MANIFEST_FILE,
    MANIFEST_KEY,
    TOKEN_MAP_KEY,
    Manifest,
    Physical,
    Schema,
    write_manifest,
)
from engram.store.pack import pack_rows
from engram.store.plan import Part, Plan
from engram.store.readback import PIECE_BLOCKS, Readback
from engram.store.source import RowSource
from engram.store.tree import Meta, PlacedValue, last_value, placed_values, read_meta

Progress = Callable[[int, int], None]
"""Called with (row bytes done, row bytes in all), after every extent."""

JOURNAL_BYTES = 4 << 30
"""Row bytes between two notes in the journal."""
_MAP_SLACK_BYTES = 256 << 20
_UNUSABLE = (StoreError, OSError, ValueError, OverflowError, struct.error, IndexError)
"""What looking at an unfinished import may end with: then it starts over."""


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

    Nothing is visible at `destination` until another process has read every extent back, from
    the page cache as soon as it was written, until all was synced after that, and until that
    process has accepted the whole as opening it would. An import that was killed goes on where
    it stopped, if schema and source are the same and the machine was not restarted; otherwise it
    starts over.

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
    plan = Plan.of(schema, source, table_seed, extent_blocks)
    place.check_destination(destination, plan.file_bytes)
    with place.private_directory(destination) as directory, _storage_errors(destination):
        # Another import may have finished between the first look and the lock.
        place.check_destination(destination, 0)
        manifest = _Import(directory, plan, progress, journal_bytes).run()
        place.publish(directory, destination)
    return manifest


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


@dataclass(frozen=True)
class _Packed:
    """An extent's value as LMDB is to store it, and the digest of its rows."""

    value: Bytes
    digest: str


class _Import:
    """One import into a private directory whose lock is held."""

    def __init__(
        self, directory: Path, plan: Plan, progress: Progress | None, journal_bytes: int
    ) -> None:
        self._directory = directory
        self._plan = plan
        self._progress = progress
        self._journal_bytes = journal_bytes
        self._digests: list[str] = []

    def run(self) -> Manifest:
        """Write, sync and read back everything; what is left is to publish the directory."""
        with Readback(self._directory, self._plan.layout, self._plan.table_seed) as readback:
            journal = self._resume(readback) or self._start_over()
            environment = self._open()
            try:
                self._write_extents(environment, readback, journal)
                manifest = self._plan.manifest(self._digests)
                self._write_rest(environment, manifest)
                environment.sync(True)
            finally:
                environment.close()
            self._describe(manifest)
            readback.finish()
        (self._directory / JOURNAL_FILE).unlink()
        return manifest

    def _start_over(self) -> Journal:
        # The journal first: killed in between, it must not speak of files that are gone.
        (self._directory / JOURNAL_FILE).unlink(missing_ok=True)
        for entry in self._directory.iterdir():
            entry.unlink()
        self._open().close()
        journal = Journal(self._plan.identity, boot_id())
        journal.write(self._directory)
        return journal

    def _resume(self, readback: Readback) -> Journal | None:
        """Take over what a killed import left, or None where that cannot be trusted."""
        journal = Journal.read(self._directory)
        if journal is None or (journal.identity, journal.boot) != (self._plan.identity, boot_id()):
            return None
        digests: list[str] = []
        try:
            for value, part in zip(self._extents_found(), self._plan.parts, strict=False):
                assert value.page is not None
                digests.append(readback.extent(value.page, part.layer, part.first_row, part.rows))
        except _UNUSABLE:
            return None
        if tuple(digests[: len(journal.digests)]) != journal.digests:
            return None
        self._digests = digests
        self._report(len(digests))
        return journal

    def _extents_found(self) -> list[PlacedValue]:
        """Extents that LMDB's tree names; they must be the first of those planned.

        Raises:
            CorruptTableError: they are not.
        """
        with self._data_file() as descriptor:
            meta = read_meta(descriptor)
            self._cover(descriptor, meta)
            values = [
                value
                for value in placed_values(descriptor, meta)
                if value.key not in (MANIFEST_KEY, TOKEN_MAP_KEY)
            ]
        if len(values) > len(self._plan.parts):
            raise CorruptTableError("the unfinished import holds more than it should")
        for value, part in zip(values, self._plan.parts, strict=False):
            self._plan.check_place(value, part)
        return values

    def _cover(self, descriptor: int, meta: Meta) -> None:
        """Have the file hold all pages that LMDB may touch: beyond its end they are a SIGBUS.

        LMDB follows no number beyond its last page, and pages that were freed again within a
        commit may never have been written.

        Raises:
            CorruptTableError: LMDB's last page is further than the import could have come.
        """
        size = (meta.last_page + 1) * PAGE_BYTES
        if size > self._map_bytes:
            raise CorruptTableError("the unfinished import claims more pages than it could have")
        if size > os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, size)

    @property
    def _map_bytes(self) -> int:
        return self._plan.file_bytes + _MAP_SLACK_BYTES

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
            map_size=self._map_bytes,
            mode=0o600,
            sync=False,
            lock=False,
            readahead=False,
        )

    def _write_extents(
        self, environment: lmdb.Environment, readback: Readback, journal: Journal
    ) -> None:
        noted = len(journal.digests)
        with (
            self._data_file() as descriptor,
            Follower(descriptor, readback) as follower,
        ):
            for part, packed in self._packed_ahead():
                with environment.begin(write=True) as transaction:
                    transaction.put(part.key, packed.value.data, append=True)
                follower.follow(self._written(descriptor, part, packed))
                self._digests.append(packed.digest)
                self._report(len(self._digests))
                before = self._plan.row_bytes_before
                if before[len(self._digests)] - before[noted] >= self._journal_bytes:
                    follower.catch_up()
                    environment.sync(True)
                    journal = replace(journal, digests=tuple(self._digests))
                    journal.write(self._directory)
                    noted = len(self._digests)
            follower.catch_up()

    def _packed_ahead(self) -> Iterator[tuple[Part, _Packed]]:
        """The extents still to be written; while one is in use, the next is being packed."""
        parts = self._plan.parts[len(self._digests) :]
        value_bytes = max((self._plan.layout.value_bytes(part.rows) for part in parts), default=0)
        buffers = [np.empty(value_bytes, np.uint8) for _ in parts[:2]]
        with ThreadPoolExecutor(1, "engram-pack") as packer:

            def start(index: int) -> Future[_Packed]:
                return packer.submit(self._pack, parts[index], buffers[index % 2])

            pending = [start(0)] if parts else []
            for index, part in enumerate(parts):
                packed = pending.pop().result()
                if index + 1 < len(parts):
                    pending.append(start(index + 1))
                yield part, packed

    def _pack(self, part: Part, buffer: Bytes) -> _Packed:
        """Read one extent's rows and lay them out, a piece at a time."""
        layout, seed = self._plan.layout, self._plan.table_seed
        value = buffer[: layout.value_bytes(part.rows)]
        piece = np.empty((PIECE_BLOCKS * layout.rows_per_block, layout.row_bytes), np.uint8)
        state = xxhash.xxh3_128((part.rows * layout.row_bytes).to_bytes(8, "little"))
        for number, first in enumerate(range(0, part.rows, len(piece))):
            rows = piece[: min(len(piece), part.rows - first)]
            self._plan.source.read(part.layer, part.first_row + first, rows)
            state.update(rows.data)
            start = number * PIECE_BLOCKS * PAGE_BYTES
            span = value[start : start + PIECE_BLOCKS * PAGE_BYTES]
            pack_rows(rows, layout, seed, part.layer, part.first_row + first, span)
        return _Packed(value, state.hexdigest())

    def _written(self, descriptor: int, part: Part, packed: _Packed) -> Written:
        value = self._plan.check_place(last_value(descriptor, read_meta(descriptor)), part)
        assert value.page is not None
        return Written(
            part.layer, part.first_row, part.rows, value.page, value.pages, packed.digest
        )

    def _report(self, extents: int) -> None:
        if self._progress is not None:
            before = self._plan.row_bytes_before
            self._progress(before[extents], before[-1])

    def _write_rest(self, environment: lmdb.Environment, manifest: Manifest) -> None:
        token_map = self._plan.schema.token_map
        with environment.begin(write=True) as transaction:
            transaction.put(MANIFEST_KEY, json.dumps(manifest.to_dict()).encode())
            if token_map is not None:
                transaction.put(TOKEN_MAP_KEY, token_map.astype("<i4").tobytes())

    def _describe(self, manifest: Manifest) -> None:
        """Find where everything lies and write `table.json`."""
        with self._data_file() as descriptor:
            meta = read_meta(descriptor)
            # Pages that were freed again within a commit may never have been written.
            size = max(os.fstat(descriptor).st_size, (meta.last_page + 1) * PAGE_BYTES)
            os.ftruncate(descriptor, size)
            values = {value.key: value for value in placed_values(descriptor, meta)}
            token_map = values.get(TOKEN_MAP_KEY)
            parts = self._plan.parts
            pages = [self._plan.check_place(values.get(part.key), part).page for part in parts]
            physical = Physical(
                file_bytes=size,
                extent_pages=tuple(page for page in pages if page is not None),
                token_map_page=None if token_map is None else token_map.page,
                token_map_bytes=0 if token_map is None else token_map.length,
                tree_digest="",
            )
            found = tree_digest(descriptor, size, spans(manifest, physical))
        write_manifest(self._directory, manifest, replace(physical, tree_digest=found))
        (self._directory / MANIFEST_FILE).chmod(0o600)
