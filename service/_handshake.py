"""One client on its way to a lease: what the sidecar says and hears on the attach socket."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from engram.errors import (
    EngramError,
    OverloadError,
    RequestError,
    SpecMismatchError,
    StoreError,
    UnavailableError,
    UnknownTableError,
)
from engram.proto.v1 import attach_pb2 as pb
from engram.proto.v1.engram_pb2 import Error
from engram.ram._terms import TOKEN_BYTES
from engram.ram.fetch import REQUESTS_IN_FLIGHT_MAX
from engram.ram.frames import (
    DESCRIPTORS_PER_FRAME,
    Deadline,
    Descriptors,
    receive_frame,
    send_frame,
)
from engram.ram.layout import ABI, BundleLayout
from engram.ram.memory import SEALS_OF_READER, SEALS_OF_WRITER, Memory
from engram.ram.misses import TURN_NGRAMS
from engram.ram.tier import RamTier
from engram.store.reader import TableFiles

HANDSHAKE_S = 5.0
"""Time that a client has until its lease holds."""
STAGING_CHUNKS = REQUESTS_IN_FLIGHT_MAX
"""Chunks of a client's staging memory: how many Fetches it may have in flight.

Reserved beside the RAM tier's budget: with as many leases as may be, 256 MiB.
"""
CHUNK_BYTES = 1 << 20
"""About the size of a chunk: a decode step of 64 tokens fits."""
_REFUSAL_S = 0.5

OpenFiles = Callable[[], TableFiles]


@dataclass(eq=False)
class ServedLease:
    """A client that is attached.

    Attributes:
        token: what its Fetches carry.
        table, tier: what it is attached to.
        staging: where its misses are written, `chunks` times `entries_per_chunk` entries of
            `tier.bundle.staged_bytes`. Who writes holds a reference to it.
        reader: its own memory: counters, epoch, hits; may hold anything.
        pid, uid: of the process.
        closed: whether the lease has ended.
    """

    token: bytes
    table: str
    tier: RamTier
    staging: Memory
    reader: Memory
    chunks: int
    entries_per_chunk: int
    pid: int
    uid: int
    closed: bool = False


class Handshake:
    """What can be attached to.

    Args:
        tiers: by name; their caches share memory.
        files: opens the files of tables that clients may read directly, by name.
    """

    def __init__(self, tiers: Mapping[str, RamTier], files: Mapping[str, OpenFiles]) -> None:
        self._tiers = dict(tiers)
        self._files = dict(files)
        self._manifests = {name: _manifest_memory(open_) for name, open_ in files.items()}

    @property
    def manifest_bytes(self) -> int:
        """Of the memory that all clients get the tables' manifests in."""
        return sum(memory.size for memory in self._manifests.values())

    def agree(self, connection: socket.socket, deadline: Deadline) -> ServedLease:
        """Everything up to the client's own memory; what comes is checked first.

        Raises:
            EngramError: why the client cannot attach.
        """
        with Descriptors() as descriptors:
            said = _receive(connection, deadline, descriptors, "request", 0).request
            tier = self._tier(said)
            staging, entries = _staging(tier.bundle)
            token = secrets.token_bytes(TOKEN_BYTES)
            offer = _offer(tier, token, entries)
            self._send_offer(connection, deadline, said.table, offer, tier, staging)
            staging.close_descriptor()
            _send_slabs(connection, deadline, tier)
            _receive(connection, deadline, descriptors, "reader", 1)
            size = tier.cache.layout.reader_bytes
            reader = Memory.received(descriptors.take(), size, SEALS_OF_READER, writable=True)
            reader.close_descriptor()
        pid, uid = peer_of(connection)
        return ServedLease(
            token, said.table, tier, staging, reader, STAGING_CHUNKS, entries, pid, uid
        )

    def _tier(self, said: pb.AttachRequest) -> RamTier:
        if said.abi != ABI:
            raise RequestError(
                f"the client lays out shared memory as version {said.abi}, the sidecar as version "
                f"{ABI}; use the same version of engram for both"
            )
        tier = self._tiers.get(said.table)
        if tier is None:
            raise UnknownTableError(
                f"no table {said.table[:64]!r} is served; tables are {', '.join(self._tiers)}"
            )
        if said.fingerprint != tier.fingerprint:
            raise SpecMismatchError(
                f"{said.table} is another table than the client's (fingerprint "
                f"{tier.fingerprint}); connect again",
                "fingerprint",
            )
        return tier

    def _send_offer(
        self,
        connection: socket.socket,
        deadline: Deadline,
        table: str,
        offer: pb.Offer,
        tier: RamTier,
        staging: Memory,
    ) -> None:
        handed = [tier.cache.directories[tier.number].descriptor, staging.descriptor]
        manifest = self._manifests.get(table)
        if manifest is None:
            return send_frame(connection, pb.FromServer(offer=offer), deadline, handed)
        # A description of its own for each client, which can change its flags and readahead.
        data = self._files[table]().descriptor
        try:
            offer.manifest_bytes = manifest.size
            handed += [manifest.descriptor, data]
            send_frame(connection, pb.FromServer(offer=offer), deadline, handed)
        finally:
            os.close(data)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iII", packed)
    return pid, uid


