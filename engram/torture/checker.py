"""Whether rows are what the rule of a synthetic table says, every byte of every row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engram.rows import Bytes, RowFormat, Rows
from engram.store.synth import fill_synthetic_rows
from engram.tiers import Int64s

_CHUNK_ROWS = 8192


class Checker:
    """Compares rows with what they must be, a chunk at a time.

    Args:
        table_seed: `manifest.table_seed` of the table.
    """

    def __init__(self, table_seed: int, row_format: RowFormat) -> None:
        self._table_seed = table_seed
        self._row_format = row_format
        self._expected = np.empty((_CHUNK_ROWS, row_format.row_bytes), np.uint8)

    def wrong_rows(
        self,
        layers: Sequence[int],
        row_ids: Int64s,
        rows: Rows,
        checked: npt.NDArray[np.bool_] | None = None,
    ) -> int:
        """How many rows are not right.

        Args:
            layers: model layer index of each position on axis 1.
            row_ids: int64 `[T, layers, columns]`.
            rows: of the same shape.
            checked: bool `[T, columns]`: which rows to check; all when None.
        """
        wrong = 0
        for position, layer in enumerate(layers):
            ids, values = row_ids[:, position], rows.values[:, position]
            scales = None if rows.scales is None else rows.scales[:, position]
            if checked is not None:
                ids, values = ids[checked], values[checked]
                scales = None if scales is None else scales[checked]
            wrong += self._wrong_in(
                layer, np.ascontiguousarray(ids).reshape(-1), _flat(values), _flat(scales)
            )
        return wrong

    def _wrong_in(self, layer: int, ids: Int64s, values: Bytes, scales: Bytes | None) -> int:
        wrong = 0
        split = self._row_format.value_bytes
        for first in range(0, len(ids), _CHUNK_ROWS):
            some = ids[first : first + _CHUNK_ROWS]
            chunk = slice(first, first + len(some))
            expected = self._expected[: len(some)]
            fill_synthetic_rows(self._table_seed, self._row_format, layer, some, expected)
            bad = (values[chunk] != expected[:, :split]).any(axis=1)
            if scales is not None:
                bad |= (scales[chunk] != expected[:, split:]).any(axis=1)
            wrong += int(bad.sum())
        return wrong


def _flat(part: Bytes | None) -> Bytes:
    """uint8 `[R, bytes]`."""
    return part if part is None else part.reshape(-1, part.shape[-1])  # type: ignore[return-value]
