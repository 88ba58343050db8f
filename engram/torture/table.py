"""The table under torture: V4.1 geometry, every byte a function of its seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram.errors import ConfigError
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.ssd import schema_of
from engram.store.manifest import Manifest, read_manifest
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

_TOKENS, _CANONICAL = 16_384, 12_000
_ROWS_MIN = 200
_GLOBAL_SCALE = 0.37
"""Rounds nearly every product, so that a device which rounds otherwise is seen."""


@dataclass(frozen=True)
class TortureTable:
    """A synthetic table on disk.

    Attributes:
        seed: of its rows, `manifest.table_seed`.
        row_bytes: of all rows together.
    """

    path: Path
    seed: int
    row_bytes: int

    @classmethod
    def at(cls, path: Path) -> TortureTable:
        """The synthetic table at `path`.

        Raises:
            StoreError: no table there, or it is damaged.
            ConfigError: its rows come from elsewhere, so nobody can tell whether they are right.
        """
        manifest, _ = read_manifest(path)
        if manifest.source.get("kind") != "synth":
            raise ConfigError(
                f"{path} is no synthetic table, so its rows cannot be checked; "
                "make one with 'engram synth', or leave --table out"
            )
        return cls(path, manifest.table_seed, _row_bytes(manifest))

    @classmethod
    def make(cls, path: Path, size: int, seed: int, row_format: str = "fp8-ue8m0") -> TortureTable:
        """Build one of about `size` bytes.

        Args:
            row_format: one of `engram.rows.ROW_FORMATS`.
        """
        global_scale = _GLOBAL_SCALE if row_format in ("fp8", "nvfp4") else None
        stored = RowFormat(row_format, _spec(_ROWS_MIN).dim, global_scale)
        spec = _spec(_rows_of(size, stored))
        schema = schema_of(spec, stored)
        build_table(path, schema, SyntheticSource(schema, seed))
        return cls.at(path)


def _row_bytes(manifest: Manifest) -> int:
    return sum(rows for _, rows in manifest.layers) * manifest.row_format.row_bytes


def _rows_of(size: int, row_format: RowFormat) -> int:
    """Rows a head of a table of `size` bytes."""
    tiny = _spec(_ROWS_MIN)
    rows = size // (len(tiny.layers) * tiny.num_columns * row_format.row_bytes)
    if rows < _ROWS_MIN:
        raise ConfigError(f"a table of {size} bytes is too small; give it at least 10MiB")
    return rows


def _spec(rows: int) -> NgramSpec:
    token_map = np.random.default_rng(0).integers(0, _CANONICAL, _TOKENS).astype(np.int32)
    token_map[:_CANONICAL] = np.arange(_CANONICAL)
    return NgramSpec.deepseek_v41(tokenizer=token_map, engram_vocab_size=rows)
