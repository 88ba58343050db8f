# ruff: noqa: ANN001, ANN202 - kernels are typed by what they are called with
# mypy: ignore-errors
"""Compiled: windows to the hashes that samples are drawn by; those of the RAM tier, seed 0."""

from __future__ import annotations

import numpy as np

from engram._jit import kernel
from engram.ram._directory import id_of, ids_at, ngram_hash
from engram.store.checks import mix64

SEED = 0
_U64 = np.uint64


@kernel
def hash_windows(windows, min_order, out):
    """Set `out` uint64 `[T, orders]` for C-contiguous int32 `[T, max_order]` windows."""
    for token in range(len(windows)):
        ids = ids_at(windows, token)
        state = ngram_hash(_U64(SEED), ids, min_order - 1)
        for o in range(out.shape[1]):
            state = mix64(state ^ id_of(ids, min_order - 1 + o))
            out[token, o] = state


@kernel
def hash_ngrams(windows, orders, out):
    """Set `out` uint64 `[N]` for n-grams: int32 `[N, max_order]`, uint8 `[N]`."""
    for n in range(len(orders)):
        out[n] = ngram_hash(_U64(SEED), ids_at(windows, n), orders[n])
