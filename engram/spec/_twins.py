"""The kernels again in NumPy, written from the definitions: their oracle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from engram.spec._batch import Batch
    from engram.spec._spec import NgramSpec

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def windows_twin(
    tokens: Int32s,
    starts: Int64s,
    history: Int32s,
    token_map: Int32s | None,
    blocked_id: int,
    boundary_id: int | None,
) -> Int32s:
    """`_kernels.windows`: int32 `[T, max_order]`; a token of -1 is dead."""
    width = history.shape[1] + 1
    out = np.empty((len(tokens), width), np.int32)
    for b, (first, last) in enumerate(pairwise(starts)):
        raw = np.concatenate([history[b], tokens[first:last]])
        ids = raw if token_map is None else np.where(raw < 0, -1, token_map[raw])
        blocked = np.zeros(last - first, bool)
        for s in range(width):
            shifted = ids[width - 1 - s : len(ids) - s]
            blocked |= shifted < 0
            if s and boundary_id is not None:
                blocked |= shifted == boundary_id
            out[first:last, s] = np.where(blocked, blocked_id, shifted)
    return out


def hash_windows_twin(
    windows: Int32s,
    multipliers: Int64s,
    primes: Int64s,
    offsets: Int64s,
    min_order: int,
    heads: int,
) -> Int64s:
    """`_kernels.hash_windows`: int64 `[N, layers, columns]`."""
    layers, max_order = multipliers.shape
    out = np.empty((len(windows), layers, primes.shape[1]), np.int64)
    for layer in range(layers):
        words = np.zeros(len(windows), np.int64)
        for s in range(max_order):
            words ^= windows[:, s].astype(np.int64) * multipliers[layer, s]
            first = (s + 1 - min_order) * heads
            if first >= 0:
                of_order = slice(first, first + heads)
                out[:, layer, of_order] = (
                    np.remainder(words[:, None], primes[layer, of_order]) + offsets[layer, of_order]
                )
    return out


def hash_ngrams_twin(
    all_rows: Int64s,
    orders: Int32s,
    layers: Sequence[int],
    columns: Sequence[int],
    min_order: int,
    heads: int,
) -> tuple[Int32s, Int64s]:
    """`_kernels.hash_ngrams`, given the rows `[N, layers, columns]` of every column.

    Rows of longer orders than an n-gram's own are never looked at.
    """
    found = [
        (layer, all_rows[n, layer, column])
        for n, order in enumerate(orders)
        for layer in layers
        for column in columns
        if column // heads == order - min_order
    ]
    positions, row_ids = zip(*found, strict=True) if found else ((), ())
    return np.array(positions, np.int32), np.array(row_ids, np.int64)


def row_ids_twin(spec: NgramSpec, batch: Batch) -> Int64s:
    """`NgramSpec.row_ids` of a checked batch: int64 `[T, layers, columns]`."""
    return hash_windows_twin(
        windows_twin(
            batch.tokens,
            batch.starts,
            batch.history,
            spec.token_map,
            spec.blocked_id,
            spec.boundary_id,
        ),
        np.array([each.multipliers for each in spec.layers], np.int64),
        np.array([each.primes for each in spec.layers], np.int64),
        np.array([each.offsets for each in spec.layers], np.int64),
        spec.min_order,
        spec.heads,
    )
