"""Misses of a client whose sidecar is gone: rows read from the table's own file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engram._failures import Failures
from engram._jit import copy_bytes, kernel
from engram.errors import RowIntegrityError
from engram.ram.bundle_tier import Deliver
from engram.ram.layout import BundleLayout
from engram.ram.memory import Memory
from engram.rows import Rows
from engram.spec import NgramSpec
from engram.store.reader import StoreReader
from engram.tiers import Ngrams, Selection

PART_NGRAMS = 512
_NO_SCALES = np.empty((0, 0), np.uint8)


def fetch_directly(
    reader: StoreReader,
    spec: NgramSpec,
    bundle: BundleLayout,
    ngrams: Ngrams,
    selection: Selection,
    deliver: Deliver,
) -> Failures:
    """As `BundleTier.fetch`; only the selected rows are read and delivered."""
    failures = Failures()
    room = Memory.private(min(PART_NGRAMS, max(1, len(ngrams))) * bundle.slot_bytes)
    for first in range(0, len(ngrams), PART_NGRAMS):
        some = ngrams.take(slice(first, first + PART_NGRAMS))
        rows = _read(reader, spec, some, selection, failures)
        lay_out(
            some.orders - np.int32(selection.min_order),
            selection.layer_array,
            selection.column_array % selection.heads,
            selection.ordered,
            selection.order_bounds,
            rows.values,
            _NO_SCALES if rows.scales is None else rows.scales,
            bundle.heads,
            bundle.layer_bytes,
            bundle.value_bytes,
            bundle.scale_bytes,
            room.address,
            bundle.slot_bytes,
        )
        offsets = bundle.slot_bytes * np.arange(len(some), dtype=np.int64)
        deliver(first, room.address + offsets)
    return failures


def _read(
    reader: StoreReader, spec: NgramSpec, ngrams: Ngrams, selection: Selection, failures: Failures
) -> Rows:
    layers, row_ids = spec.ngram_rows(
        ngrams.windows,
        ngrams.orders,
        selection.layer_array,
        selection.column_array,
        selection.ordered,
        selection.order_bounds,
    )
    rows = Rows.empty((len(row_ids),), reader.manifest.row_format)
    try:
        reader.gather(layers, row_ids, np.arange(len(row_ids), dtype=np.int64), rows)
    except RowIntegrityError as error:
        failures.add(error.failures, error.cause)
    return rows


@kernel
def lay_out(  # type: ignore[no-untyped-def]  # noqa: ANN201
    orders,  # noqa: ANN001
    layers,  # noqa: ANN001
    column_heads,  # noqa: ANN001
    ordered,  # noqa: ANN001
    order_bounds,  # noqa: ANN001
    values,  # noqa: ANN001
    scales,  # noqa: ANN001
    heads,  # noqa: ANN001
    layer_bytes,  # noqa: ANN001
    value_bytes,  # noqa: ANN001
    scale_bytes,  # noqa: ANN001
    target,  # noqa: ANN001
    stride,  # noqa: ANN001
):
    """Copy rows in canonical order to their places in bundles.

    Args:
        orders: int32 `[N]`, less the smallest order.
        target, stride: address of bundle 0, and bytes from one to the next.
    """
    values_at, scales_at = np.int64(values.ctypes.data), np.int64(scales.ctypes.data)
    row = 0
    for n in range(len(orders)):
        for layer in layers:
            base = target + n * stride + layer * layer_bytes
            for k in range(order_bounds[orders[n]], order_bounds[orders[n] + 1]):
                head = column_heads[ordered[k]]
                copy_bytes(base + head * value_bytes, values_at + row * value_bytes, value_bytes)
                copy_bytes(
                    base + heads * value_bytes + head * scale_bytes,
                    scales_at + row * scale_bytes,
                    scale_bytes,
                )
                row += 1


def lay_out_twin(
    bundle: BundleLayout, selection: Selection, ngrams: Ngrams, rows: Rows
) -> npt.NDArray[np.uint8]:
    """`lay_out` in NumPy: its oracle; uint8 `[N, slot_bytes]`, zero where no row was."""
    bundles = np.zeros((len(ngrams), bundle.slot_bytes), np.uint8)
    row = 0
    for n, order in enumerate(ngrams.orders - selection.min_order):
        of_order = selection.ordered[slice(*selection.order_bounds[order : order + 2])]
        for layer in selection.layers:
            for column in selection.column_array[of_order]:
                head = column % bundle.heads
                at = layer * bundle.layer_bytes + head * bundle.value_bytes
                bundles[n, at : at + bundle.value_bytes] = rows.values[row]
                if rows.scales is not None:
                    at = layer * bundle.layer_bytes + bundle.heads * bundle.value_bytes
                    at += head * bundle.scale_bytes
                    bundles[n, at : at + bundle.scale_bytes] = rows.scales[row]
                row += 1
    return bundles
