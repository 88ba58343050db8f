from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_BAD_REQUEST: _ClassVar[ErrorCode]
    ERROR_CODE_UNKNOWN_TABLE: _ClassVar[ErrorCode]
    ERROR_CODE_OTHER_TABLE: _ClassVar[ErrorCode]
    ERROR_CODE_OVERLOADED: _ClassVar[ErrorCode]
    ERROR_CODE_UNAVAILABLE: _ClassVar[ErrorCode]
    ERROR_CODE_STORE: _ClassVar[ErrorCode]
    ERROR_CODE_INTERNAL: _ClassVar[ErrorCode]
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_BAD_REQUEST: ErrorCode
ERROR_CODE_UNKNOWN_TABLE: ErrorCode
ERROR_CODE_OTHER_TABLE: ErrorCode
ERROR_CODE_OVERLOADED: ErrorCode
ERROR_CODE_UNAVAILABLE: ErrorCode
ERROR_CODE_STORE: ErrorCode
ERROR_CODE_INTERNAL: ErrorCode

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesResponse(_message.Message):
    __slots__ = ("tables", "boot_id")
    class Table(_message.Message):
        __slots__ = ("name", "fingerprint")
        NAME_FIELD_NUMBER: _ClassVar[int]
        FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        name: str
        fingerprint: str
        def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...
    TABLES_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[ListTablesResponse.Table]
    boot_id: str
    def __init__(self, tables: _Optional[_Iterable[_Union[ListTablesResponse.Table, _Mapping]]] = ..., boot_id: _Optional[str] = ...) -> None: ...

class GetTableRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetTableResponse(_message.Message):
    __slots__ = ("name", "fingerprint", "boot_id", "spec", "token_map", "row_format", "layers", "limits", "attach")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MAP_FIELD_NUMBER: _ClassVar[int]
    ROW_FORMAT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    boot_id: str
    spec: str
    token_map: bytes
    row_format: RowFormat
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    limits: Limits
    attach: bool
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., boot_id: _Optional[str] = ..., spec: _Optional[str] = ..., token_map: _Optional[bytes] = ..., row_format: _Optional[_Union[RowFormat, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., attach: bool = ...) -> None: ...

class RowFormat(_message.Message):
    __slots__ = ("name", "dim", "global_scale")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    global_scale: float
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., global_scale: _Optional[float] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("layer", "rows")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: int
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_rows", "max_message_bytes")
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_rows: int
    max_message_bytes: int
    def __init__(self, max_rows: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class Ngrams(_message.Message):
    __slots__ = ("orders", "ids")
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    orders: bytes
    ids: bytes
    def __init__(self, orders: _Optional[bytes] = ..., ids: _Optional[bytes] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("request_id", "table", "fingerprint", "ngrams", "cancel")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NGRAMS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    table: str
    fingerprint: str
    ngrams: Ngrams
    cancel: int
    def __init__(self, request_id: _Optional[int] = ..., table: _Optional[str] = ..., fingerprint: _Optional[str] = ..., ngrams: _Optional[_Union[Ngrams, _Mapping]] = ..., cancel: _Optional[int] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("request_id", "boot_id", "error", "draining")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    boot_id: str
    error: Error
    draining: bool
    def __init__(self, request_id: _Optional[int] = ..., boot_id: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., draining: bool = ...) -> None: ...

class NgramLookup(_message.Message):
    __slots__ = ("ngrams", "layers", "columns")
    NGRAMS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ngrams: Ngrams
    layers: _containers.RepeatedScalarFieldContainer[int]
    columns: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ngrams: _Optional[_Union[Ngrams, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., columns: _Optional[_Iterable[int]] = ...) -> None: ...

class RowLookup(_message.Message):
    __slots__ = ("layer", "row_ids")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    row_ids: bytes
    def __init__(self, layer: _Optional[int] = ..., row_ids: _Optional[bytes] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("request_id", "table", "fingerprint", "ngrams", "rows")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NGRAMS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    table: str
    fingerprint: str
    ngrams: NgramLookup
    rows: RowLookup
    def __init__(self, request_id: _Optional[int] = ..., table: _Optional[str] = ..., fingerprint: _Optional[str] = ..., ngrams: _Optional[_Union[NgramLookup, _Mapping]] = ..., rows: _Optional[_Union[RowLookup, _Mapping]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("request_id", "boot_id", "first_row", "rows", "last", "failed", "error", "draining", "values", "scales")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    boot_id: str
    first_row: int
    rows: int
    last: bool
    failed: _containers.RepeatedCompositeFieldContainer[FailedRows]
    error: Error
    draining: bool
    values: bytes
    scales: bytes
    def __init__(self, request_id: _Optional[int] = ..., boot_id: _Optional[str] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., last: bool = ..., failed: _Optional[_Iterable[_Union[FailedRows, _Mapping]]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., draining: bool = ..., values: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("request_id", "token", "chunk", "ngrams", "timeout_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    NGRAMS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    token: bytes
    chunk: int
    ngrams: Ngrams
    timeout_ms: int
    def __init__(self, request_id: _Optional[int] = ..., token: _Optional[bytes] = ..., chunk: _Optional[int] = ..., ngrams: _Optional[_Union[Ngrams, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("request_id", "boot_id", "failed", "error", "draining")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    boot_id: str
    failed: _containers.RepeatedCompositeFieldContainer[FailedRows]
    error: Error
    draining: bool
    def __init__(self, request_id: _Optional[int] = ..., boot_id: _Optional[str] = ..., failed: _Optional[_Iterable[_Union[FailedRows, _Mapping]]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., draining: bool = ...) -> None: ...

class FailedRows(_message.Message):
    __slots__ = ("layer", "row_ids", "cause")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    row_ids: _containers.RepeatedScalarFieldContainer[int]
    cause: str
    def __init__(self, layer: _Optional[int] = ..., row_ids: _Optional[_Iterable[int]] = ..., cause: _Optional[str] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ...) -> None: ...
