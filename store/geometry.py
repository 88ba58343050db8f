"""Which extent, which block, which byte: the place of every row of a table in its data file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engram._jit import kernel, load_u64
from engram.rows import Bytes, Rows
from engram.store.checks import row_check_twin
from engram.store.layout import CHECK_BYTES, PAGE_BYTES, PAGE_HEADER_BYTES
from engram.store.manifest import Manifest, Physical

OK, BAD_CHECK, SHORT_READ, IO_ERROR, REFUSED = range(5)
"""Fate of a row: fine, failed its check, beyond the file's end, failed to read, or in an extent
that is refused until the table is reopened."""


class Table(NamedTuple):
    """A `Geometry` inside kernels: numbers and addresses only, since arrays in a tuple cost
    reference counts at every call."""

    value_bytes: int
    row_bytes: int
    rows_per_block: int
    extent_blocks: int
    table_seed: int
    layer_count: int
    layers: int
    pages: int
    refused: int


@dataclass(frozen=True)
class Geometry:
    """Where the rows of a table lie.

    Attributes:
        value_bytes, row_bytes: of one row; its scales are the difference.
        rows_per_block, extent_blocks: see `BlockLayout`.
        table_seed: seed of the row checks.
        layers: int64 `[L, 3]`: model layer index, rows, number of its first extent.
        pages: int64 `[E]`: first page of each extent.
        refused: uint8 `[E]`: 1 for extents whose rows are refused; the only part that changes.
    """

    value_bytes: int
    row_bytes: int
    rows_per_block: int
    extent_blocks: int
    table_seed: int
    layers: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int64]
    refused: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, manifest: Manifest, physical: Physical) -> Geometry:
        layout = manifest.layout
        layers, extents = [], 0
        for layer, rows in manifest.layers:
            layers.append((layer, rows, extents))
            extents += layout.extents(rows)
        return cls(
            manifest.row_format.value_bytes,
            layout.row_bytes,
            layout.rows_per_block,
            layout.extent_blocks,
            manifest.table_seed,
            np.array(layers, np.int64).reshape(-1, 3),
            np.array(physical.extent_pages, np.int64),
            np.zeros(extents, np.uint8),
        )

    @cached_property
    def packed(self) -> npt.NDArray[np.int64]:
        """int64 `[9]`, the fields of `Table`; valid while this object lives."""
        table = Table(
            self.value_bytes,
            self.row_bytes,
            self.rows_per_block,
            self.extent_blocks,
            int(np.uint64(self.table_seed).astype(np.int64)),
            len(self.layers),
            self.layers.ctypes.data,
            self.pages.ctypes.data,
            self.refused.ctypes.data,
        )
        return np.array(table, np.int64)


@kernel
def unpack(packed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The `Table` of `Geometry.packed`."""
    return Table(
        packed[0],
        packed[1],
        packed[2],
        packed[3],
        packed[4],
        packed[5],
        packed[6],
        packed[7],
        packed[8],
    )


@kernel
def load_int64(address, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Element of the int64 array at `address`."""
    return np.int64(load_u64(address + index * 8))


@kernel
def rows_of(table, layer):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Number of rows of a layer (by position)."""
    return load_int64(table.layers, 3 * layer + 1)


@kernel
def locate(table, layer, row):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """(extent, file offset of the row, bytes from there to its check)."""
    # Unsigned: a signed division would also have to look after negative numbers.
    per_block, extent_blocks = np.uint64(table.rows_per_block), np.uint64(table.extent_blocks)
    block = np.uint64(row) // per_block
    slot = np.int64(np.uint64(row) - block * per_block)
    index = block // extent_blocks
    extent = load_int64(table.layers, 3 * layer + 2) + np.int64(index)
    page = load_int64(table.pages, extent) + np.int64(block - index * extent_blocks)
    held = min(table.rows_per_block, rows_of(table, layer) - (row - slot))
    return (
        extent,
        page * PAGE_BYTES + PAGE_HEADER_BYTES + slot * table.row_bytes,
        (held - slot) * table.row_bytes + slot * CHECK_BYTES,
    )


def gather_twin(
    geometry: Geometry,
    file: Bytes,
    layers: npt.NDArray[np.int32],
    row_ids: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    out: Rows,
) -> Bytes:
    """`gather` in plain Python over the bytes of the file; returns the fates: its oracle."""
    fates = np.zeros(len(row_ids), np.uint8)
    for i, (layer, row, place) in enumerate(zip(layers, row_ids, places, strict=True)):
        model_layer, rows, first_extent = (int(number) for number in geometry.layers[layer])
        block, slot = divmod(int(row), geometry.rows_per_block)
        index, within = divmod(block, geometry.extent_blocks)
        extent = first_extent + index
        held = min(geometry.rows_per_block, rows - block * geometry.rows_per_block)
        start = (int(geometry.pages[extent]) + within) * PAGE_BYTES
        page = file[start + PAGE_HEADER_BYTES : start + PAGE_BYTES].tobytes()
        data = page[slot * geometry.row_bytes : (slot + 1) * geometry.row_bytes]
        check = page[held * geometry.row_bytes + slot * CHECK_BYTES :][:CHECK_BYTES]
        wanted = row_check_twin(data, geometry.table_seed, model_layer, int(row))
        if geometry.refused[extent]:
            fates[i] = REFUSED
        elif len(check) < CHECK_BYTES:
            fates[i] = SHORT_READ
        elif int.from_bytes(check, "little") != wanted:
            fates[i] = BAD_CHECK
        else:
            row_bytes = np.frombuffer(data, np.uint8)
            out.values[place] = row_bytes[: geometry.value_bytes]
            if out.scales is not None:
                out.scales[place] = row_bytes[geometry.value_bytes :]
    return fates
