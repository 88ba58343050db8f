"""Whether rows are what the rule of a synthetic table says, every byte of every row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engram.rows import Bytes, RowFormat, Rows
from engram.store.synth import fill_synthetic_rows
from engram.tiers import Int64s

CHUNK_ROWS = 8192
"""What a checker can compare at once."""


class Checker:
    """Compares rows with what they must be, a chunk at a time.

    Args:
        table_seed: `manifest.table_seed` of the table.
    """

    def __init__(self, table_seed: int, row_format: RowFormat) -> None:
        self._table_seed = table_seed
        self._row_format = row_format
        self._expected = np.empty((CHUNK_ROWS, row_format.row_bytes), np.uint8)

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
        step = max(1, CHUNK_ROWS // row_ids.shape[2])
        for first in range(0, len(row_ids), step):
            some = slice(first, first + step)
            mask = slice(None) if checked is None else checked[some]
            for position, layer in enumerate(layers):
                values = rows.values[some, position][mask]
                scales = None if rows.scales is None else rows.scales[some, position][mask]
                wrong += self._wrong_in(layer, row_ids[some, position][mask], values, scales)
        return wrong

    def expected(self, layer: int, row_ids: Int64s) -> Rows:
        """What rows must be, until the next call; not contiguous.

        Args:
            row_ids: int64 `[R]`, at most `CHUNK_ROWS`.
        """
        expected = self._expected[: len(row_ids)]
        fill_synthetic_rows(self._table_seed, self._row_format, layer, row_ids, expected)
        split = self._row_format.value_bytes
        scales = expected[:, split:] if self._row_format.scale_bytes else None
        return Rows(expected[:, :split], scales)

    def _wrong_in(self, layer: int, ids: Int64s, values: Bytes, scales: Bytes | None) -> int:
        """As `wrong_rows`, of one layer: ids of any shape, bytes of that shape."""
        expected = self.expected(layer, np.ascontiguousarray(ids).reshape(-1))
        wrong = (values.reshape(-1, values.shape[-1]) != expected.values).any(axis=1)
        if scales is not None:
            wrong |= (scales.reshape(-1, scales.shape[-1]) != expected.scales).any(axis=1)
        return int(wrong.sum())


def different_rows(rows: Rows, others: Rows) -> int:
    """How many of the rows `[T, layers, columns]` are not the same."""
    different = 0
    step = max(1, CHUNK_ROWS // math.prod(rows.shape[1:]))
    for first in range(0, rows.shape[0], step):
        some = slice(first, first + step)
        unequal = (rows.values[some] != others.values[some]).any(axis=-1)
        if rows.scales is not None and others.scales is not None:
            unequal |= (rows.scales[some] != others.scales[some]).any(axis=-1)
        different += int(unequal.sum())
    return different
