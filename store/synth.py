"""Synthetic tables: every row's bytes are a function of table seed, layer and row id.

So whoever knows the seed can check any byte of such a table without a copy of it. Word j of a row
is mix64(key + j), key = mix64(mix64(seed ^ layer) ^ row): values take words 0, 1, .., scales take
words 2**32, 2**32 + 1, ... Each word is masked and offset, lane by lane, so that every number is
finite and near 1 in magnitude, and e4m3 bytes are kept off the two NaN codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engram._jit import kernel, store_u8, store_u64
from engram.errors import SelectionError
from engram.rows import Bytes, RowFormat
from engram.store.checks import mix64
from engram.store.manifest import Schema
from engram.store.source import table_seed_of

_U64 = np.uint64
_SCALE_WORDS = _U64(1 << 32)
_LOW_7_BITS = _U64(0x7F7F7F7F7F7F7F7F)
_ONES = _U64(0x0101010101010101)
_HIGH_BITS = _U64(0x8080808080808080)
_ALL = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class _Shape:
    """How a random word becomes numbers: `(word & mask) + offset`, then NaN codes cleared."""

    mask: int
    offset: int
    e4m3: bool = False


_ANY = _Shape(_ALL, 0)
_E4M3 = _Shape(_ALL, 0, e4m3=True)
_VALUES = {
    "bf16": _Shape(0x83FF83FF83FF83FF, 0x3E003E003E003E00),  # 2**-3 .. 2**5
    "fp16": _Shape(0x8FFF8FFF8FFF8FFF, 0x3400340034003400),  # 2**-2 .. 2**2
    "fp32": _Shape(0x81FFFFFF81FFFFFF, 0x3E8000003E800000),  # 2**-2 .. 2**2
    "fp8-ue8m0": _E4M3,
    "fp8": _E4M3,
    "nvfp4": _ANY,
    "nf4": _ANY,
}
_SCALES = {
    "fp8-ue8m0": _Shape(0x0F0F0F0F0F0F0F0F, 0x7878787878787878),  # 2**-7 .. 2**8
    "nvfp4": _Shape(0x0F0F0F0F0F0F0F0F, 0x3030303030303030),  # e4m3 0.5 .. 1.875
    "nf4": _Shape(0x00FFFFFF00FFFFFF, 0x3F0000003F000000),  # 0.5 .. 2
}


def _words(row_format: RowFormat) -> tuple[_Shape, _Shape]:
    return _VALUES[row_format.name], _SCALES.get(row_format.name, _ANY)


@kernel
def _shaped(word, mask, offset, e4m3):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    word = (word & mask) + offset
    if e4m3:
        word ^= (((word & _LOW_7_BITS) + _ONES) & _HIGH_BITS) >> _U64(7)
    return word


@kernel
def _fill(target, count, counter, mask, offset, e4m3):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    whole = count // 8
    for word in range(whole):
        store_u64(target + 8 * word, _shaped(mix64(counter + _U64(word)), mask, offset, e4m3))
    if count % 8:
        last = _shaped(mix64(counter + _U64(whole)), mask, offset, e4m3)
        for byte in range(8 * whole, count):
            store_u8(target + byte, np.uint8(last))
            last >>= _U64(8)


@kernel
def _rows(seed, layer, row_ids, target, value_bytes, scale_bytes, values, scales):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Fill `target` with rows; `values` and `scales` are (mask, offset, e4m3)."""
    layer_key = mix64(_U64(seed) ^ _U64(layer))
    for i in range(row_ids.size):
        key = mix64(layer_key ^ _U64(row_ids[i]))
        _fill(target, value_bytes, key, values[0], values[1], values[2])
        target += value_bytes
        if scale_bytes:
            _fill(target, scale_bytes, key + _SCALE_WORDS, scales[0], scales[1], scales[2])
            target += scale_bytes


def _arguments(shape: _Shape) -> tuple[np.uint64, np.uint64, bool]:
    return _U64(shape.mask), _U64(shape.offset), shape.e4m3


