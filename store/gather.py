"""Compiled gather: rows from the data file into the caller's buffers, each verified on the way.

How a row travels: its bytes and its check are copied into scratch, verified there, and only then
copied out, so what is verified is what is handed over even if the file changes meanwhile.

Two ways to read it:

    piped    `preadv2(RWF_NOWAIT)`: rows in the page cache come at once; for the others it starts
             the read (`posix_fadvise(WILLNEED)` again, for kernels where it does not), and they
             are fetched once `DEPTH` reads are under way. One thread keeps the device busy.
    mapped   straight from the map, without a system call, for rows in the page cache. A missing
             page blocks, so groups of rows are timed: after a slow one the next rows are piped,
             until `CALM_ROWS` in sequence were found in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from engram._jit import copy_bytes, kernel, load_u32, store_u64
from engram.rows import Bytes, Rows
from engram.store.checks import row_check_twin, row_seed, xxh32
from engram.store.layout import BLOCK_BYTES, CHECK_BYTES, PAGE_BYTES, PAGE_HEADER_BYTES

DEPTH = 128
"""Reads under way at most, per gathering thread."""
CALM_ROWS = 64
"""Rows in sequence that must be found in the page cache before the map is used again."""
GROUP = 8
"""Rows whose memory is asked for together, and timed together."""
SLOW_GROUP_NS = 30_000
"""A group that takes longer has waited for the device; page faults alone stay below."""

OK, BAD_CHECK, SHORT_READ, IO_ERROR, REFUSED = range(5)
"""Fate of a row: fine, failed its check, beyond the file's end, failed to read, or in an extent
that is refused until the table is reopened."""

_ABSENT = 5
_EINTR, _EAGAIN = 4, 11
_RWF_NOWAIT = 8
_WILLNEED = 3
_CLOCK_MONOTONIC = 1

_i32, _i64 = types.int32, types.int64
_pread: Any = types.ExternalFunction("pread", _i64(_i32, _i64, _i64, _i64))
_preadv2: Any = types.ExternalFunction("preadv2", _i64(_i32, _i64, _i32, _i64, _i32))
_fadvise: Any = types.ExternalFunction("posix_fadvise", _i32(_i32, _i64, _i64, _i32))
_errno_location: Any = types.ExternalFunction("__errno_location", _i64())
_clock_gettime: Any = types.ExternalFunction("clock_gettime", _i32(_i32, _i64))


class Geometry(NamedTuple):
    """Where every row of a table lies.

    Attributes:
        value_bytes, row_bytes: of one row; its scales are the difference.
        rows_per_block, extent_blocks: see `BlockLayout`.
        table_seed: seed of the row checks.
        layers: int64 `[L, 3]`: model layer index, rows, number of its first extent.
        pages: int64 `[E]`: first page of each extent.
        refused: uint8 `[E]`: 1 for extents whose rows are refused.
    """

    value_bytes: int
    row_bytes: int
    rows_per_block: int
    extent_blocks: int
    table_seed: np.uint64
    layers: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int64]
    refused: npt.NDArray[np.uint8]


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask the processor for the line at `address`; harmless whatever the address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        )
        builder.call(function, [builder.inttoptr(args[0], byte), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@kernel
def find_outside(layers, row_ids, places, room, bounds):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Index of the first request that names a layer, row or place that does not exist, or -1."""
    for i in range(len(row_ids)):
        if layers[i] < 0 or layers[i] >= len(bounds):
            return i
        if row_ids[i] < 0 or row_ids[i] >= bounds[layers[i], 1]:
            return i
        if places[i] < 0 or places[i] >= room:
            return i
    return -1


@kernel
def locate(geometry, layer, row):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """(extent, file offset of the row, bytes from it to its check) of one row."""
    per_block = np.uint64(geometry.rows_per_block)
    block = np.uint64(row) // per_block
    slot = np.int64(np.uint64(row) - block * per_block)
    index = block // np.uint64(geometry.extent_blocks)
    within = np.int64(block - index * np.uint64(geometry.extent_blocks))
    extent = geometry.layers[layer, 2] + np.int64(index)
    start = (geometry.pages[extent] + within) * PAGE_BYTES + PAGE_HEADER_BYTES
    held = min(geometry.rows_per_block, geometry.layers[layer, 1] - (row - slot))
    return (
        extent,
        start + slot * geometry.row_bytes,
        (held - slot) * geometry.row_bytes + slot * CHECK_BYTES,
    )


