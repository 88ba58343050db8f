"""Compiled gather: rows from the data file into the caller's buffers, each verified on the way.

How a row travels: its bytes and its check are copied into scratch, verified there, and only then
copied out, so what is verified is what is handed over even if the file changes meanwhile.

Two ways to read it:

    piped    `preadv2(RWF_NOWAIT)`: rows in the page cache come at once; for the others it starts
             the read (`posix_fadvise(WILLNEED)` again, for kernels where it does not), and they
             are fetched once `DEPTH` reads are under way. One thread keeps the device busy.
    mapped   straight from the map, without a system call, for rows in the page cache. A missing
             page blocks, so rows are timed: after slow ones the next rows are piped,
             until `CALM_ROWS` in sequence were found in the cache.
"""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from engram._jit import copy_bytes, kernel, load_u8, load_u32, prefetch, store_u8, store_u64
from engram.store.checks import row_seed, xxh32
from engram.store.geometry import (
    BAD_CHECK,
    IO_ERROR,
    OK,
    REFUSED,
    SHORT_READ,
    load_int64,
    locate,
    rows_of,
    unpack,
)
from engram.store.layout import BLOCK_BYTES, CHECK_BYTES

DEPTH = 128
"""Reads under way at most, per gathering thread."""
CALM_ROWS = 64
"""Rows in sequence that must be found in the page cache before the map is used again."""
GROUP = 16
"""Rows of the map whose memory is asked for together."""
TIMED_ROWS = 8
"""Rows of the map that are timed together."""
SLOW_NS = 50_000
"""If they take longer they have waited for the device; page faults alone stay below."""
GUARD_LOST = -(1 << 62)
"""Result of `gather` if the SIGBUS guard was replaced: nothing was done."""

_ABSENT = 5
_CACHED, _WAITING = np.int64(0), np.int64(1)
_EINTR = 4
_RWF_NOWAIT = 8
_WILLNEED = 3
_SIGBUS = int(signal.SIGBUS)
_CLOCK_MONOTONIC = 1

# The kernel's own memory, on its stack: a row, its check, two words for the system, the group's
# rows, and the reads under way.
_CHECK = BLOCK_BYTES
_WORDS = BLOCK_BYTES + 16
_GROUP = _WORDS + 16
_PENDING = _GROUP + GROUP * 24
_SCRATCH_BYTES = _PENDING + DEPTH * 8

_i32, _i64 = types.int32, types.int64
_pread: Any = types.ExternalFunction("pread", _i64(_i32, _i64, _i64, _i64))
_preadv2: Any = types.ExternalFunction("preadv2", _i64(_i32, _i64, _i32, _i64, _i32))
_fadvise: Any = types.ExternalFunction("posix_fadvise", _i32(_i32, _i64, _i64, _i32))
_errno_location: Any = types.ExternalFunction("__errno_location", _i64())
_sigaction: Any = types.ExternalFunction("sigaction", _i32(_i32, _i64, _i64))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", _i32(_i32, _i64))


class _Request(NamedTuple):
    """Addresses of the arrays of a request, and its length."""

    layers: Any
    row_ids: Any
    places: Any
    values: Any
    scales: Any
    fates: Any
    rows: Any


class _Source(NamedTuple):
    """Descriptor of the file, address of its map or 0, address of the scratch memory."""

    descriptor: Any
    base: Any
    scratch: Any


@intrinsic
def _stack_scratch(typingctx: Any) -> Any:
    """Address of `_SCRATCH_BYTES` on the stack of the kernel that calls this."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), _SCRATCH_BYTES // 8))
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(), codegen


@kernel
def _layer(request, i):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return np.int64(np.int32(load_u32(request.layers + i * 4)))


@kernel
def _set_fate(request, i, fate):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    store_u8(request.fates + i, np.uint8(fate))


@kernel
def _find_outside(table, request, room):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Index of the first request for a layer, row or place that does not exist, or -1."""
    for i in range(request.rows):
        layer, row = _layer(request, i), load_int64(request.row_ids, i)
        if layer < 0 or layer >= table.layer_count:
            return i
        if row < 0 or row >= rows_of(table, layer):
            return i
        if request.places and not 0 <= load_int64(request.places, i) < room:
            return i
    return -1