def confirm(connection: socket.socket, deadline: Deadline) -> None:
    """Tell the client that its lease holds.

    Raises:
        UnavailableError: it is gone.
    """
    send_frame(connection, pb.FromServer(attached=pb.Attached()), deadline)


def refuse(connection: socket.socket, why: Error) -> None:
    """Tell the client why it cannot attach, if it still listens."""
    said = pb.FromServer(refusal=why)
    with suppress(UnavailableError):
        send_frame(connection, said, Deadline(_REFUSAL_S))


def _receive(
    connection: socket.socket, deadline: Deadline, descriptors: Descriptors, kind: str, count: int
) -> pb.FromClient:
    said = receive_frame(connection, pb.FromClient, deadline, descriptors)
    found = said.WhichOneof("says")
    if found != kind or len(descriptors) != count:
        raise RequestError(
            f"the client said {found} with {len(descriptors)} descriptors instead of {kind} with "
            f"{count}; use versions of engram that match"
        )
    return said


def _send_slabs(connection: socket.socket, deadline: Deadline, tier: RamTier) -> None:
    slabs = [slab.descriptor for slab in tier.cache.slabs]
    for first in range(0, len(slabs), DESCRIPTORS_PER_FRAME):
        some = slabs[first : first + DESCRIPTORS_PER_FRAME]
        send_frame(connection, pb.FromServer(slabs=pb.Slabs()), deadline, some)


def _staging(bundle: BundleLayout) -> tuple[Memory, int]:
    """Memory for one client's misses, and how many entries a chunk of it has."""
    entries = min(TURN_NGRAMS, max(1, CHUNK_BYTES // bundle.staged_bytes))
    size = STAGING_CHUNKS * entries * bundle.staged_bytes
    try:
        return Memory.shared("engram-staging", size, SEALS_OF_WRITER), entries
    except EngramError as error:
        raise OverloadError(f"the sidecar has no memory for another client: {error}") from None


def _offer(tier: RamTier, token: bytes, entries: int) -> pb.Offer:
    arena, bundle, cache = tier.cache.layout, tier.bundle, tier.cache
    return pb.Offer(
        abi=ABI,
        boot_id=cache.boot_id.hex(),
        token=token,
        table_number=tier.number,
        seed=cache.seed,
        arena=pb.ArenaLayout(
            slot_bytes=arena.slot_bytes,
            head_bytes=arena.head_bytes,
            slots_per_slab=arena.slots_per_slab,
            slots=arena.slots,
        ),
        bundle=pb.BundleLayout(
            layers=bundle.layers,
            heads=bundle.heads,
            value_bytes=bundle.value_bytes,
            scale_bytes=bundle.scale_bytes,
            max_order=bundle.max_order,
        ),
        staging=pb.Staging(chunks=STAGING_CHUNKS, entries_per_chunk=entries),
    )


def _manifest_memory(open_files: OpenFiles) -> Memory:
    files = open_files()
    os.close(files.descriptor)
    if not files.manifest:
        raise StoreError("a table's manifest is empty; import it again")
    memory = Memory.shared("engram-manifest", len(files.manifest), SEALS_OF_WRITER)
    memory.bytes()[:] = bytearray(files.manifest)
    return memory
