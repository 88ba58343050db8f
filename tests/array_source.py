"""A small schema and a source of its rows out of memory."""

from __future__ import annotations

import numpy as np

from engram.rows import RowFormat
from engram.store.manifest import Schema

BF16 = RowFormat("bf16", 32)
SCHEMA = Schema("{}", BF16, ((1, 3000), (4, 2999)), np.arange(2000, dtype=np.int32))


class ArraySource:
    """Rows out of memory; with an `error`, only the first 2,000 of a layer can be read."""

    def __init__(self, rows, error=None):
        self.description = {"kind": "array"}
        self.rows = rows
        self.error = error
        self.digest = "array"

    def read(self, layer, first_row, out):
        if self.error is not None and first_row + len(out) > 2000:
            raise self.error
        out[:] = self.rows[layer][first_row : first_row + len(out)]


def array_source(schema=SCHEMA, **options):
    rng = np.random.default_rng(1)
    width = schema.row_format.row_bytes
    rows = {layer: rng.integers(0, 256, (n, width), np.uint8) for layer, n in schema.layers}
    return ArraySource(rows, **options)
