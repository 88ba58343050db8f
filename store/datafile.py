"""Opening a table's data file: everything is proven by plain reads.

LMDB follows the numbers in its pages blindly, so one flipped bit there can end the process, and
it allows a file to be open once in a process only. So it writes tables, but does not read them:
`table.json` (digested) says what size, which pages without rows (digested) and which place of
every value to expect; then the two small values are read, and rows by their offsets.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from engram.errors import CorruptTableError, StoreError
from engram.store.checks import digest
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES
from engram.store.manifest import (
    DATA_FILE,
    MANIFEST_KEY,
    TOKEN_MAP_KEY,
    Manifest,
    Physical,
    extent_key,
)
from engram.store.tree import PlacedValue, placed_values, read_meta

_META_PAGES = 2
_PIECE_BYTES = 1 << 20


def open_file(directory: Path) -> int:
    """Open the data file read-only and return its descriptor, which the caller closes.

    Raises:
        StoreError: missing, unreadable, a symbolic link or not a regular file.
    """
    path = directory / DATA_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = {
            errno.ENOENT: "is missing; import the table again",
            errno.ELOOP: "is a symbolic link; put the file itself there, or link its directory",
            errno.EACCES: f"cannot be read by uid {os.geteuid()}; give it read permission",
        }.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise StoreError(f"{path} {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} is not a regular file; import the table again")
    return descriptor


def identity(descriptor: int) -> tuple[int, ...]:
    """What must stay the same while a table is being opened."""
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes at `offset`.

    Raises:
        CorruptTableError: the file ends before, or the device reports an error.
    """
    pieces = []
    while count:
        try:
            piece = os.pread(descriptor, count, offset)
        except OSError as error:
            raise CorruptTableError(
                f"the data file cannot be read at byte {offset}: I/O error "
                f"({error.strerror}); check the device, then import the table again"
            ) from None
        if not piece:
            raise CorruptTableError(
                f"the data file ends at byte {offset}, too early; import the table again"
            )
        pieces.append(piece)
        offset += len(piece)
        count -= len(piece)
    return b"".join(pieces)


