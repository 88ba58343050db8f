from . import engram_pb2 as _engram_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromClient(_message.Message):
    __slots__ = ("request", "reader")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    request: AttachRequest
    reader: Reader
    def __init__(self, request: _Optional[_Union[AttachRequest, _Mapping]] = ..., reader: _Optional[_Union[Reader, _Mapping]] = ...) -> None: ...

class FromServer(_message.Message):
    __slots__ = ("refusal", "offer", "slabs", "attached")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    refusal: _engram_pb2.Error
    offer: Offer
    slabs: Slabs
    attached: Attached
    def __init__(self, refusal: _Optional[_Union[_engram_pb2.Error, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., slabs: _Optional[_Union[Slabs, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("abi", "table", "fingerprint")
    ABI_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    abi: int
    table: str
    fingerprint: str
    def __init__(self, abi: _Optional[int] = ..., table: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("abi", "boot_id", "token", "table_number", "seed", "arena", "bundle", "staging", "manifest_bytes")
    ABI_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TABLE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    abi: int
    boot_id: str
    token: bytes
    table_number: int
    seed: int
    arena: ArenaLayout
    bundle: BundleLayout
    staging: Staging
    manifest_bytes: int
    def __init__(self, abi: _Optional[int] = ..., boot_id: _Optional[str] = ..., token: _Optional[bytes] = ..., table_number: _Optional[int] = ..., seed: _Optional[int] = ..., arena: _Optional[_Union[ArenaLayout, _Mapping]] = ..., bundle: _Optional[_Union[BundleLayout, _Mapping]] = ..., staging: _Optional[_Union[Staging, _Mapping]] = ..., manifest_bytes: _Optional[int] = ...) -> None: ...

class ArenaLayout(_message.Message):
    __slots__ = ("slot_bytes", "head_bytes", "slots_per_slab", "slots")
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_SLAB_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slot_bytes: int
    head_bytes: int
    slots_per_slab: int
    slots: int
    def __init__(self, slot_bytes: _Optional[int] = ..., head_bytes: _Optional[int] = ..., slots_per_slab: _Optional[int] = ..., slots: _Optional[int] = ...) -> None: ...

class BundleLayout(_message.Message):
    __slots__ = ("layers", "heads", "value_bytes", "scale_bytes", "max_order")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    VALUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCALE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ORDER_FIELD_NUMBER: _ClassVar[int]
    layers: int
    heads: int
    value_bytes: int
    scale_bytes: int
    max_order: int
    def __init__(self, layers: _Optional[int] = ..., heads: _Optional[int] = ..., value_bytes: _Optional[int] = ..., scale_bytes: _Optional[int] = ..., max_order: _Optional[int] = ...) -> None: ...

class Staging(_message.Message):
    __slots__ = ("chunks", "entries_per_chunk")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_PER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    entries_per_chunk: int
    def __init__(self, chunks: _Optional[int] = ..., entries_per_chunk: _Optional[int] = ...) -> None: ...

class Slabs(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reader(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Attached(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
