"""Whose rows failed, where several n-grams, or several callers' n-grams, were read together."""

from __future__ import annotations

import numpy as np

from engram._failures import Failures
from engram.spec import NgramSpec
from engram.tiers import Int64s, Ngrams, Selection


class RowsOf:
    """Rows of a table's n-grams under a selection."""

    def __init__(self, spec: NgramSpec, selection: Selection) -> None:
        self._spec = spec
        self._selection = selection
        self._layer_ids = np.array(spec.layer_ids, np.int64)

    def touched(self, ngrams: Ngrams, failures: Failures) -> np.ndarray:
        """bool `[N]`: which n-grams have a row that failed."""
        failed = _failed(*self._row_ids(ngrams), failures)
        touched: np.ndarray = np.asarray(failed.any(axis=1))
        return touched

    def failures_among(self, ngrams: Ngrams, failures: Failures) -> Failures:
        """Those failures that are rows of `ngrams`."""
        layers, ids = self._row_ids(ngrams)
        failed = _failed(layers, ids, failures)
        mine = Failures()
        for layer in np.unique(layers[failed]).tolist():
            mine.add({layer: ids[failed & (layers == layer)].tolist()}, failures.cause)
        return mine

    def _row_ids(self, ngrams: Ngrams) -> tuple[Int64s, Int64s]:
        """Model layer and row id of every row, int64 `[N, rows]`."""
        selection = self._selection
        positions, ids = self._spec.ngram_rows(
            ngrams.windows,
            ngrams.orders,
            selection.layer_array,
            selection.column_array,
            selection.ordered,
            selection.order_bounds,
        )
        layers = self._layer_ids[positions]
        return layers.reshape(len(ngrams), -1), ids.reshape(len(ngrams), -1)


def _failed(layers: Int64s, ids: Int64s, failures: Failures) -> np.ndarray:
    """bool, shaped like `ids`: which of these rows failed."""
    failed = np.zeros(ids.shape, np.bool_)
    for layer, rows in failures.rows.items():
        failed |= (layers == layer) & np.isin(ids, np.array(rows, np.int64))
    return failed
