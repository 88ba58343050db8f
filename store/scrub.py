"""Reading one extent again, block by block, without leaving a trace in the page cache."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from engram.rows import Bytes
from engram.store.checks import row_check_twin
from engram.store.layout import CHECK_BYTES, PAGE_BYTES, PAGE_HEADER_BYTES, BlockLayout
from engram.store.manifest import Extent
from engram.store.pack import ALL_SOUND, unpack_rows

PIECE_BLOCKS = 256
"""Blocks read at once."""
_ZEROS = bytes(PAGE_HEADER_BYTES)
_HEADER = struct.Struct("<QHHI")
_OVERFLOW = 0x04


@dataclass(frozen=True)
class Damage:
    """One damaged place of a table.

    Attributes:
        kind: "row check" (rows whose check fails), "slack" (bytes of a block that must be zero
            are not), "header" (LMDB's header of the extent's first page), "missing" (the file
            ends before), "io" (the device reports an error), "extent digest" (all checks hold,
            yet it is not the extent that was written); or of the table: "manifest", "file",
            "structure", "token map".
        layer: model layer index.
        extent: number of the extent in the manifest.
        block: number of the block in its extent.
        page: page of the data file.
        first_row, last_row: rows that the block (or extent) holds.
        rows: those of them that cannot be read intact.
        message: what is wrong, where that is not a block.
    """

    kind: str
    layer: int | None = None
    extent: int | None = None
    block: int | None = None
    page: int | None = None
    first_row: int | None = None
    last_row: int | None = None
    rows: tuple[int, ...] = ()
    message: str = ""

    def __str__(self) -> str:
        if self.layer is None:
            return f"{self.kind}: {self.message}"
        where = f"layer {self.layer}, extent {self.extent}"
        if self.block is not None:
            where += f", block {self.block}, page {self.page}"
        where += f", rows {self.first_row} to {self.last_row}"
        damaged = f"; damaged: {', '.join(str(row) for row in self.rows)}" if self.rows else ""
        return f"{self.kind}: {where}{damaged}"


def _header(page: int, pages: int) -> bytes:
    """LMDB's header of a value of so many pages: number, padding, kind, count."""
    return _HEADER.pack(page, 0, _OVERFLOW, pages)


class ExtentScrub:
    """Reads extents of one table; each thread has its own.

    Args:
        descriptor: of the data file.
        layout: the table's.
        table_seed: seed of its row checks.
    """

    def __init__(self, descriptor: int, layout: BlockLayout, table_seed: int) -> None:
        self._descriptor = descriptor
        self._layout = layout
        self._seed = table_seed
        self._pages = np.empty(PIECE_BLOCKS * PAGE_BYTES, np.uint8)
        self._rows = np.empty((PIECE_BLOCKS * layout.rows_per_block, layout.row_bytes), np.uint8)

    def run(self, number: int, extent: Extent, first_page: int) -> list[Damage]:
        """Everything that is damaged in extent `number`, which begins at `first_page`."""
        layout = self._layout
        state = xxhash.xxh3_128((extent.rows * layout.row_bytes).to_bytes(8, "little"))
        blocks = layout.blocks(extent.rows)
        found: list[Damage] = []
        for first in range(0, blocks, PIECE_BLOCKS):
            count = min(PIECE_BLOCKS, blocks - first)
            rows = self._rows[: min(len(self._rows), extent.rows - first * layout.rows_per_block)]
            pages = self._pages[: count * PAGE_BYTES]
            if self._is_sound(pages, rows, extent, first_page, first):
                state.update(rows.data)
            else:
                for block in range(first, first + count):
                    found += self._examine(number, extent, first_page, block)
        if not found and state.hexdigest() != extent.digest:
            last = extent.first_row + extent.rows - 1
            found.append(
                Damage("extent digest", extent.layer, number, None, None, extent.first_row, last)
            )
        return found

    def _is_sound(
        self, pages: Bytes, rows: Bytes, extent: Extent, first_page: int, first: int
    ) -> bool:
        """Read a piece and unpack its rows; whether every byte of it is as it should be."""
        layout = self._layout
        if not self._read(pages, (first_page + first) * PAGE_BYTES):
            return False
        begin = _header(first_page, layout.blocks(extent.rows)) if first == 0 else _ZEROS
        if pages[:PAGE_HEADER_BYTES].tobytes() != begin:
            return False
        first_row = extent.first_row + first * layout.rows_per_block
        span = pages[PAGE_HEADER_BYTES:]
        return unpack_rows(span, layout, self._seed, extent.layer, first_row, rows) == ALL_SOUND

    def _read(self, pages: Bytes, position: int) -> bool:
        """Fill `pages`; False at the file's end or after an error.

        What was in the page cache stays there, what was not leaves it again: a scrub must not
        push out the rows that a server needs.
        """
        view = pages.data
        try:
            got = os.preadv(self._descriptor, [view], position, os.RWF_NOWAIT)
            known = True
        except BlockingIOError:
            got, known = 0, True
        except OSError:
            got, known = 0, False
        absent = position + got
        while got < len(view):
            try:
                count = os.preadv(self._descriptor, [view[got:]], position + got)
            except OSError:
                return False
            if not count:
                return False
            got += count
        if known and absent < position + got:
            os.posix_fadvise(
                self._descriptor, absent, position + got - absent, os.POSIX_FADV_DONTNEED
            )
        return True

    def _examine(self, number: int, extent: Extent, first_page: int, block: int) -> list[Damage]:
        """What is damaged in one block, found without the kernels."""
        layout = self._layout
        per_block, row_bytes = layout.rows_per_block, layout.row_bytes
        held = min(per_block, extent.rows - block * per_block)
        first_row = extent.first_row + block * per_block
        rows = range(first_row, first_row + held)
        place = (extent.layer, number, block, first_page + block, rows[0], rows[-1])
        try:
            page = os.pread(self._descriptor, PAGE_BYTES, (first_page + block) * PAGE_BYTES)
        except OSError:
            return [Damage("io", *place, tuple(rows))]
        data = page[PAGE_HEADER_BYTES:]
        checks = data[held * row_bytes :]
        damaged = tuple(
            row
            for i, row in enumerate(rows)
            if row_check_twin(
                data[i * row_bytes : (i + 1) * row_bytes], self._seed, extent.layer, row
            ).to_bytes(CHECK_BYTES, "little")
            != checks[i * CHECK_BYTES : (i + 1) * CHECK_BYTES]
        )
        if len(page) < PAGE_BYTES:
            return [Damage("missing", *place, damaged)]
        found = [Damage("row check", *place, damaged)] if damaged else []
        header = page[:PAGE_HEADER_BYTES]
        if block == 0 and header != _header(first_page, layout.blocks(extent.rows)):
            found.append(Damage("header", *place))
        if (block > 0 and any(header)) or any(checks[held * CHECK_BYTES :]):
            found.append(Damage("slack", *place))
        return found
