"""Rows of any format to a tensor of floats, on whatever device their bytes are.

Every format is decoded in float32, where each product below is either exact or rounded once, and
the result is rounded once more, to the output dtype. A format that *is* the output dtype is only
looked at through another type, so its bits stay as stored, NaN payloads included. Nothing here
depends on the data, so a device is never waited for and a CUDA graph can hold it.

    format       decoded as                             source
    fp8-ue8m0    e4m3 * 2**(scale - 127), exact         OCP Microscaling Formats v1.0, section 5
    fp8          e4m3 * global_scale                    OCP 8-bit Floating Point v1.0, E4M3
    nvfp4        (e2m1 * e4m3, exact) * global_scale    NVIDIA, "Introducing NVFP4", 2025
    nf4          code_book[code] * scale                Dettmers et al., QLoRA, 2023, appendix E
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from engram.errors import SelectionError
from engram.rows import RowFormat

_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dequantize(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    row_format: RowFormat,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Decode rows where they are.

    Args:
        values: uint8 `[..., value_bytes]`, its last dimension contiguous.
        scales: uint8 `[..., scale_bytes]` on the same device; None where the format has none.
        row_format: how the rows are stored.
        dtype: floating dtype of the result.

    Returns:
        `dtype` `[..., dim]` on the device of `values`; it shares memory with `values` if nothing
        had to be decoded.

    Raises:
        SelectionError: bytes that are not rows of `row_format`, or a dtype that is not floating.
    """
    _check(values, scales, row_format, dtype)
    name = row_format.name
    if name in _STORED:
        return values.view(_STORED[name]).to(dtype)
    if name == "nf4":
        assert scales is not None
        decoded = _pairs(values, _nf4_pairs(values.device)) * scales.view(torch.float32)
    elif name == "nvfp4":
        assert scales is not None
        codes = _pairs(values, _e2m1_pairs(values.device))
        decoded = _scaled(codes, _e4m3(scales)) * _float32(row_format)
    elif name == "fp8":
        decoded = _e4m3(values) * _float32(row_format)
    else:
        assert scales is not None
        decoded = _scaled(_e4m3(values), _ue8m0(scales))
    return decoded.to(dtype)


def _check(
    values: torch.Tensor, scales: torch.Tensor | None, row_format: RowFormat, dtype: torch.dtype
) -> None:
    if not dtype.is_floating_point:
        raise SelectionError(f"rows decode to floating dtypes, not {dtype}; pass torch.bfloat16")
    parts = [("values", values, row_format.value_bytes)]
    if row_format.scale_bytes:
        if scales is None:
            raise SelectionError(f"scales are missing; {row_format.name} rows have scales")
        parts.append(("scales", scales, row_format.scale_bytes))
    elif scales is not None:
        raise SelectionError(f"scales must be None; {row_format.name} rows have no scales")
    for what, part, width in parts:
        if part.dtype != torch.uint8 or not part.dim() or part.shape[-1] != width:
            raise SelectionError(
                f"{what} must be uint8 [..., {width}] for {row_format.name} rows of "
                f"{row_format.dim}, not {part.dtype} {list(part.shape)}"
            )


def _float32(row_format: RowFormat) -> float:
    """The global scale, rounded to float32 before any device multiplies by it."""
    return float(np.float32(row_format.global_scale))


def _scaled(elements: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply each block of `elements` `[..., dim]` by its own of `scales` `[..., blocks]`."""
    block = elements.shape[-1] // scales.shape[-1]
    blocks = elements.reshape(*scales.shape, block)
    return (blocks * scales.unsqueeze(-1)).reshape(elements.shape)


def _e4m3(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def _ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """2**(code - 127), built as float32 bits: code 0 is subnormal there, code 255 is NaN."""
    exponent = codes.to(torch.int32)
    bits = (exponent << 23) | ((exponent == 0).int() << 22) | ((exponent == 255).int() << 22)
    return bits.view(torch.float32)


def _pairs(packed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Both values of each byte at once, by one table look-up."""
    return torch.nn.functional.embedding(packed.to(torch.int32), pairs).flatten(-2)


@lru_cache(maxsize=64)
def _e2m1_pairs(device: torch.device) -> torch.Tensor:
    book = torch.tensor(_E2M1, dtype=torch.float32)
    return torch.stack([book.repeat(16), book.repeat_interleave(16)], dim=-1).to(device)


@lru_cache(maxsize=64)
def _nf4_pairs(device: torch.device) -> torch.Tensor:
    book = torch.tensor(NF4, dtype=torch.float32)
    return torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=-1).to(device)
