"""Slots read in place: what a GPU client does, done by the CPU."""

from __future__ import annotations

import numpy as np

from engram._jit import kernel
from engram.ram import _deliver, _directory
from engram.ram.bundle_tier import BundleTier
from engram.ram.layout import unpack_view
from engram.rows import Rows
from engram.tiers import Int32s, Selection

_NO_SCALES = np.empty((0, 0), np.uint8)


class HeldSlots:
    """Slots that a probe found; valid while the tier is held (`BundleTier.holding`).

    Args:
        windows: int32 `[T, max_order]`.
    """

    def __init__(self, tier: BundleTier, windows: Int32s) -> None:
        self._tier = tier
        self._view = tier._view()
        self._slots = tier.probe(windows)

    @property
    def columns(self) -> np.ndarray:
        """bool `[T, columns]`: whose rows are in the arena."""
        return np.repeat(self._slots >= 0, self._tier.spec.heads, axis=1)

    def read(self, rows: Rows) -> None:
        """Copy rows `[T, layers, columns]` as they are now; others stay as they are."""
        spec, slots = self._tier.spec, self._slots.reshape(-1)
        found = np.flatnonzero(slots >= 0)
        addresses = np.empty(len(found), np.int64)
        _bundle_addresses(self._view, slots[found], addresses)
        copies = self._tier._copies_of(Selection.of(spec))
        flat = rows.flat(self.shape, self._tier.row_format)
        _deliver.deliver(
            found,
            np.arange(len(found)),
            addresses,
            spec.num_orders,
            copies.pieces,
            copies.bounds,
            flat.values,
            _NO_SCALES if flat.scales is None else flat.scales,
            len(self._slots),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, layers, columns."""
        return len(self._slots), len(self._tier.spec.layers), self._tier.spec.num_columns


@kernel
def _bundle_addresses(packed_view, slots, addresses):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    view = unpack_view(packed_view)
    for n in range(len(slots)):
        addresses[n] = _directory.bundle_of(view, slots[n])
