"""Where a selection's rows lie in a bundle, in the device's copy of it, and in the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.ram.layout import LINE_BYTES, BundleLayout
from engram.tiers import Int64s, Selection

Int32s = npt.NDArray[np.int32]

WHOLE, PACKED = 0, 1
"""A bundle as it is on the host, or only its selected rows, as the device keeps it. The lowest
bit of an n-gram's address says which; bundles begin at multiples of a cache line."""


@dataclass(frozen=True)
class Plan:
    """Offsets of rows, the same for every n-gram of an order.

    Attributes:
        orders, layers, columns: how many are selected (of orders: how many there are).
        heads: most columns of one order.
        bounds: int64 `[orders + 1]`, where each order's columns begin in the arrays below.
        positions: int32 `[columns]`, which output column each is.
        offsets: int32 `[2, layers, columns, 2]`: byte in a bundle, `WHOLE` or `PACKED`, of a row's
            values and of its scales.
        slot_bytes: of a packed bundle, whole cache lines; the largest of all orders.
        regular: whether everything is selected, in order.
    """

    orders: int
    layers: int
    columns: int
    heads: int
    bounds: Int64s
    positions: Int32s
    offsets: Int32s
    slot_bytes: int
    regular: bool

    @classmethod
    def of(cls, bundle: BundleLayout, selection: Selection) -> Plan:
        bounds = selection.order_bounds
        counts = np.diff(bounds)
        positions = selection.ordered
        heads = selection.column_array[positions] % selection.heads
        within = np.arange(len(positions)) - np.repeat(bounds[:-1], counts)
        layers = selection.layer_array[:, None]
        whole = _rows(bundle, layers * bundle.layer_bytes, bundle.heads, heads[None])
        in_order = np.repeat(counts, counts)
        row_bytes = bundle.value_bytes + bundle.scale_bytes
        packed_layers = np.arange(len(layers))[:, None] * (in_order * row_bytes)[None]
        packed = _rows(bundle, packed_layers, in_order[None], within[None])
        widest = int(counts.max())
        needed = len(layers) * widest * row_bytes
        return cls(
            selection.orders,
            len(layers),
            len(positions),
            widest,
            bounds,
            positions.astype(np.int32),
            np.stack([whole, packed]).astype(np.int32),
            -(-needed // LINE_BYTES) * LINE_BYTES,
            selection.layers == tuple(range(bundle.layers))
            and selection.columns == tuple(range(selection.orders * bundle.heads)),
        )


def _rows(bundle: BundleLayout, layers: Int64s, heads: int | Int64s, head: Int64s) -> Int64s:
    """int64 `[layers, columns, 2]`: values and scales, of layers with `heads` heads each."""
    values = layers + head * bundle.value_bytes
    scales = layers + heads * bundle.value_bytes + head * bundle.scale_bytes
    rows: Int64s = np.stack(np.broadcast_arrays(values, scales), axis=-1)
    return rows