@kernel
def _deliver(table, request, i, row_bytes, check):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Verify the row at address `row_bytes` and copy it out; returns its fate."""
    model_layer = load_int64(table.layers, 3 * _layer(request, i))
    seed = row_seed(table.table_seed, model_layer, load_int64(request.row_ids, i))
    if xxh32(row_bytes, table.row_bytes, seed) != load_u32(check):
        return BAD_CHECK
    place = load_int64(request.places, i)
    value_bytes = table.value_bytes
    scale_bytes = table.row_bytes - value_bytes
    copy_bytes(request.values + place * value_bytes, row_bytes, value_bytes)
    if scale_bytes:
        copy_bytes(request.scales + place * scale_bytes, row_bytes + value_bytes, scale_bytes)
    return OK


@kernel
def _read_cached(source, count, offset):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Read into scratch what is in the page cache; `_ABSENT` if not all is, or to be safe."""
    words = source.scratch + _WORDS
    store_u64(words, np.uint64(source.scratch))
    store_u64(words + 8, np.uint64(count))
    got = _preadv2(np.int32(source.descriptor), words, np.int32(1), offset, np.int32(_RWF_NOWAIT))
    # Less may be a hole in the cache, the file's end, an error, or a file system that knows no
    # RWF_NOWAIT: the read that waits will tell.
    return OK if got == count else _ABSENT


@kernel
def _read_waiting(source, count, offset):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    got = np.int64(0)
    while got < count:
        piece = _pread(np.int32(source.descriptor), source.scratch + got, count - got, offset + got)
        if piece == 0:
            return SHORT_READ
        if piece > 0:
            got += piece
        elif load_u32(_errno_location()) != _EINTR:
            return IO_ERROR
    return OK


@kernel
def _read_row(table, source, request, i, way):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    extent, offset, check = locate(table, _layer(request, i), load_int64(request.row_ids, i))
    if load_u8(table.refused + extent):
        return REFUSED
    count = check + CHECK_BYTES
    if way == _WAITING:
        fate = _read_waiting(source, count, offset)
    else:
        fate = _read_cached(source, count, offset)
        if fate == _ABSENT:
            _fadvise(np.int32(source.descriptor), offset, count, np.int32(_WILLNEED))
    if fate != OK:
        return fate
    return _deliver(table, request, i, source.scratch, source.scratch + check)


@kernel
def _pipe(table, source, request, i, calm, calm_enough):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Read rows from `i` on, `DEPTH` at once, until `calm_enough` in sequence were cached.

    Returns the next row to read and the length of the last sequence.
    """
    pending = source.scratch + _PENDING
    head = tail = 0
    while i < request.rows and calm < calm_enough:
        fate = _read_row(table, source, request, i, _CACHED)
        calm += 1
        if fate != _ABSENT:
            _set_fate(request, i, fate)
        else:
            calm = 0
            if tail - head == DEPTH:
                late = load_int64(pending, head % DEPTH)
                _set_fate(request, late, _read_row(table, source, request, late, _WAITING))
                head += 1
            store_u64(pending + (tail % DEPTH) * 8, np.uint64(i))
            tail += 1
        i += 1
    while head < tail:
        late = load_int64(pending, head % DEPTH)
        _set_fate(request, late, _read_row(table, source, request, late, _WAITING))
        head += 1
    return i, calm


@kernel
def _ask_group(table, source, request, first, last):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Note where these rows lie in the map, and ask for their memory all at once."""
    entry = source.scratch + _GROUP
    for i in range(first, last):
        extent, offset, check = locate(table, _layer(request, i), load_int64(request.row_ids, i))
        row = source.base + offset
        for line in range(0, table.row_bytes, 64):
            prefetch(row + line)
        prefetch(row + check)
        store_u64(entry, np.uint64(extent))
        store_u64(entry + 8, np.uint64(row))
        store_u64(entry + 16, np.uint64(row + check))
        entry += 24


@kernel
def _copy_row(table, source, request, i, entry):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    extent = load_int64(entry, np.int64(0))
    if load_u8(table.refused + extent):
        return REFUSED
    copy_bytes(source.scratch, load_int64(entry, np.int64(1)), table.row_bytes)
    copy_bytes(source.scratch + _CHECK, load_int64(entry, np.int64(2)), CHECK_BYTES)
    return _deliver(table, request, i, source.scratch, source.scratch + _CHECK)


