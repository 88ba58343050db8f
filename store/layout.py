"""Where a row lies: blocks of one page each, extents of many blocks.

An LMDB overflow value starts at byte 16 of a page and lies whole in the file. Block k of an
extent starts at value byte 4096*k, which is page byte 16, and uses 4,080 bytes:

    row 0 | row 1 | ... | row n-1 | check 0 | ... | check n-1 | zeros        n = 4080 // (row + 4)

so a row and its check never straddle a page: one cold row is one 4 KiB read. The value ends with
its last block, 16 bytes before the end of a page, so an extent takes exactly as many pages as it
has blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.errors import StoreError

PAGE_BYTES = 4096
PAGE_HEADER_BYTES = 16
BLOCK_BYTES = PAGE_BYTES - PAGE_HEADER_BYTES
CHECK_BYTES = 4
EXTENT_BLOCKS = 7168
"""Blocks of a full extent: 28 MiB. LMDB allocates an extent's pages in one piece while it writes
them, and glibc keeps pieces of less than 32 MiB for the next one; larger ones are returned to the
system and zeroed anew each time, which doubles the cost of writing."""


@dataclass(frozen=True)
class BlockLayout:
    """Geometry of a table's blocks.

    Args:
        row_bytes: bytes of one row, 1..4,076.
        extent_blocks: blocks of every extent of a layer but the last.

    Raises:
        StoreError: a row that does not fit a block.
    """

    row_bytes: int
    extent_blocks: int = EXTENT_BLOCKS

    def __post_init__(self) -> None:
        if not 1 <= self.row_bytes <= BLOCK_BYTES - CHECK_BYTES:
            raise StoreError(
                f"rows of {self.row_bytes} bytes cannot be stored; "
                f"a row has 1 to {BLOCK_BYTES - CHECK_BYTES} bytes"
            )

    @property
    def rows_per_block(self) -> int:
        return BLOCK_BYTES // (self.row_bytes + CHECK_BYTES)

    @property
    def rows_per_extent(self) -> int:
        return self.rows_per_block * self.extent_blocks

    def extents(self, rows: int) -> int:
        """Number of extents that hold `rows` rows."""
        return -(-rows // self.rows_per_extent)

    def blocks(self, rows: int) -> int:
        """Number of blocks that hold `rows` rows of one extent."""
        return -(-rows // self.rows_per_block)

    def value_bytes(self, rows: int) -> int:
        """Length of the LMDB value of an extent of `rows` rows."""
        return self.blocks(rows) * PAGE_BYTES - PAGE_HEADER_BYTES

    def file_bytes(self, rows_per_layer: list[int]) -> int:
        """Upper bound of the data file's size for layers of these many rows."""
        blocks = sum(self.blocks(rows) for rows in rows_per_layer)
        extents = sum(self.extents(rows) for rows in rows_per_layer)
        return (blocks + extents // 16 + 1024) * PAGE_BYTES