def spans(manifest: Manifest, physical: Physical) -> list[tuple[int, int]]:
    """(first page, pages) of every extent, ascending.

    Raises:
        CorruptTableError: they overlap, leave the file, or do not add up to the layers' rows.
    """
    layout = manifest.layout
    if len(physical.extent_pages) != len(manifest.extents) or physical.file_bytes % PAGE_BYTES:
        raise CorruptTableError("table.json contradicts itself; import the table again")
    expected = [
        (layer, first, min(layout.rows_per_extent, rows - first))
        for layer, rows in manifest.layers
        for first in range(0, rows, layout.rows_per_extent)
    ]
    if expected != [(extent.layer, extent.first_row, extent.rows) for extent in manifest.extents]:
        raise CorruptTableError("the extents do not add up to the layers; import the table again")
    found = sorted(
        (page, layout.blocks(extent.rows))
        for page, extent in zip(physical.extent_pages, manifest.extents, strict=True)
    )
    end = _META_PAGES
    for page, pages in [*found, (physical.file_bytes // PAGE_BYTES, 0)]:
        if page < end:
            raise CorruptTableError("extents overlap or leave the file; import the table again")
        end = page + pages
    return found


def _gaps(file_bytes: int, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(byte, bytes) outside the `taken` pages, in pieces of bounded size."""
    position = 0
    for page, pages in [*taken, (file_bytes // PAGE_BYTES, 0)]:
        end = page * PAGE_BYTES
        while position < end:
            count = min(_PIECE_BYTES, end - position)
            yield position, count
            position += count
        position = end + pages * PAGE_BYTES


def tree_digest(descriptor: int, file_bytes: int, taken: list[tuple[int, int]]) -> str:
    """Digest of LMDB's own pages: xxh3-128 of every page outside `taken`, each run of at most
    1 MiB preceded by its offset as uint64.

    Args:
        descriptor: of the data file.
        file_bytes: its size, a multiple of the page size.
        taken: (first page, pages) of the extents, ascending; see `spans`.

    Raises:
        CorruptTableError: a page cannot be read.
    """
    state = xxhash.xxh3_128()
    for position, count in _gaps(file_bytes, taken):
        state.update(position.to_bytes(8, "little"))
        state.update(read_at(descriptor, count, position))
    return state.hexdigest()


def check_structure(descriptor: int, manifest: Manifest, physical: Physical) -> None:
    """Prove size, LMDB's own pages and the place of every value, without LMDB.

    Raises:
        CorruptTableError: naming what does not hold.
        StoreError: LMDB uses another page size on this machine.
    """
    size = os.fstat(descriptor).st_size
    if size != physical.file_bytes:
        raise CorruptTableError(
            f"the data file has {size} bytes, {physical.file_bytes} were written; "
            "import the table again"
        )
    check_token_map(descriptor, manifest, physical)
    if tree_digest(descriptor, size, spans(manifest, physical)) != physical.tree_digest:
        raise CorruptTableError("LMDB's own pages are damaged; import the table again")
    try:
        meta = read_meta(descriptor)
        if (meta.last_page + 1) * PAGE_BYTES > size:
            raise CorruptTableError(
                f"LMDB uses {meta.last_page + 1} pages, the data file has {size // PAGE_BYTES}; "
                "import the table again"
            )
        for page in physical.extent_pages:
            os.posix_fadvise(descriptor, page * PAGE_BYTES, 1, os.POSIX_FADV_WILLNEED)
        _compare_tree(list(placed_values(descriptor, meta)), manifest, physical)
    except OSError as error:
        raise CorruptTableError(
            f"the data file cannot be read: I/O error ({error.strerror}); check the device"
        ) from None


def _compare_tree(found: list[PlacedValue], manifest: Manifest, physical: Physical) -> None:
    layout = manifest.layout
    wanted: list[tuple[bytes, int | None, int]] = [
        (extent_key(extent.layer, extent.first_row), page, layout.value_bytes(extent.rows))
        for extent, page in zip(manifest.extents, physical.extent_pages, strict=True)
    ]
    manifest_values = [value for value in found if value.key == MANIFEST_KEY]
    wanted += [(value.key, value.page, value.length) for value in manifest_values]
    if manifest.token_map_digest is not None:
        wanted.append((TOKEN_MAP_KEY, physical.token_map_page, physical.token_map_bytes))
    if len(manifest_values) != 1 or wanted != [
        (each.key, each.page, each.length) for each in found
    ]:
        raise CorruptTableError(
            "keys, lengths or places of LMDB's values differ from table.json; "
            "import the table again"
        )


def check_token_map(descriptor: int, manifest: Manifest, physical: Physical) -> None:
    """Compare the token map with its digest, by plain reads, where it has pages of its own.

    Raises:
        CorruptTableError: it is damaged, or cannot be read.
    """
    if physical.token_map_page is None:
        return
    start = physical.token_map_page * PAGE_BYTES + PAGE_HEADER_BYTES
    if digest(read_at(descriptor, physical.token_map_bytes, start)) != manifest.token_map_digest:
        raise CorruptTableError("the token map is damaged; import the table again")


def read_embedded(
    descriptor: int, manifest: Manifest, physical: Physical
) -> npt.NDArray[np.int32] | None:
    """Compare the manifest in the data file and return the token map, if there is one.

    The caller has called `check_structure`.

    Raises:
        CorruptTableError: one of the two values is damaged.
    """
    values = {
        value.key: read_at(descriptor, value.length, value.start)
        for value in placed_values(descriptor, read_meta(descriptor))
        if value.key in (MANIFEST_KEY, TOKEN_MAP_KEY)
    }
    try:
        same = json.loads(values[MANIFEST_KEY]) == json.loads(json.dumps(manifest.to_dict()))
    except ValueError:
        same = False
    if not same:
        raise CorruptTableError(
            "the manifest in the data file differs from table.json; import the table again"
        )
    if manifest.token_map_digest is None:
        return None
    token_map = values[TOKEN_MAP_KEY]
    if digest(token_map) != manifest.token_map_digest or len(token_map) % 4:
        raise CorruptTableError("the token map is damaged; import the table again")
    return np.frombuffer(token_map, np.dtype("<i4"))
