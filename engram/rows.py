"""Rows as bytes: the formats they are stored in, and the result of a lookup.

A row is its values followed by its scales. Formats, with `dim` values a row:

    name           values                    scales                      value of element i
    bf16 fp16 fp32 2, 2, 4 bytes each        none                        as stored
    fp8-ue8m0      e4m3, 1 byte each         ue8m0, one per 32 values    e4m3 * 2**(scale - 127)
    fp8            e4m3, 1 byte each         none                        e4m3 * global_scale
    nvfp4          e2m1, low nibble first    e4m3, one per 16 values     e2m1 * e4m3 * global_scale
    nf4            code, high nibble first   float32, one per row        code_book[code] * scale

`fp8-ue8m0` is DeepSeek-V4.1's (OCP Microscaling v1.0), nvfp4 NVIDIA's, nf4 that of QLoRA
(Dettmers et al., 2023). `global_scale` is one float32 for the whole table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import SelectionError, SpecError

Bytes = npt.NDArray[np.uint8]

_UINT8 = np.dtype(np.uint8)
_VALUE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "fp8-ue8m0": 8, "fp8": 8, "nvfp4": 4, "nf4": 4}
_SCALE_BLOCK = {"fp8-ue8m0": 32, "nvfp4": 16}
_GLOBAL_SCALE = ("fp8", "nvfp4")

ROW_FORMATS = tuple(_VALUE_BITS)
"""Names of all row formats."""


@dataclass(frozen=True)
class RowFormat:
    """How one row of `dim` values is stored.

    Args:
        name: one of `ROW_FORMATS`.
        dim: number of values in a row.
        global_scale: the table's one scale; required for fp8 and nvfp4, refused elsewhere.

    Raises:
        SpecError: unknown name, a dim the format cannot hold, a global scale that is missing,
            superfluous, not finite or not positive.
    """

    name: str
    dim: int
    global_scale: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _VALUE_BITS:
            raise SpecError(
                f"row format {self.name!r} is unknown; choose one of {', '.join(ROW_FORMATS)}"
            )
        unit = max(_SCALE_BLOCK.get(self.name, 1), 2 if _VALUE_BITS[self.name] == 4 else 1)
        if self.dim < 1 or self.dim % unit:
            raise SpecError(
                f"row format {self.name} needs a dim that is a positive multiple of {unit}, "
                f"not {self.dim}"
            )
        if (self.global_scale is not None) != (self.name in _GLOBAL_SCALE):
            raise SpecError(
                f"row format {self.name} needs a global scale; none was given"
                if self.global_scale is None
                else f"row format {self.name} has no global scale, but got {self.global_scale}"
            )
        if self.global_scale is not None and not (
            math.isfinite(self.global_scale) and self.global_scale > 0
        ):
            raise SpecError(
                f"global scale must be finite and positive, not {self.global_scale}; "
                "check the checkpoint's weight_scale tensor"
            )

    @cached_property
    def value_bytes(self) -> int:
        return self.dim * _VALUE_BITS[self.name] // 8

    @cached_property
    def scale_bytes(self) -> int:
        if self.name == "nf4":
            return 4
        return self.dim // _SCALE_BLOCK[self.name] if self.name in _SCALE_BLOCK else 0

    @property
    def row_bytes(self) -> int:
        return self.value_bytes + self.scale_bytes

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dim": self.dim, "global_scale": self.global_scale}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RowFormat:
        try:
            return cls(**fields)
        except TypeError as error:
            raise SpecError(f"row format {fields!r} is malformed: {error}") from None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as they are stored, bit for bit.

    Attributes:
        values: uint8 `[..., value_bytes]`, C-contiguous.
        scales: uint8 `[..., scale_bytes]`, or None where the format has no scales in the row.
    """

    values: Bytes
    scales: Bytes | None

    @classmethod
    def empty(cls, shape: tuple[int, ...], row_format: RowFormat) -> Rows:
        """Uninitialized room for rows of `row_format`, one per element of `shape`."""
        scales = (
            np.empty((*shape, row_format.scale_bytes), np.uint8) if row_format.scale_bytes else None
        )
        return cls(np.empty((*shape, row_format.value_bytes), np.uint8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch of rows, without the bytes."""
        return self.values.shape[:-1]

    def packed(self) -> Bytes:
        """Copy as uint8 `[..., row_bytes]`: values then scales, as on disk."""
        if self.scales is None:
            return self.values.copy()
        return np.concatenate([self.values, self.scales], axis=-1)

    def reshape(self, shape: tuple[int, ...]) -> Rows:
        """The same bytes under another batch shape; never a copy.

        Raises:
            SelectionError: the bytes are not C-contiguous.
        """
        for array in (self.values, self.scales):
            if array is not None and not array.flags.c_contiguous:
                raise SelectionError("rows must be C-contiguous; pass buffers from Rows.empty")
        scales = self.scales
        return Rows(
            self.values.reshape(*shape, self.values.shape[-1]),
            None if scales is None else scales.reshape(*shape, scales.shape[-1]),
        )

    def flat(self, shape: tuple[int, ...], row_format: RowFormat) -> Rows:
        """These buffers as flat rows `[R, bytes]`, if a lookup of `shape` rows can fill them.

        Raises:
            SelectionError: wrong dtype, shape or order, or read-only, with both shapes named.
        """
        self.check(shape, row_format)
        scales = self.scales
        if scales is not None:
            scales = scales.reshape(-1, row_format.scale_bytes)
        return Rows(self.values.reshape(-1, row_format.value_bytes), scales)

    def check(self, shape: tuple[int, ...], row_format: RowFormat) -> None:
        """Refuse buffers that a lookup of `shape` rows cannot fill.

        Raises:
            SelectionError: wrong dtype, shape or order, or read-only, with both shapes named.
        """
        values, scales = self.values, self.scales
        value_bytes, scale_bytes = row_format.value_bytes, row_format.scale_bytes
        # What is right, without a list of parts: a lookup of one token has no time for it.
        if (
            values.dtype is _UINT8
            and values.shape == (*shape, value_bytes)
            and values.flags.carray
            and (scales is None) == (not scale_bytes)
            and (
                scales is None
                or (
                    scales.dtype is _UINT8
                    and scales.shape == (*shape, scale_bytes)
                    and scales.flags.carray
                    and not np.may_share_memory(values, scales)
                )
            )
        ):
            return
        self._refuse(shape, row_format)

    def _refuse(self, shape: tuple[int, ...], row_format: RowFormat) -> None:
        parts = [("values", self.values, row_format.value_bytes)]
        if row_format.scale_bytes:
            if self.scales is None:
                raise SelectionError(f"out.scales is missing; {row_format.name} rows have scales")
            parts.append(("scales", self.scales, row_format.scale_bytes))
        elif self.scales is not None:
            raise SelectionError(f"out.scales must be None; {row_format.name} rows have no scales")
        for name, array, width in parts:
            wanted = (*shape, width)
            if array.dtype != np.uint8 or array.shape != wanted:
                found = f"{array.dtype} {list(array.shape)}"
                raise SelectionError(f"out.{name} must be uint8 {list(wanted)}, not {found}")
            # Set for what is C-contiguous, aligned and writable.
            if not array.flags.carray:
                raise SelectionError(f"out.{name} must be C-contiguous and writable")
        if self.scales is not None and np.may_share_memory(self.values, self.scales):
            raise SelectionError("out.values and out.scales overlap; pass buffers of their own")