@kernel
def _deliver(geometry, scratch, check, layer, row, place, values, scales):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Verify the row in scratch and copy it out; returns its fate."""
    seed = row_seed(geometry.table_seed, geometry.layers[layer, 0], row)
    if xxh32(scratch, geometry.row_bytes, seed) != load_u32(check):
        return BAD_CHECK
    value_bytes = geometry.value_bytes
    scale_bytes = geometry.row_bytes - value_bytes
    copy_bytes(values + place * value_bytes, scratch, value_bytes)
    if scale_bytes:
        copy_bytes(scales + place * scale_bytes, scratch + value_bytes, scale_bytes)
    return OK


@kernel
def _read(descriptor, vector, target, count, offset, wait):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Read `count` bytes into `target`: `OK`, `SHORT_READ`, `IO_ERROR`, or `_ABSENT` if they
    would have to be waited for."""
    got = np.int64(0)
    while got < count:
        if wait:
            piece = _pread(np.int32(descriptor), target + got, count - got, offset + got)
        else:
            store_u64(vector, np.uint64(target))
            store_u64(vector + 8, np.uint64(count))
            piece = _preadv2(np.int32(descriptor), vector, np.int32(1), offset, _RWF_NOWAIT)
            # A part, the end of the file, an error or a file system that knows no NOWAIT: the
            # waiting read will tell.
            return OK if piece == count else _ABSENT
        if piece < 0 and load_u32(_errno_location()) != _EINTR:
            return IO_ERROR
        if piece == 0:
            return SHORT_READ
        got += max(piece, 0)
    return OK


@kernel
def _read_row(geometry, descriptor, scratch, request, i, out, wait):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    layers, row_ids, places = request
    values, scales = out
    extent, offset, check = locate(geometry, layers[i], row_ids[i])
    if geometry.refused[extent]:
        return REFUSED
    fate = _read(descriptor, scratch + BLOCK_BYTES + 8, scratch, check + CHECK_BYTES, offset, wait)
    if fate == _ABSENT:
        _fadvise(np.int32(descriptor), offset, check + CHECK_BYTES, np.int32(_WILLNEED))
    if fate != OK:
        return fate
    return _deliver(
        geometry, scratch, scratch + check, layers[i], row_ids[i], places[i], values, scales
    )


@kernel
def _pipe(geometry, descriptor, scratch, request, out, fates, pending, i, calm, calm_enough):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Read rows from `i` on, `DEPTH` at once, until `calm_enough` in sequence were cached.

    Returns the next row to read and the length of the last sequence.
    """
    head = tail = 0
    while i < len(fates) and calm < calm_enough:
        fates[i] = _read_row(geometry, descriptor, scratch, request, i, out, False)
        calm += 1
        if fates[i] == _ABSENT:
            calm = 0
            if tail - head == DEPTH:
                late = pending[head % DEPTH]
                fates[late] = _read_row(geometry, descriptor, scratch, request, late, out, True)
                head += 1
            pending[tail % DEPTH] = i
            tail += 1
        i += 1
    while head < tail:
        late = pending[head % DEPTH]
        fates[late] = _read_row(geometry, descriptor, scratch, request, late, out, True)
        head += 1
    return i, calm


@kernel
def _now_ns(clock):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    _clock_gettime(_CLOCK_MONOTONIC, np.int64(clock.ctypes.data))
    return clock[0] * 1_000_000_000 + clock[1]


@kernel
def _copy_group(geometry, base, scratch, request, out, fates, places_of, first, last):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    layers, row_ids, places = request
    values, scales = out
    for i in range(first, last):
        extent, offset, check = locate(geometry, layers[i], row_ids[i])
        source = base + offset
        places_of[i - first, 0] = extent
        places_of[i - first, 1] = source
        places_of[i - first, 2] = check
        for line in range(0, geometry.row_bytes, 64):
            _prefetch(source + line)
        _prefetch(source + check)
    for i in range(first, last):
        if geometry.refused[places_of[i - first, 0]]:
            fates[i] = REFUSED
            continue
        source, check = places_of[i - first, 1], places_of[i - first, 2]
        copy_bytes(scratch, source, geometry.row_bytes)
        copy_bytes(scratch + BLOCK_BYTES, source + check, CHECK_BYTES)
        fates[i] = _deliver(
            geometry,
            scratch,
            scratch + BLOCK_BYTES,
            layers[i],
            row_ids[i],
            places[i],
            values,
            scales,
        )


@kernel
def _copy(geometry, base, scratch, request, out, fates, i):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Copy rows from `i` on through the map until a group was slow.

    Returns the next row to read and whether the last group was slow.
    """
    clock = np.empty(2, np.int64)
    places_of = np.empty((GROUP, 3), np.int64)
    before = _now_ns(clock)
    while i < len(fates):
        last = min(i + GROUP, len(fates))
        _copy_group(geometry, base, scratch, request, out, fates, places_of, i, last)
        i = last
        after = _now_ns(clock)
        if after - before > SLOW_GROUP_NS:
            return i, True
        before = after
    return i, False


