"""What a sidecar offers on the attach socket, checked against what its client knows itself."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from engram.errors import ServiceError
from engram.proto.v1 import attach_pb2 as pb
from engram.ram.frames import Descriptors
from engram.ram.layout import (
    ABI,
    MAGIC,
    WORD_ABI,
    WORD_BOOT,
    WORD_BUCKETS,
    WORD_FINGERPRINT,
    WORD_HEAD_BYTES,
    WORD_MAGIC,
    WORD_SEED,
    WORD_SLOT_BYTES,
    WORD_SLOTS,
    WORD_SLOTS_PER_SLAB,
    WORD_TABLE,
    ArenaLayout,
    BundleLayout,
)
from engram.ram.memory import SEALS_OF_WRITER, Memory
from engram.store.reader import TableFiles

TOKEN_BYTES = 16
_BOOT_BYTES = 16
_SLOTS_MAX = 2**31
_SLABS_MAX = 1 << 16
_CHUNKS_MAX = 1 << 10
_ENTRIES_MAX = 1 << 16
_MANIFEST_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class Wanted:
    """What a client attaches for; its own numbers, to hold the sidecar's against."""

    table: str
    fingerprint: str
    bundle: BundleLayout
    min_order: int


@dataclass(frozen=True)
class Terms:
    """An offer that adds up.

    Attributes:
        boot_id: of the sidecar, hexadecimal.
        token: for every Fetch.
        table_number, seed: of the table in the arena.
        arena: slabs.
        chunks, entries_per_chunk: of the staging memory.
        manifest_bytes: size of `table.json`, or 0.
    """

    boot_id: str
    token: bytes
    table_number: int
    seed: int
    arena: ArenaLayout
    chunks: int
    entries_per_chunk: int
    manifest_bytes: int

    @classmethod
    def of(cls, offer: pb.Offer, wanted: Wanted) -> Terms:
        """Check an offer.

        Raises:
            ServiceError: it is for other memory than the client's own spec needs.
        """
        bundle, arena = _bundle(offer.bundle), _arena(offer.arena)
        staging = offer.staging
        for name, found, needed in (
            ("ABI version", offer.abi, ABI),
            ("bundles", bundle, wanted.bundle),
            ("bytes of a slot", arena.slot_bytes, wanted.bundle.slot_bytes),
            ("bytes of a slot's head", arena.head_bytes, wanted.bundle.head_bytes),
        ):
            if found != needed:
                _refuse(f"{name} {found}, needed are {needed}")
        per_slab = arena.slots_per_slab
        for name, found, low, high in (
            ("slots", arena.slots, 0, _SLOTS_MAX),
            ("slots of a slab", per_slab if per_slab & (per_slab - 1) == 0 else -1, 1, _SLOTS_MAX),
            ("slabs", arena.slabs if per_slab else 0, 0, _SLABS_MAX),
            ("staging chunks", staging.chunks, 1, _CHUNKS_MAX),
            ("entries of a chunk", staging.entries_per_chunk, 1, _ENTRIES_MAX),
            ("bytes of table.json", offer.manifest_bytes, 0, _MANIFEST_BYTES_MAX),
            ("bytes of the token", len(offer.token), TOKEN_BYTES, TOKEN_BYTES),
            ("bytes of the boot id", len(_unhex(offer.boot_id)), _BOOT_BYTES, _BOOT_BYTES),
        ):
            if not low <= found <= high:
                _refuse(f"{name} {found}, which cannot be")
        return cls(
            offer.boot_id,
            offer.token,
            offer.table_number,
            offer.seed,
            arena,
            staging.chunks,
            staging.entries_per_chunk,
            offer.manifest_bytes,
        )

    def check_header(self, directory: Memory, wanted: Wanted) -> None:
        """Compare a directory's header with the offer.

        Raises:
            ServiceError: it is another directory's, or none.
        """
        words = directory.words(WORD_SLOTS + 1)
        boot, boot_2 = np.frombuffer(bytes.fromhex(self.boot_id), np.uint64)
        content, content_2 = np.frombuffer(bytes.fromhex(wanted.fingerprint), np.uint64)
        expected = {
            WORD_MAGIC: MAGIC,
            WORD_ABI: ABI,
            WORD_BOOT: boot,
            WORD_BOOT + 1: boot_2,
            WORD_FINGERPRINT: content,
            WORD_FINGERPRINT + 1: content_2,
            WORD_TABLE: self.table_number,
            WORD_SEED: self.seed,
            WORD_BUCKETS: self.arena.buckets,
            WORD_SLOT_BYTES: self.arena.slot_bytes,
            WORD_HEAD_BYTES: self.arena.head_bytes,
            WORD_SLOTS_PER_SLAB: self.arena.slots_per_slab,
            WORD_SLOTS: self.arena.slots,
        }
        for word, value in expected.items():
            if int(words[word]) != int(value):
                _refuse(f"a directory whose word {word} is {int(words[word]):#x}")


class Offered:
    """Memory and files that came with an offer.

    Attributes:
        directory, staging: mapped.
    """

    def __init__(
        self, directory: Memory, staging: Memory, manifest: Memory | None, data: int
    ) -> None:
        self.directory, self.staging = directory, staging
        self._manifest, self._data = manifest, data
        self._close = weakref.finalize(self, _close, data)

    @classmethod
    def of(cls, terms: Terms, wanted: Wanted, descriptors: Descriptors) -> Offered:
        """Map what came.

        Raises:
            ServiceError: it is not what the terms say.
        """
        needed = 4 if terms.manifest_bytes else 2
        if len(descriptors) != needed:
            _refuse(f"{len(descriptors)} descriptors, needed are {needed}")
        directory = map_offered(descriptors, terms.arena.directory_bytes)
        terms.check_header(directory, wanted)
        entries = terms.chunks * terms.entries_per_chunk
        staging = map_offered(descriptors, entries * wanted.bundle.staged_bytes)
        if not terms.manifest_bytes:
            return cls(directory, staging, None, -1)
        manifest = map_offered(descriptors, terms.manifest_bytes)
        return cls(directory, staging, manifest, descriptors.take())

    def files(self) -> TableFiles | None:
        """The table's own, with a descriptor that the caller closes; None if there are none."""
        if self._manifest is None or not self._close.alive:
            return None
        return TableFiles(self._manifest.bytes().tobytes(), os.dup(self._data))

    def close_data(self) -> None:
        """Close the data file; safe to call twice."""
        self._close()


def map_offered(descriptors: Descriptors, size: int) -> Memory:
    """Map the next descriptor read-only, and close it.

    Raises:
        ServiceError: there is none, or it is not sealed memory of `size` bytes.
    """
    if not len(descriptors):
        _refuse("fewer descriptors than slabs")
    memory = Memory.received(descriptors.take(), size, SEALS_OF_WRITER)
    memory.close_descriptor()
    return memory


def _bundle(packed: pb.BundleLayout) -> BundleLayout:
    return BundleLayout(
        packed.layers, packed.heads, packed.value_bytes, packed.scale_bytes, packed.max_order
    )


def _arena(packed: pb.ArenaLayout) -> ArenaLayout:
    return ArenaLayout(packed.slot_bytes, packed.head_bytes, packed.slots_per_slab, packed.slots)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _refuse(found: Any) -> NoReturn:
    raise ServiceError(f"the sidecar offers {found}; use versions of engram that match")