def fill_synthetic_rows(
    table_seed: int, row_format: RowFormat, layer: int, row_ids: npt.NDArray[np.int64], out: Bytes
) -> None:
    """`synthetic_rows` into uint8 `[R, row_bytes]`.

    Raises:
        SelectionError: ids that are not one-dimensional int64, or an `out` that does not fit.
    """
    if row_ids.dtype != np.int64 or row_ids.ndim != 1:
        raise SelectionError(f"row ids must be int64 [R], not {row_ids.dtype} {row_ids.shape}")
    wanted = (row_ids.size, row_format.row_bytes)
    if out.dtype != np.uint8 or out.shape != wanted or not out.flags.c_contiguous:
        raise SelectionError(
            f"out must be C-contiguous uint8 {list(wanted)}, not {list(out.shape)}"
        )
    values, scales = _words(row_format)
    _rows(
        _U64(table_seed),
        layer,
        np.ascontiguousarray(row_ids),
        out.ctypes.data,
        row_format.value_bytes,
        row_format.scale_bytes,
        _arguments(values),
        _arguments(scales),
    )


def synthetic_rows(
    table_seed: int, row_format: RowFormat, layer: int, row_ids: npt.NDArray[np.int64]
) -> Bytes:
    """The rows that a synthetic table holds, without the table.

    Args:
        table_seed: `manifest.table_seed` of the table.
        layer: model layer index.
        row_ids: int64 `[R]`, in any order.

    Returns:
        uint8 `[R, row_bytes]`: values, then scales.

    Raises:
        SelectionError: ids that are not one-dimensional int64.
    """
    out = np.empty((row_ids.size, row_format.row_bytes), np.uint8)
    fill_synthetic_rows(table_seed, row_format, layer, row_ids, out)
    return out


def synthetic_rows_twin(
    table_seed: int, row_format: RowFormat, layer: int, row_ids: npt.NDArray[np.int64]
) -> Bytes:
    """`synthetic_rows` in NumPy: its oracle."""

    def mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        word = word + _U64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> _U64(27))) * _U64(0x94D049BB133111EB)
        return word ^ (word >> _U64(31))

    def part(count: int, first_word: int, shape: _Shape) -> Bytes:
        counters = np.arange(first_word, first_word - (-count // 8), dtype=np.uint64)
        words = (mix(keys[:, None] + counters) & _U64(shape.mask)) + _U64(shape.offset)
        numbers = words.astype("<u8").view(np.uint8).reshape(len(keys), -1)[:, :count]
        nan = ((numbers & 0x7F) == 0x7F) & shape.e4m3
        cleared: Bytes = numbers ^ nan.astype(np.uint8)
        return cleared

    layer_key = mix(np.array([table_seed ^ layer], np.uint64))
    keys = mix(layer_key ^ row_ids.astype(np.uint64))
    values, scales = _words(row_format)
    return np.concatenate(
        [
            part(row_format.value_bytes, 0, values),
            part(row_format.scale_bytes, int(_SCALE_WORDS), scales),
        ],
        axis=1,
    )


class SyntheticSource:
    """A `RowSource` whose rows are computed.

    Args:
        schema: the table to be.
        seed: any integer; another seed gives another table of the same geometry.
    """

    def __init__(self, schema: Schema, seed: int = 0) -> None:
        self.digest = f"synth-{seed}"
        self.description: dict[str, Any] = {"kind": "synth", "seed": seed}
        self.table_seed = table_seed_of(schema, self.digest)
        self._row_format = schema.row_format

    def read(self, layer: int, first_row: int, out: Bytes) -> None:
        """Compute rows `first_row` onwards of `layer` into `out`, uint8 `[n, row_bytes]`."""
        row_ids = np.arange(first_row, first_row + len(out), dtype=np.int64)
        fill_synthetic_rows(self.table_seed, self._row_format, layer, row_ids, out)
