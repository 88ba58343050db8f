# mypy: ignore-errors
"""The gather kernel, made ready for one plan and row format, and launched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from engram.gpu._triton import FORMATS, UNITS, gather
from engram.gpu.dequantize import NF4
from engram.gpu.plan import Plan
from engram.rows import RowFormat

cuda: Any = torch.cuda  # parts of it have no types
_WARPS = 4
_PROGRAM_BYTES = 4096
"""Of values that a program reads, about: as many of its layers as fit."""


class Kernel:
    """The kernel, made ready for one plan and row format.

    Args:
        plan, row_format, device: as for `Gather`.
    """

    def __init__(self, plan: Plan, row_format: RowFormat, device: torch.device) -> None:
        name = row_format.name
        value_unit = UNITS.get(name, tl.uint8)
        values = row_format.value_bytes // (value_unit.primitive_bitwidth // 8)
        scales = row_format.scale_bytes
        # A block of elements must not lie across two rows of padding.
        scales_2 = triton.next_power_of_2(max(1, scales))
        values_2 = triton.next_power_of_2(values)
        if scales and name != "nf4":
            values_2 = scales_2 * (values // scales)
        on_device = {
            "bounds": plan.bounds.astype(np.int32),
            "positions": plan.positions,
            "offsets": plan.offsets,
            "book": np.array(NF4, np.float32),
        }
        self._arrays = tuple(torch.from_numpy(a).to(device) for a in on_device.values())
        self._pointers = tuple(array.data_ptr() for array in self._arrays)
        self._device = device
        self._others = device.type == "cuda" and cuda.device_count() > 1
        self._orders = plan.orders
        heads_2 = triton.next_power_of_2(plan.heads)
        rows_each = max(1, _PROGRAM_BYTES // (row_format.value_bytes * heads_2))
        layers_each = min(triton.next_power_of_2(plan.layers), 1 << rows_each.bit_length() - 1)
        self._programs = triton.cdiv(plan.layers, layers_each)
        self._global_scale = float(np.float32(row_format.global_scale or 1.0))
        self._constants = (
            plan.orders,
            plan.layers,
            plan.columns,
            plan.heads,
            heads_2,
            layers_each,
            row_format.dim,
            values_2 * (2 if name in ("nvfp4", "nf4") else 1),
            values,
            values_2,
            value_unit,
            scales,
            scales_2,
            math.gcd(16, *plan.offsets[..., 0].ravel().tolist()),
            math.gcd(16, *plan.offsets[..., 1].ravel().tolist()),
            math.gcd(16, row_format.dim),
            FORMATS[name],
            plan.regular,
            device.type == "cuda" and cuda.get_device_capability(device) >= (8, 9),
        )
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self, addresses: torch.Tensor, out: torch.Tensor | None, stream: Any, *, kept: bool = True
    ) -> None:
        """As `Gather.__call__`, on a stream; the addresses where the device can read them."""
        tokens = addresses.shape[1]
        if not tokens:
            return
        written = self._arrays[-1] if out is None else out
        decoded = out is not None
        sizes = (tokens, written.stride(0), self._global_scale, *self._constants, kept, decoded)
        grid = (tokens * self._orders, self._programs, 1)
        source, target = addresses.data_ptr(), written.data_ptr()
        # What Triton compiles for besides the constants. Looking that up itself takes it longer
        # than a step of few tokens may, and so does asking the driver where tensors are.
        key = (written.dtype, kept, decoded, target % 16, source % 16)
        compiled = self._compiled.get(key)
        if stream is None:  # the interpreter
            gather[grid](addresses, *self._arrays, written, *sizes, num_warps=_WARPS)
        elif compiled is None or (self._others and cuda.current_device() != self._device.index):
            with cuda.stream(stream):  # and on its device, which Triton takes for granted
                self._compiled[key] = gather[grid](
                    addresses, *self._arrays, written, *sizes, num_warps=_WARPS
                )
        else:
            compiled[grid](source, *self._pointers, target, *sizes, stream=stream.cuda_stream)