@kernel
def gather(  # type: ignore[no-untyped-def]  # noqa: ANN201
    value_bytes,  # noqa: ANN001
    row_bytes,  # noqa: ANN001
    rows_per_block,  # noqa: ANN001
    extent_blocks,  # noqa: ANN001
    table_seed,  # noqa: ANN001
    bounds,  # noqa: ANN001
    pages,  # noqa: ANN001
    refused,  # noqa: ANN001
    descriptor,  # noqa: ANN001
    base,  # noqa: ANN001
    calm,  # noqa: ANN001
    layers,  # noqa: ANN001
    row_ids,  # noqa: ANN001
    places,  # noqa: ANN001
    values,  # noqa: ANN001
    scales,  # noqa: ANN001
    fates,  # noqa: ANN001
):
    """Gather rows; arguments are valid (see `StoreReader.gather`).

    Args:
        value_bytes .. refused: the fields of `Geometry`, in order.
        descriptor: of the data file.
        base: address of its map, or 0 to read without it.
        calm: what the last call returned, 0 at first.
        layers, row_ids, places: int32, int64, int64 `[R]`.
        values, scales: uint8 `[R', bytes]`, where rows go.
        fates: uint8 `[R]`, set for every row.

    Returns:
        Rows in sequence, at most about `CALM_ROWS`, that were found in the page cache.
    """
    geometry = Geometry(
        value_bytes, row_bytes, rows_per_block, extent_blocks, table_seed, bounds, pages, refused
    )
    room = np.empty(PAGE_BYTES + 64, np.uint8)
    scratch = np.int64(room.ctypes.data)
    pending = np.empty(DEPTH, np.int64)
    request = (layers, row_ids, places)
    out = (np.int64(values.ctypes.data), np.int64(scales.ctypes.data))
    i = 0
    while i < len(fates):
        if base == 0:
            i, calm = _pipe(
                geometry, descriptor, scratch, request, out, fates, pending, i, 0, len(fates) + 1
            )
        elif calm < CALM_ROWS:
            i, calm = _pipe(
                geometry, descriptor, scratch, request, out, fates, pending, i, calm, CALM_ROWS
            )
        else:
            i, slow = _copy(geometry, base, scratch, request, out, fates, i)
            if slow:
                calm = 0
    return calm


@kernel
def touch(  # type: ignore[no-untyped-def]  # noqa: ANN201
    value_bytes,  # noqa: ANN001
    row_bytes,  # noqa: ANN001
    rows_per_block,  # noqa: ANN001
    extent_blocks,  # noqa: ANN001
    table_seed,  # noqa: ANN001
    bounds,  # noqa: ANN001
    pages,  # noqa: ANN001
    refused,  # noqa: ANN001
    descriptor,  # noqa: ANN001
    layers,  # noqa: ANN001
    row_ids,  # noqa: ANN001
):
    """Start reading the blocks of these rows into the page cache; waits only for queue space."""
    geometry = Geometry(
        value_bytes, row_bytes, rows_per_block, extent_blocks, table_seed, bounds, pages, refused
    )
    for i in range(len(row_ids)):
        _, offset, check = locate(geometry, layers[i], row_ids[i])
        _fadvise(np.int32(descriptor), offset, check + CHECK_BYTES, np.int32(_WILLNEED))


def gather_twin(
    geometry: Geometry,
    file: Bytes,
    layers: npt.NDArray[np.int32],
    row_ids: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    out: Rows,
) -> Bytes:
    """`gather` in plain Python over the file's bytes; returns the fates: its oracle."""
    fates = np.zeros(len(row_ids), np.uint8)
    for i, (layer, row, place) in enumerate(zip(layers, row_ids, places, strict=True)):
        model_layer, rows, first_extent = (int(number) for number in geometry.layers[layer])
        block, slot = divmod(int(row), geometry.rows_per_block)
        extent, within = divmod(block, geometry.extent_blocks)
        held = min(geometry.rows_per_block, rows - block * geometry.rows_per_block)
        start = (int(geometry.pages[first_extent + extent]) + within) * PAGE_BYTES
        page = file[start + PAGE_HEADER_BYTES : start + PAGE_BYTES].tobytes()
        data = page[slot * geometry.row_bytes : (slot + 1) * geometry.row_bytes]
        found = page[held * geometry.row_bytes + slot * CHECK_BYTES :][:CHECK_BYTES]
        wanted = row_check_twin(data, int(geometry.table_seed), model_layer, int(row))
        if geometry.refused[first_extent + extent]:
            fates[i] = REFUSED
        elif len(found) < CHECK_BYTES:
            fates[i] = SHORT_READ
        elif int.from_bytes(found, "little") != wanted:
            fates[i] = BAD_CHECK
        else:
            row_bytes = np.frombuffer(data, np.uint8)
            out.values[place] = row_bytes[: geometry.value_bytes]
            if out.scales is not None:
                out.scales[place] = row_bytes[geometry.value_bytes :]
    return fates
