# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, N803 - kernels are typed by what they are called with
"""How engines read tables in host memory today: one row a head, values and scales apart.

Two pinned tables, `[rows, 256]` fp8 and `[rows, 8]` ue8m0 scales, read over PCIe by row id. A
program for each row; decoded as the gather of engram does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engram.gpu._triton import _e4m3, _ue8m0

DIM, BLOCKS = 256, 8


@triton.jit
def _read_rows(values, scales, row_ids, out, DIM: tl.constexpr, BLOCKS: tl.constexpr):
    at = tl.program_id(0)
    row = tl.load(row_ids + at)
    elements = _e4m3(tl.load(values + row * DIM + tl.arange(0, DIM)), True)
    scale = _ue8m0(tl.load(scales + row * BLOCKS + tl.arange(0, BLOCKS)))
    blocks = tl.reshape(elements, [BLOCKS, DIM // BLOCKS]) * scale[:, None]
    decoded = tl.reshape(blocks, [DIM]).to(out.dtype.element_ty)
    tl.store(out + at * DIM + tl.arange(0, DIM), decoded)


class RowTables:
    """Pinned tables of `rows` random rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.rows = rows
        self.values = torch.empty((rows, DIM), dtype=torch.uint8, pin_memory=pinned)
        self.scales = torch.empty((rows, BLOCKS), dtype=torch.uint8, pin_memory=pinned)
        self.values.random_(0, 126)
        self.scales.random_(120, 130)

    def read(self, row_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Decode rows, int64 `[n]` on the device, into `out` `[n, DIM]`."""
        _read_rows[(len(row_ids),)](
            self.values, self.scales, row_ids, out, DIM, BLOCKS, num_warps=1
        )
