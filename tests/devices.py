"""Devices to test on, and what they are to give, by the host's own path."""

import numpy as np
import pytest
import torch

from engram.nn import dequantize

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


def expected(table, tokens, dtype, layers=None, columns=None, **batch):
    """float `[layers, *tokens.shape, columns * dim]`, by the host's own path."""
    rows = table.lookup(tokens, layers=layers, columns=columns, **batch)
    scales = None if rows.scales is None else torch.from_numpy(rows.scales)
    decoded = dequantize(torch.from_numpy(rows.values), scales, table.row_format, dtype)
    return decoded.movedim(-3, 0).flatten(-2)


def same(found, wanted):
    """Bit for bit; NaN is NaN, because devices make it differently."""
    found, nan = found.cpu(), wanted.isnan()
    bits = torch.int32 if wanted.element_size() == 4 else torch.int16
    return (
        found.dtype == wanted.dtype
        and torch.equal(found.isnan(), nan)
        and torch.equal(found.masked_fill(nan, 0).view(bits), wanted.masked_fill(nan, 0).view(bits))
    )


def all_layers(rows):
    return torch.stack([rows[layer] for layer in rows.layers])


def random_ids(table, shape, seed):
    return np.random.default_rng(seed).integers(0, table.spec.vocab_size, shape).astype(np.int32)
