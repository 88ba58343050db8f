"""What an import is to make: its extents, its identity, its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from engram.errors import CorruptTableError, SpecError
from engram.store.layout import EXTENT_BLOCKS, BlockLayout
from engram.store.manifest import Extent, Manifest, Schema, extent_key
from engram.store.source import RowSource, table_seed_of
from engram.store.tree import PlacedValue


@dataclass(frozen=True, slots=True)
class Part:
    """One extent to be: rows of a model layer."""

    layer: int
    first_row: int
    rows: int

    @property
    def key(self) -> bytes:
        return extent_key(self.layer, self.first_row)


@dataclass(frozen=True)
class Plan:
    """Schema and source of a table, and what follows from them.

    Raises:
        SpecError: a schema without rows, or layers out of order.
        StoreError: rows that do not fit a block.
    """

    schema: Schema
    source: RowSource
    table_seed: int
    layout: BlockLayout

    @classmethod
    def of(
        cls,
        schema: Schema,
        source: RowSource,
        table_seed: int | None = None,
        extent_blocks: int = EXTENT_BLOCKS,
    ) -> Plan:
        """Fill in what the caller left open."""
        layers = [layer for layer, _ in schema.layers]
        rows = [count for _, count in schema.layers]
        if not layers or layers != sorted(set(layers)) or min(rows) < 1:
            raise SpecError(
                "a table needs layers in ascending order, each with rows, "
                f"not {list(schema.layers)}"
            )
        seed = table_seed_of(schema, source.digest) if table_seed is None else table_seed
        return cls(schema, source, seed, BlockLayout(schema.row_format.row_bytes, extent_blocks))

    @cached_property
    def parts(self) -> list[Part]:
        """All extents in key order."""
        step = self.layout.rows_per_extent
        return [
            Part(layer, first, min(step, rows - first))
            for layer, rows in self.schema.layers
            for first in range(0, rows, step)
        ]

    @cached_property
    def row_bytes_before(self) -> list[int]:
        """Row bytes of all extents before each one, and of all at the end."""
        return list(
            accumulate((part.rows * self.layout.row_bytes for part in self.parts), initial=0)
        )

    @property
    def file_bytes(self) -> int:
        """Upper bound of the data file's size."""
        token_map = self.schema.token_map
        rows = [count for _, count in self.schema.layers]
        return self.layout.file_bytes(rows) + (0 if token_map is None else token_map.nbytes)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-ready; equal for imports that make the same file of the same rows."""
        schema = self.schema
        return {
            "spec": schema.spec,
            "row_format": schema.row_format.to_dict(),
            "layers": [list(layer) for layer in schema.layers],
            "token_map": schema.token_map_digest,
            "source": self.source.digest,
            "table_seed": self.table_seed,
            "extent_blocks": self.layout.extent_blocks,
        }

    def check_place(self, value: PlacedValue | None, part: Part) -> PlacedValue:
        """Require `value` to be the extent `part`, in pages of its own.

        Raises:
            CorruptTableError: it is not.
        """
        if (
            value is None
            or value.page is None
            or value.key != part.key
            or value.length != self.layout.value_bytes(part.rows)
        ):
            raise CorruptTableError(
                f"layer {part.layer} row {part.first_row} is not where LMDB was told to put it; "
                "import again"
            )
        return value

    def manifest(self, digests: list[str]) -> Manifest:
        """The manifest of the finished table, from the digests of its extents."""
        schema = self.schema
        return Manifest(
            spec=schema.spec,
            row_format=schema.row_format,
            layers=schema.layers,
            token_map_digest=schema.token_map_digest,
            table_seed=self.table_seed,
            extent_blocks=self.layout.extent_blocks,
            extents=tuple(
                Extent(part.layer, part.first_row, part.rows, found)
                for part, found in zip(self.parts, digests, strict=True)
            ),
            source={**self.source.description, "digest": self.source.digest},
        )
