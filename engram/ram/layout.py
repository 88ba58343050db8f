"""Where everything lies in the RAM tier's memory; the ABI between its writer and its readers.

    directory   one per table: a header page, then buckets of eight 8-byte entries, a cache line
                each. An entry is (tag << 32 | slot), or 0. An n-gram's entry is in one of two
                buckets. Tags only narrow the search: the key beside the slot decides.
    slab        `slots_per_slab` slots: first their heads, then, from a page boundary, their
                bundles. A head is one or more cache lines:
                    0 sequence (odd while the slot is written)    8 table number, 12 order (int32)
                    16 the order's canonical ids, newest first, int32
                so finding a slot never touches a bundle, and a bundle never shares a line.
    bundle      per layer, in spec order: all heads' values, then all heads' scales.
    staging     entries for one client's misses: a line whose first word is the request id, then
                a head and a bundle as in a slab.
    reader      written by one reader, for the writer: a header page with its counters and epoch,
                then one byte per slot, how often it was hit since the writer last looked.

All words are little-endian and in the machine's own alignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engram._jit import kernel
from engram.rows import RowFormat
from engram.spec import NgramSpec

MAGIC = int.from_bytes(b"engramRT", "little")
ABI = 2
PAGE_BYTES = 4096
LINE_BYTES = 64
BUCKET_ENTRIES = 8
STAGED_HEAD_BYTES = LINE_BYTES
TOUCHES_MAX = 3

# Words of a directory's header. What changes has a line of its own.
(
    WORD_MAGIC,
    WORD_ABI,
    WORD_BOOT,
    WORD_BOOT_2,
    WORD_FINGERPRINT,
    WORD_FINGERPRINT_2,
    WORD_TABLE,
    WORD_SEED,
    WORD_BUCKETS,
    WORD_SLOT_BYTES,
    WORD_HEAD_BYTES,
    WORD_SLOTS_PER_SLAB,
    WORD_SLOTS,
) = range(13)
WORD_EPOCH = 64
"""In the directory the writer's epoch; in a reader's page the epoch it holds, 0 if none."""
WORD_SLABS = 72
"""Slabs, from the first on, that have memory; reading another would take it."""

# Counters in a reader's page, on one line: lookups and steps; n-grams of tokens that lookups found
# in the arena or not; n-grams of tokens that steps on a device had there, read in place, or staged.
WORD_HITS, WORD_MISSES, WORD_LOOKUPS, WORD_ON_DEVICE, WORD_IN_PLACE, WORD_STAGED = range(8, 14)

# A head, in bytes.
HEAD_TABLE, HEAD_ORDER, HEAD_IDS = 8, 12, 16

_SLAB_SLOTS_MIN, _SLAB_SLOTS_MAX = 64, 1 << 14
_SLABS_WANTED = 16


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class BundleLayout:
    """Bytes of one n-gram's rows.

    Attributes:
        layers, heads: of the table.
        value_bytes, scale_bytes: of one row.
        max_order: longest n-gram.
    """

    layers: int
    heads: int
    value_bytes: int
    scale_bytes: int
    max_order: int

    @classmethod
    def of(cls, spec: NgramSpec, row_format: RowFormat) -> BundleLayout:
        return cls(
            len(spec.layers),
            spec.heads,
            row_format.value_bytes,
            row_format.scale_bytes,
            spec.max_order,
        )

    @property
    def layer_bytes(self) -> int:
        return self.heads * (self.value_bytes + self.scale_bytes)

    @property
    def slot_bytes(self) -> int:
        """A bundle, rounded up to whole cache lines."""
        return _round_up(self.layers * self.layer_bytes, LINE_BYTES)

    @property
    def head_bytes(self) -> int:
        return _round_up(HEAD_IDS + 4 * self.max_order, LINE_BYTES)

    @property
    def staged_bytes(self) -> int:
        """One staged entry: request id, head, bundle."""
        return STAGED_HEAD_BYTES + self.head_bytes + self.slot_bytes


@dataclass(frozen=True)
class ArenaLayout:
    """Slabs of one slot size.

    Attributes:
        slot_bytes, head_bytes: see `BundleLayout`.
        slots_per_slab: a power of two.
        slots: of all slabs; the last one may hold fewer.
    """

    slot_bytes: int
    head_bytes: int
    slots_per_slab: int
    slots: int

    @classmethod
    def within(cls, budget: int, slot_bytes: int, head_bytes: int, tables: int) -> ArenaLayout:
        """As many slots as fit into `budget` bytes, with the directories of `tables` tables."""
        # Directories come in powers of two and slabs in whole pages, so there is no formula.
        fitting, too_many = 0, 1 + budget // (slot_bytes + head_bytes)
        while too_many - fitting > 1:
            slots = (fitting + too_many) // 2
            if cls.with_slots(slots, slot_bytes, head_bytes).total_bytes(tables) <= budget:
                fitting = slots
            else:
                too_many = slots
        return cls.with_slots(fitting, slot_bytes, head_bytes)

    @classmethod
    def with_slots(cls, slots: int, slot_bytes: int, head_bytes: int) -> ArenaLayout:
        """Just so many slots."""
        return cls(slot_bytes, head_bytes, _slots_per_slab(slots), slots)

    @property
    def slabs(self) -> int:
        return -(-self.slots // self.slots_per_slab)

    @property
    def heads_bytes(self) -> int:
        """From a slab's start to its first bundle."""
        return _round_up(self.slots_per_slab * self.head_bytes, PAGE_BYTES)

    def slab_bytes(self, slab: int) -> int:
        """Bytes of slab number `slab`, whole pages."""
        held = min(self.slots_per_slab, self.slots - slab * self.slots_per_slab)
        return self.heads_bytes + _round_up(held * self.slot_bytes, PAGE_BYTES)

    @property
    def buckets(self) -> int:
        """Of one directory: a power of two, so that at most half of all entries are used."""
        wanted = max(1, -(-2 * self.slots // BUCKET_ENTRIES))
        return 1 << (wanted - 1).bit_length()

    @property
    def directory_bytes(self) -> int:
        return PAGE_BYTES + _round_up(self.buckets * LINE_BYTES, PAGE_BYTES)

    @property
    def reader_bytes(self) -> int:
        return PAGE_BYTES + _round_up(self.slots, PAGE_BYTES)

    def total_bytes(self, tables: int) -> int:
        """Slabs and directories together."""
        whole = max(0, self.slabs - 1) * self.slab_bytes(0)
        last = self.slab_bytes(self.slabs - 1) if self.slabs else 0
        return whole + last + tables * self.directory_bytes


def _slots_per_slab(slots: int) -> int:
    wanted = 1 << max(0, (slots // _SLABS_WANTED).bit_length() - 1)
    return min(_SLAB_SLOTS_MAX, max(_SLAB_SLOTS_MIN, wanted))


class View(NamedTuple):
    """A table's part of the RAM tier inside kernels: numbers and addresses only."""

    directory: int
    bucket_mask: int
    seed: int
    table: int
    slabs: int
    slots: int
    slab_shift: int
    heads_bytes: int
    head_bytes: int
    slot_bytes: int
    touched: int
    counters: int
    min_order: int
    layers: int
    heads: int
    layer_bytes: int
    value_bytes: int
    scale_bytes: int


@kernel
def unpack_view(packed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The `View` of its int64 array."""
    return View(
        packed[0],
        packed[1],
        packed[2],
        packed[3],
        packed[4],
        packed[5],
        packed[6],
        packed[7],
        packed[8],
        packed[9],
        packed[10],
        packed[11],
        packed[12],
        packed[13],
        packed[14],
        packed[15],
        packed[16],
        packed[17],
    )


def pack_view(
    arena: ArenaLayout,
    bundle: BundleLayout,
    min_order: int,
    *,
    directory: int,
    seed: int,
    table: int,
    slabs: int,
    reader: int,
) -> np.ndarray:
    """int64 array for `unpack_view`.

    Args:
        directory: address of the table's directory.
        seed: of its hashes, from the header.
        table: its number.
        slabs: address of the int64 addresses of all slabs.
        reader: address of this reader's memory.
    """
    view = View(
        directory + PAGE_BYTES,
        arena.buckets - 1,
        int(np.uint64(seed).astype(np.int64)),
        table,
        slabs,
        arena.slots,
        arena.slots_per_slab.bit_length() - 1,
        arena.heads_bytes,
        arena.head_bytes,
        arena.slot_bytes,
        reader + PAGE_BYTES,
        reader,
        min_order,
        bundle.layers,
        bundle.heads,
        bundle.layer_bytes,
        bundle.value_bytes,
        bundle.scale_bytes,
    )
    return np.array(view, np.int64)
