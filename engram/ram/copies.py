"""Which bytes of a bundle go where: worked out once per selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.ram.layout import BundleLayout
from engram.tiers import Int64s, Selection


@dataclass(frozen=True)
class Copies:
    """Pieces of a bundle to copy for each token.

    Attributes:
        pieces: int64 `[pieces, 4]`: byte in the bundle, 0 for values or 1 for scales, byte in the
            token's part of those, bytes.
        bounds: int64 `[orders + 1]`: where each order's pieces begin.
        order_used: bool `[orders]`: whether a column of it is selected.
    """

    pieces: Int64s
    bounds: Int64s
    order_used: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, bundle: BundleLayout, selection: Selection) -> Copies:
        pieces: list[list[int]] = []
        bounds = [0]
        for order in range(selection.orders):
            pieces += _merged(_rows(bundle, selection, order))
            bounds.append(len(pieces))
        return cls(
            np.array(pieces, np.int64).reshape(-1, 4),
            np.array(bounds, np.int64),
            np.diff(selection.order_bounds) > 0,
        )


def _rows(bundle: BundleLayout, selection: Selection, order: int) -> list[list[int]]:
    """One piece per row and part, so sorted that neighbours can be merged."""
    start, stop = selection.order_bounds[order : order + 2]
    pieces = []
    parts = [(0, bundle.value_bytes, 0)]
    if bundle.scale_bytes:
        parts.append((1, bundle.scale_bytes, bundle.heads * bundle.value_bytes))
    for at, layer in enumerate(selection.layers):
        for part, row_bytes, offset in parts:
            for position in selection.ordered[start:stop].tolist():
                head = selection.columns[position] % selection.heads
                place = at * len(selection.columns) + position
                source = layer * bundle.layer_bytes + offset + head * row_bytes
                pieces.append([source, part, place * row_bytes, row_bytes])
    return pieces


def _merged(pieces: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for source, part, target, size in pieces:
        last = merged[-1] if merged else None
        if last and last[1] == part and last[0] + last[3] == source and last[2] + last[3] == target:
            last[3] += size
        else:
            merged.append([source, part, target, size])
    return merged
