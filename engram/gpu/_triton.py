# ruff: noqa: ANN001, ANN202, N803 - kernels are typed by what they are called with
# mypy: ignore-errors
"""The gather as one Triton kernel: a program for each n-gram and a few of its layers.

A program reads all selected rows of its n-gram in these layers, whose values lie next to each
other, 16 bytes a thread and load. Host memory answers some 1.5 us later, so what counts is that
many programs wait at once: they are small, and wait for the host twice, for their addresses and
for their rows.

Rows are decoded in float32 and rounded once, as `engram.nn.dequantize` does on any device.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORMATS = {"bf16": 0, "fp16": 1, "fp32": 2, "fp8-ue8m0": 3, "fp8": 4, "nvfp4": 5, "nf4": 6}
UNITS = {"bf16": tl.int16, "fp16": tl.float16, "fp32": tl.float32}
"""How elements are read that are stored as they are."""


@triton.jit
def _signed(magnitude, code, SIGN: tl.constexpr, SHIFT: tl.constexpr):
    """Give a float32 the sign bit of its code; a minus would turn -0 to 0."""
    bits = magnitude.to(tl.int32, bitcast=True) | ((code & SIGN) << SHIFT)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(code, HARDWARE: tl.constexpr):
    if HARDWARE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    # Subnormals are multiples of 2**-9; all others have their exponent moved by 120.
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return _signed(value, code, 0x80, 24)


@triton.jit
def _ue8m0(code):
    code = code.to(tl.int32)
    # 0 is subnormal as a float32, 255 is NaN.
    half = (code == 0) | (code == 255)
    bits = (code << 23) | tl.where(half, 1 << 22, 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(code):
    magnitude = code & 7
    # 0, 0.5, then the exponent counts from 1.
    normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return _signed(value, code, 8, 28)


@triton.jit
def _units_at(
    base,
    offsets,
    valid,
    COUNT: tl.constexpr,
    COUNT_2: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Pointers to `UNIT` `[rows, COUNT_2]` at addresses, and which of them are meant."""
    place = tl.arange(0, COUNT_2)
    address = base + offsets.to(tl.int64)
    rows = tl.multiple_of(address.to(tl.pointer_type(UNIT)), ALIGN)
    return rows[:, None] + place[None, :], valid[:, None] & (place < COUNT)[None, :]


