"""Where LMDB put each value: its B-tree, read by plain reads of its pages.

py-lmdb touches every page of a value that it hands out, so asking it for the place of an extent
reads the extent, and its pages then count as this process's memory. The tree above the extents is
a few pages; walking those costs nothing. Names are those of LMDB 0.9's own page structures.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from engram.errors import CorruptTableError, StoreError
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES

_META = struct.Struct("<16x II 16x I 84x QQQ")
"""Page header, magic, version, .., page size, .., root, last page, transaction id."""
_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_NO_ROOT = 2**64 - 1
_DEPTH_MAX = 32
_PAGES_MAX = 2**50
"""More than any file has, and no offset beyond overflows."""

_HEADER = struct.Struct("<QHHHH")
_OVERFLOW_HEADER = struct.Struct("<QHHI")
_NODE = struct.Struct("<HHHH")
_POINTER = struct.Struct("<Q")
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG_DATA = 0x01


@dataclass(frozen=True, slots=True)
class PlacedValue:
    """One value of the environment.

    Attributes:
        page: first of its own pages, or None where it lies within a leaf.
        length: bytes.
        start: byte of the file where it begins.
    """

    key: bytes
    page: int | None
    length: int
    start: int

    @property
    def pages(self) -> int:
        """Number of its own pages."""
        return 0 if self.page is None else -(-(self.length + PAGE_HEADER_BYTES) // PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Meta:
    """The newest commit: root of the main tree (None if empty) and last page in use."""

    root: int | None
    last_page: int


def _read(descriptor: int, page: int, count: int = PAGE_BYTES) -> bytes:
    found = os.pread(descriptor, count, page * PAGE_BYTES) if page < _PAGES_MAX else b""
    if len(found) != count:
        raise CorruptTableError(f"the data file ends inside page {page}; import the table again")
    return found


def read_meta(descriptor: int) -> Meta:
    """The newer of the two meta pages.

    Raises:
        CorruptTableError: either is not LMDB's.
        StoreError: LMDB uses another page size on this machine.
    """
    newest = (-1, Meta(None, 0))
    for page in range(2):
        magic, version, page_bytes, root, last_page, transaction = _META.unpack(
            _read(descriptor, page, _META.size)
        )
        if (magic, version) != (_MAGIC, _DATA_VERSION):
            raise CorruptTableError(f"meta page {page} is not LMDB's; import the table again")
        if page_bytes != PAGE_BYTES:
            raise StoreError(
                f"LMDB uses pages of {page_bytes} bytes on this machine, tables need "
                f"{PAGE_BYTES}; use a kernel with {PAGE_BYTES}-byte pages"
            )
        newest = max(
            newest,
            (transaction, Meta(None if root == _NO_ROOT else root, last_page)),
            key=lambda each: each[0],
        )
    return newest[1]


def placed_values(descriptor: int, meta: Meta) -> Iterator[PlacedValue]:
    """All values of the main tree in key order.

    Raises:
        CorruptTableError: a page is not what the tree above it says.
    """
    if meta.root is not None:
        yield from _below(descriptor, meta.root, slice(None), 0, set())


def last_value(descriptor: int, meta: Meta) -> PlacedValue | None:
    """The value of the largest key; errors as in `placed_values`."""
    if meta.root is None:
        return None
    return next(_below(descriptor, meta.root, slice(-1, None), 0, set()), None)


def _below(
    descriptor: int, number: int, nodes: slice, depth: int, seen: set[int]
) -> Iterator[PlacedValue]:
    # A page has one place in a tree; one that names itself would be walked without end.
    if number in seen:
        raise _not_in_tree(number)
    seen.add(number)
    page = _read(descriptor, number)
    found, _, flags, _, _ = _HEADER.unpack_from(page)
    if found != number or flags & (_BRANCH | _LEAF) not in (_BRANCH, _LEAF) or depth > _DEPTH_MAX:
        raise _not_in_tree(number)
    try:
        yield from _nodes(descriptor, number, page, nodes, depth, seen)
    except struct.error:  # An offset or a count that points outside the page.
        raise _not_in_tree(number) from None


def _not_in_tree(number: int) -> CorruptTableError:
    return CorruptTableError(f"page {number} is not part of LMDB's tree; import the table again")


def _nodes(
    descriptor: int, number: int, page: bytes, nodes: slice, depth: int, seen: set[int]
) -> Iterator[PlacedValue]:
    _, _, flags, lower, _ = _HEADER.unpack_from(page)
    count = (lower - PAGE_HEADER_BYTES) // 2
    for offset in struct.unpack_from(f"<{count}H", page, PAGE_HEADER_BYTES)[nodes]:
        low, high, node_flags, key_bytes = _NODE.unpack_from(page, offset)
        key_start = offset + _NODE.size
        if flags & _BRANCH:
            child = low | high << 16 | node_flags << 32
            yield from _below(descriptor, child, nodes, depth + 1, seen)
            continue
        key = page[key_start : key_start + key_bytes]
        length = low | high << 16
        if not node_flags & _BIG_DATA:
            yield PlacedValue(key, None, length, number * PAGE_BYTES + key_start + key_bytes)
            continue
        (first_page,) = _POINTER.unpack_from(page, key_start + key_bytes)
        start = first_page * PAGE_BYTES + PAGE_HEADER_BYTES
        value = PlacedValue(key, first_page, length, start)
        _check_header(descriptor, value)
        yield value


def _check_header(descriptor: int, value: PlacedValue) -> None:
    """The value's own pages must say that they are."""
    assert value.page is not None
    header = _OVERFLOW_HEADER.unpack(_read(descriptor, value.page, PAGE_HEADER_BYTES))
    if header != (value.page, 0, _OVERFLOW, value.pages):
        raise CorruptTableError(
            f"page {value.page} does not begin the value that LMDB's tree puts there; "
            "import the table again"
        )
