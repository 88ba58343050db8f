"""Small synthetic tables for the tests of the store, and what they must give."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engram.rows import RowFormat, Rows
from engram.store.manifest import DATA_FILE, Schema
from engram.store.reader import StoreReader
from engram.store.synth import SyntheticSource, synthetic_rows
from engram.store.writer import build_table

LAYERS = ((1, 1000), (4, 777))
ROW_FORMAT = RowFormat("fp8-ue8m0", 64)
EXTENT_BLOCKS = 4
TOKEN_MAP = np.arange(2500, dtype=np.int32)[::-1].copy()


def build(path: Path, row_format: RowFormat = ROW_FORMAT, layers=LAYERS, **options) -> Path:
    """A table of two layers: 59 rows a block, extents of 4 blocks, the last ones shorter."""
    schema = Schema('{"family":"test"}', row_format, layers, options.pop("token_map", TOKEN_MAP))
    options = {"extent_blocks": EXTENT_BLOCKS} | options
    build_table(path, schema, SyntheticSource(schema), **options)
    return path


def everything(reader: StoreReader) -> tuple[np.ndarray, np.ndarray]:
    """(layer positions, row ids) of all rows."""
    counts = [rows for _, rows in reader.manifest.layers]
    layers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return layers, np.concatenate([np.arange(rows, dtype=np.int64) for rows in counts])


def expected(reader: StoreReader, layers: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """uint8 `[R, row_bytes]`: what these rows must be."""
    manifest = reader.manifest
    rows = np.empty((len(row_ids), manifest.row_format.row_bytes), np.uint8)
    for position, layer in enumerate(reader.layers):
        chosen = layers == position
        rows[chosen] = synthetic_rows(
            manifest.table_seed, manifest.row_format, layer, row_ids[chosen]
        )
    return rows


def read(reader: StoreReader, layers: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """Gather in order, as packed rows."""
    out = Rows.empty((len(row_ids),), reader.manifest.row_format)
    reader.gather(layers, row_ids, np.arange(len(row_ids)), out)
    return out.packed()


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Flip one bit of a file in place; twice is back."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        found = os.pread(descriptor, 1, byte)
        os.pwrite(descriptor, bytes([found[0] ^ 1 << bit]), byte)
    finally:
        os.close(descriptor)


def data_file(table: Path) -> Path:
    return table / DATA_FILE