@triton.jit
def _decode(
    values,
    scales,
    book,
    global_scale,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """float32 `[ROWS, elements]` of `[ROWS, COUNT]` values and `[ROWS, BLOCKS]` scales."""
    if FORMAT == 3:
        blocks = tl.reshape(_e4m3(values, HARDWARE), [ROWS, BLOCKS, COUNT // BLOCKS])
        return tl.reshape(blocks * _ue8m0(scales)[:, :, None], [ROWS, COUNT])
    elif FORMAT == 4:
        return _e4m3(values, HARDWARE) * global_scale
    elif FORMAT == 5:
        code = values.to(tl.int32)
        elements = tl.interleave(_e2m1(code & 15), _e2m1(code >> 4))
        blocks = tl.reshape(elements, [ROWS, BLOCKS, 2 * COUNT // BLOCKS])
        scaled = tl.reshape(blocks * _e4m3(scales, HARDWARE)[:, :, None], [ROWS, 2 * COUNT])
        return scaled * global_scale
    elif FORMAT == 6:
        code = values.to(tl.int32)
        elements = tl.interleave(tl.load(book + (code >> 4)), tl.load(book + (code & 15)))
        parts = scales.to(tl.int32) << (tl.arange(0, BLOCKS) * 8)[None, :]
        return elements * tl.sum(parts, axis=1).to(tl.float32, bitcast=True)[:, None]
    elif FORMAT == 0:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def _read(
    source,
    offsets,
    keep,
    kept_offsets,
    valid,
    COUNT: tl.constexpr,
    COUNT_2: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    KEPT: tl.constexpr,
):
    """One part of the rows, kept on the device if `keep` is an address."""
    pointer, mask = _units_at(source, offsets, valid, COUNT, COUNT_2, UNIT, ALIGN)
    units = tl.load(pointer, mask=mask, other=0)
    if KEPT and keep != 0:
        kept, _ = _units_at(keep, kept_offsets, valid, COUNT, COUNT_2, UNIT, ALIGN)
        tl.store(kept, units, mask=mask)
    return units


@triton.jit
def _write(
    decoded,
    values,
    out,
    base,
    position,
    valid,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Rows to their positions from `base` on; bits stay where nothing is to be converted."""
    if FORMAT == 0 and out.dtype.element_ty == tl.bfloat16:
        decoded = values.to(tl.bfloat16, bitcast=True)
    elif FORMAT > 0 and FORMAT < 3:
        decoded = values
    place = tl.arange(0, DIM_2)
    starts = tl.multiple_of(base + position * DIM, OUT_ALIGN)
    element = starts[:, None] + place[None, :]
    mask = valid[:, None] & (place < DIM)[None, :]
    tl.store(out + element, decoded.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of(
    bounds,
    positions,
    offsets,
    order,
    kind,
    layer,
    head,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    REGULAR: tl.constexpr,
):
    """Which of `[ROWS]` there are, their columns in the output, and bytes of their values and
    scales in the source, and where they are kept.

    Args:
        layer, head: `[ROWS]`, which row is meant: of the selected layers, and of the order's
            selected columns.
    """
    if REGULAR:
        start = layer * (HEADS * (VALUE_BYTES + SCALE_BYTES))
        value_at = start + head * VALUE_BYTES
        scale_at = start + HEADS * VALUE_BYTES + head * SCALE_BYTES
        valid = (head < HEADS) & (layer < LAYERS)
        return valid, order * HEADS + head, value_at, scale_at, value_at, scale_at
    else:
        first = tl.load(bounds + order)
        valid = (head < tl.load(bounds + order + 1) - first) & (layer < LAYERS)
        column = first + head
        position = tl.load(positions + column, mask=valid, other=0)
        at = offsets + ((kind * LAYERS + layer) * COLUMNS + column) * 2
        kept = offsets + ((LAYERS + layer) * COLUMNS + column) * 2
        return (
            valid,
            position,
            tl.load(at, mask=valid, other=0),
            tl.load(at + 1, mask=valid, other=0),
            tl.load(kept, mask=valid, other=0),
            tl.load(kept + 1, mask=valid, other=0),
        )


@triton.jit(do_not_specialize=["tokens", "layer_stride"])
def gather(
    addresses,
    bounds,
    positions,
    offsets,
    book,
    out,
    tokens: tl.int32,
    layer_stride: tl.int64,
    global_scale,
    ORDERS: tl.constexpr,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_2: tl.constexpr,
    LAYERS_EACH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_2: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_2: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    SCALE_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FORMAT: tl.constexpr,
    REGULAR: tl.constexpr,
    HARDWARE: tl.constexpr,
    KEPT: tl.constexpr,
    DECODED: tl.constexpr,
):
    """See `Gather.__call__`; arrays are where the device can read them.

    Args:
        addresses: int64 `[2, T, orders]`, or without the second half unless KEPT.
        bounds, positions, offsets: of the plan, int32.
        book: float32 `[16]`, nf4's.
        out: `[layers, T, columns, dim]`, layers `layer_stride` elements apart; not touched unless
            DECODED.
        HEADS: of an order; like all NAME_2, HEADS_2 is that as a power of two.
        LAYERS_EACH: layers of a program, a power of two.
        VALUES, SCALES: units of a row's values and scales.
        HARDWARE: whether the device converts e4m3 itself.
        REGULAR: whether everything is selected, in order: then where rows lie is computed, and a
            program waits only for its address before it asks for its rows.
    """
    pid = tl.program_id(0)
    ROWS: tl.constexpr = HEADS_2 * LAYERS_EACH
    row = tl.arange(0, ROWS)
    layer = tl.program_id(1) * LAYERS_EACH + row // HEADS_2
    order = pid % ORDERS
    token = pid // ORDERS
    tagged = tl.load(addresses + pid)
    keep = tl.zeros((), tl.int64)
    if KEPT:
        keep = tl.load(addresses + tokens * ORDERS + pid)
    if tagged != 0:
        kind = (tagged & 1).to(tl.int32)
        source = tagged - kind
        valid, position, value_at, scale_at, kept_value_at, kept_scale_at = _rows_of(
            bounds,
            positions,
            offsets,
            order,
            kind,
            layer,
            row % HEADS_2,
            LAYERS,
            COLUMNS,
            HEADS,
            VALUES * (VALUE_UNIT.primitive_bitwidth // 8),
            SCALES,
            REGULAR,
        )
        values = _read(
            source,
            value_at,
            keep,
            kept_value_at,
            valid,
            VALUES,
            VALUES_2,
            VALUE_UNIT,
            VALUE_ALIGN,
            KEPT,
        )
        scales = values
        if SCALES > 0:
            scales = _read(
                source,
                scale_at,
                keep,
                kept_scale_at,
                valid,
                SCALES,
                SCALES_2,
                tl.uint8,
                SCALE_ALIGN,
                KEPT,
            )
        if DECODED:
            decoded = _decode(
                values, scales, book, global_scale, ROWS, VALUES_2, SCALES_2, FORMAT, HARDWARE
            )
            base = layer.to(tl.int64) * layer_stride + token.to(tl.int64) * (COLUMNS * DIM)
            _write(decoded, values, out, base, position, valid, DIM, DIM_2, OUT_ALIGN, FORMAT)
