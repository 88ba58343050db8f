# ruff: noqa: ANN001, ANN201 - kernels are typed by what they are called with
# mypy: ignore-errors
"""The copying that hits consist of, and nothing else: known slots, no keys, no checks."""

from __future__ import annotations

import numpy as np

from engram._jit import copy_bytes, kernel, prefetch

_LINE_BYTES = 64


@kernel
def copy_bundles(sources, slot_bytes, slots, pieces, bounds, values, scales):
    """Copy bundles to their tokens' places, asking for the next one's memory meanwhile.

    Args:
        sources: uint8, slots of `slot_bytes` one after the other.
        slots: int64 `[T, orders]`.
        pieces, bounds: see `engram.ram.copies`.
        values, scales: uint8, flat.
    """
    tokens, orders = slots.shape
    base = np.int64(sources.ctypes.data)
    values_at, scales_at = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    value_stride, scale_stride = values.size // tokens, scales.size // tokens
    for token in range(tokens):
        for o in range(orders):
            after, after_o = (token + 1, 0) if o + 1 == orders else (token, o + 1)
            if after < tokens:
                coming = base + slots[after, after_o] * slot_bytes
                for line in range(0, slot_bytes, _LINE_BYTES):
                    prefetch(coming + line)
            source = base + slots[token, o] * slot_bytes
            for p in range(bounds[o], bounds[o + 1]):
                if pieces[p, 1]:
                    target = scales_at + token * scale_stride
                else:
                    target = values_at + token * value_stride
                copy_bytes(target + pieces[p, 2], source + pieces[p, 0], pieces[p, 3])
