"""Rows into blocks and back: a block's rows, then their checks, then zeros.

A *span* is a run of whole blocks of one extent, 4,096 bytes apart; only its last block may hold
fewer rows. The 16 bytes between two blocks are zero: in the file they are the first bytes of a
page, and a span that ends the extent ends before them.
"""

from __future__ import annotations

import numpy as np

from engram._jit import copy_bytes, kernel, load_u8, load_u32, store_u8, store_u32
from engram.errors import StoreError
from engram.rows import Bytes
from engram.store.checks import row_check_twin, row_seed, xxh32
from engram.store.layout import CHECK_BYTES, PAGE_BYTES, BlockLayout

ALL_SOUND = -1
"""What `unpack_rows` returns when every check and every slack byte is right."""


@kernel
def _zero(address, end):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    while address < end:
        store_u8(address, np.uint8(0))
        address += 1


@kernel
def _pack(source, rows, row_bytes, per_block, seed, layer, first_row, target, target_end):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = 0
    while row < rows:
        here = min(per_block, rows - row)
        copy_bytes(target, source, here * row_bytes)
        check = target + here * row_bytes
        for i in range(here):
            row_check = xxh32(
                source + i * row_bytes, row_bytes, row_seed(seed, layer, first_row + row + i)
            )
            store_u32(check, row_check)
            check += CHECK_BYTES
        _zero(check, min(target + PAGE_BYTES, target_end))
        source += here * row_bytes
        target += PAGE_BYTES
        row += here


@kernel
def _unpack(source, source_end, rows, row_bytes, per_block, seed, layer, first_row, target):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = 0
    while row < rows:
        here = min(per_block, rows - row)
        check = source + here * row_bytes
        for i in range(here):
            row_check = xxh32(
                source + i * row_bytes, row_bytes, row_seed(seed, layer, first_row + row + i)
            )
            if row_check != load_u32(check):
                return row + i
            check += CHECK_BYTES
        slack_end = min(source + PAGE_BYTES, source_end)
        while check < slack_end:
            if load_u8(check) != 0:
                return row
            check += 1
        copy_bytes(target, source, here * row_bytes)
        source += PAGE_BYTES
        target += here * row_bytes
        row += here
    return ALL_SOUND


@kernel
def _join(values, value_bytes, scales, scale_bytes, rows, target):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for row in range(rows):
        copy_bytes(target, values + row * value_bytes, value_bytes)
        copy_bytes(target + value_bytes, scales + row * scale_bytes, scale_bytes)
        target += value_bytes + scale_bytes


def span_bytes(layout: BlockLayout, rows: int) -> int:
    """Bytes of the span of `rows` rows up to the end of its last block's page."""
    return layout.blocks(rows) * PAGE_BYTES


def _check_buffers(layout: BlockLayout, rows: Bytes, span: Bytes) -> None:
    for name, array in (("rows", rows), ("span", span)):
        if array.dtype != np.uint8 or not array.flags.c_contiguous:
            raise StoreError(f"{name} must be C-contiguous uint8, not {array.dtype}")
    whole = span_bytes(layout, len(rows))
    if rows.ndim != 2 or rows.shape[1] != layout.row_bytes:
        raise StoreError(f"rows must be [n, {layout.row_bytes}], not {list(rows.shape)}")
    if span.ndim != 1 or span.size not in (whole, layout.value_bytes(len(rows))):
        raise StoreError(f"a span of {len(rows)} rows has {whole} bytes, not {list(span.shape)}")


def pack_rows(
    rows: Bytes, layout: BlockLayout, seed: int, layer: int, first_row: int, span: Bytes
) -> None:
    """Write rows, checks and zeros into `span`.

    Args:
        rows: uint8 `[n, row_bytes]`.
        seed: the table's seed.
        layer: model layer index.
        first_row: row id of `rows[0]`.
        span: uint8 `[span_bytes]`, or 16 bytes less where the span ends an extent.

    Raises:
        StoreError: buffers that do not fit each other.
    """
    _check_buffers(layout, rows, span)
    start = span.ctypes.data
    _pack(
        rows.ctypes.data,
        len(rows),
        layout.row_bytes,
        layout.rows_per_block,
        np.uint64(seed),
        layer,
        first_row,
        start,
        start + span.size,
    )


def unpack_rows(
    span: Bytes, layout: BlockLayout, seed: int, layer: int, first_row: int, rows: Bytes
) -> int:
    """Verify a span and copy its rows out; arguments as in `pack_rows`.

    Returns:
        `ALL_SOUND`, or the index in `rows` of the first row whose check failed or, where only
        the zeros behind the checks are wrong, of the first row of that block.

    Raises:
        StoreError: buffers that do not fit each other.
    """
    _check_buffers(layout, rows, span)
    start = span.ctypes.data
    return int(
        _unpack(
            start,
            start + span.size,
            len(rows),
            layout.row_bytes,
            layout.rows_per_block,
            np.uint64(seed),
            layer,
            first_row,
            rows.ctypes.data,
        )
    )


def join_rows(values: Bytes, scales: Bytes, rows: Bytes) -> None:
    """Put each row's values and scales side by side.

    Args:
        values: uint8 `[n, value_bytes]`.
        scales: uint8 `[n, scale_bytes]`.
        rows: uint8 `[n, value_bytes + scale_bytes]`, overwritten.

    Raises:
        StoreError: arrays that do not fit each other.
    """
    shapes = [array.shape for array in (values, scales, rows)]
    widths = [shape[-1] for shape in shapes]
    if {shape[:-1] for shape in shapes} != {(len(rows),)} or widths[0] + widths[1] != widths[2]:
        raise StoreError(f"values, scales and rows of shapes {shapes} do not fit each other")
    for array in (values, scales, rows):
        if array.dtype != np.uint8 or not array.flags.c_contiguous:
            raise StoreError("values, scales and rows must be C-contiguous uint8")
    _join(values.ctypes.data, widths[0], scales.ctypes.data, widths[1], len(rows), rows.ctypes.data)


def pack_rows_twin(
    rows: Bytes, layout: BlockLayout, seed: int, layer: int, first_row: int
) -> Bytes:
    """`pack_rows` in NumPy, without the last 16 bytes: its oracle."""
    count = len(rows)
    per_block, blocks = layout.rows_per_block, layout.blocks(count)
    pages = np.zeros((blocks, PAGE_BYTES), np.uint8)
    for block in range(blocks):
        here = rows[block * per_block : (block + 1) * per_block]
        checks = [
            row_check_twin(row.tobytes(), seed, layer, first_row + block * per_block + i)
            for i, row in enumerate(here)
        ]
        packed = here.tobytes() + np.array(checks, "<u4").tobytes()
        pages[block, : len(packed)] = np.frombuffer(packed, np.uint8)
    return pages.reshape(-1)[: layout.value_bytes(count)]
