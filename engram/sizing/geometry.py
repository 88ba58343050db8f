"""What a number of n-grams takes of a table: memory in each tier, reads, and pages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from engram.ram.layout import ArenaLayout, BundleLayout
from engram.store.layout import PAGE_BYTES
from engram.store.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Geometry:
    """Sizes of one table.

    Attributes:
        name: how messages name it.
        fingerprint: of the table.
        bundle: of one n-gram.
        rows: that an n-gram has; each is one 4 KiB read from disk.
        pages: of the file that hold rows.
        rows_per_page: that a page has room for.
    """

    name: str
    fingerprint: str
    bundle: BundleLayout
    rows: int
    pages: int
    rows_per_page: int

    @classmethod
    def of(cls, path: Path) -> Geometry:
        """That of the table at `path`; only its manifest is read.

        Raises:
            StoreError: no table there, or its manifest is damaged.
        """
        manifest, _ = read_manifest(path)
        return cls.of_manifest(manifest, str(path))

    @classmethod
    def of_manifest(cls, manifest: Manifest, name: str) -> Geometry:
        spec, row = json.loads(manifest.spec), manifest.row_format
        layers = len(manifest.layers)
        bundle = BundleLayout(
            layers, spec["heads"], row.value_bytes, row.scale_bytes, spec["max_order"]
        )
        return cls(
            name=name,
            fingerprint=manifest.fingerprint,
            bundle=bundle,
            rows=layers * spec["heads"],
            pages=sum(manifest.layout.blocks(rows) for _, rows in manifest.layers),
            rows_per_page=manifest.layout.rows_per_block,
        )

    def ram_bytes(self, slots: float) -> int:
        """Memory of a RAM tier of so many slots, directory included."""
        return self._arena(math.ceil(slots)).total_bytes(1)

    def ram_slots(self, size: int) -> int:
        """Slots of a RAM tier of `size` bytes."""
        return ArenaLayout.within(size, self.bundle.slot_bytes, self.bundle.head_bytes, 1).slots

    def hbm_slots(self, size: int) -> int:
        """Slots of `size` bytes on a device, when all columns are looked up."""
        return size // self.bundle.slot_bytes

    def pages_of(self, ngrams: float) -> float:
        """Different pages that the rows of so many n-grams lie on, which hashing scatters over
        the table: what is expected of throwing as many balls into as many bins."""
        return -self.pages * math.expm1(-ngrams * self.rows / self.pages)

    def pages_bytes(self, ngrams: float) -> int:
        """Bytes of `pages_of`."""
        return round(self.pages_of(ngrams)) * PAGE_BYTES

    def pages_bytes_worst(self, ngrams: float) -> int:
        """Bytes of pages if no two rows shared one."""
        return min(math.ceil(ngrams) * self.rows, self.pages) * PAGE_BYTES

    def _arena(self, slots: int) -> ArenaLayout:
        return ArenaLayout.with_slots(slots, self.bundle.slot_bytes, self.bundle.head_bytes)