@kernel
def _now_ns(source):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    words = source.scratch + _WORDS
    _clock_gettime(np.int32(_CLOCK_MONOTONIC), words)
    return load_int64(words, 0) * 1_000_000_000 + load_int64(words, 1)


@kernel
def _copy(table, source, request, i):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Copy rows from `i` on through the map until some were slow.

    Returns the next row to read and whether the last ones were slow.
    """
    before = _now_ns(source)
    while i < request.rows:
        first, last = i, min(i + GROUP, request.rows)
        _ask_group(table, source, request, first, last)
        while i < last:
            entry = source.scratch + _GROUP + (i - first) * 24
            _set_fate(request, i, _copy_row(table, source, request, i, entry))
            i += 1
            if (i - first) % TIMED_ROWS == 0:
                after = _now_ns(source)
                if after - before > SLOW_NS:
                    return i, True
                before = after
    return i, False


@kernel
def _guarded(source, handler):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Whether the handler at this address gets SIGBUS now."""
    _sigaction(np.int32(_SIGBUS), 0, source.scratch)
    return load_int64(source.scratch, 0) == handler


@kernel
def gather(
    geometry: Any,
    descriptor: Any,
    base: Any,
    handler: Any,
    calm: Any,
    layers: Any,
    row_ids: Any,
    places: Any,
    values: Any,
    scales: Any,
    fates: Any,
) -> Any:
    """Gather rows; dtypes and widths are valid (see `StoreReader.gather`).

    Args:
        geometry: `Geometry.packed`.
        descriptor: of the data file.
        base: address of its map, or 0 to read without it.
        handler: address of the SIGBUS guard, which must be installed if `base` is given.
        calm: as returned by the call before, 0 at first.
        layers, row_ids, places: int32, int64, int64 `[R]`.
        values, scales: uint8 `[R', bytes]`, where rows go.
        fates: uint8 `[R]`, set for every row.

    Returns:
        The length, up to `CALM_ROWS`, of the last sequence of rows found in the page cache; or
        -1 - i, with nothing written, if request i names something that does not exist; or
        `GUARD_LOST`.
    """
    table = unpack(geometry)
    source = _Source(np.int64(descriptor), np.int64(base), _stack_scratch())
    request = _Request(
        np.int64(layers.ctypes.data),
        np.int64(row_ids.ctypes.data),
        np.int64(places.ctypes.data),
        np.int64(values.ctypes.data),
        np.int64(scales.ctypes.data),
        np.int64(fates.ctypes.data),
        len(fates),
    )
    outside = _find_outside(table, request, len(values))
    if outside >= 0:
        return -1 - outside
    if base and not _guarded(source, handler):
        return GUARD_LOST
    # Numbers of one type: every other would make numba compile what it is passed to once more.
    i, calm = np.int64(0), np.int64(calm)
    enough = np.int64(CALM_ROWS)
    if base == 0:
        calm, enough = np.int64(0), np.int64(request.rows + 1)
    while i < request.rows:
        if calm < enough:
            i, calm = _pipe(table, source, request, i, calm, enough)
        else:
            i, slow = _copy(table, source, request, i)
            calm = np.int64(0) if slow else calm
    return min(calm, np.int64(CALM_ROWS))


@kernel
def touch(geometry, descriptor, layers, row_ids):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Start reading the blocks of rows into the page cache; waits only for room in the queue.

    Returns 0, or -1 - i, with nothing done, if request i names something that does not exist.
    """
    table = unpack(geometry)
    request = _Request(
        np.int64(layers.ctypes.data), np.int64(row_ids.ctypes.data), 0, 0, 0, 0, len(row_ids)
    )
    outside = _find_outside(table, request, np.int64(0))
    if outside >= 0:
        return -1 - outside
    for i in range(request.rows):
        _, offset, check = locate(table, _layer(request, i), load_int64(request.row_ids, i))
        _fadvise(np.int32(descriptor), offset, check + CHECK_BYTES, np.int32(_WILLNEED))
    return 0
