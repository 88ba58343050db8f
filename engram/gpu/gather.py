"""From addresses to embeddings: one launch on a device, and its twin on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engram.gpu import _sources
from engram.gpu.dequantize import dequantize
from engram.gpu.plan import Plan
from engram.rows import RowFormat


class Gather:
    """Reads the bundles at some addresses, decodes their selected rows, and keeps what it is told.

    Args:
        plan: of the selection.
        row_format: of the table.
        device: which reads; for all but CUDA devices the host does, and copies.
    """

    def __init__(self, plan: Plan, row_format: RowFormat, device: torch.device) -> None:
        self._plan = plan
        self._format = row_format
        self._launch = None
        if device.type == "cuda":
            from engram.gpu._kernel import Kernel

            self._launch = Kernel(plan, row_format, device)

    def __call__(
        self,
        addresses: torch.Tensor,
        out: torch.Tensor | None,
        stream: Any = None,
        *,
        kept: bool = True,
    ) -> None:
        """Queue it.

        Args:
            addresses: int64 `[2, T, orders]` on the host, pinned for CUDA devices, which read it
                there: where each n-gram's bundle is, its lowest bit the kind (`plan.WHOLE`,
                `plan.PACKED`), 0 for none; and where to keep it on the device, 0 to keep it not.
            out: floating `[layers, T, columns, dim]`, each layer contiguous, or any view of that;
                None only keeps.
            stream: of a CUDA device.
            kept: whether any is to be kept.
        """
        if self._launch is not None:
            self._launch(addresses, out, stream, kept=kept)
            return
        plan, form = self._plan, self._format
        shape = (plan.layers, addresses.shape[1], plan.columns)
        values = np.empty((*shape, form.value_bytes), np.uint8)
        scales = np.empty((*shape, form.scale_bytes), np.uint8)
        sources, keep = addresses.numpy()
        keep = keep if kept else np.zeros_like(sources)
        _sources.gather_rows(
            sources,
            keep,
            plan.bounds,
            plan.positions,
            plan.offsets,
            form.value_bytes,
            form.scale_bytes,
            values,
            scales,
        )
        if out is not None:
            decoded = dequantize(
                torch.from_numpy(values),
                torch.from_numpy(scales) if form.scale_bytes else None,
                form,
                out.dtype,
            )
            out.copy_(decoded.view(out.shape))
