"""What client and sidecar must agree on beyond the schema: errors, packing, bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import numpy as np

from engram._failures import Failures
from engram._jit import copy_bytes, kernel
from engram.errors import (
    EngramError,
    OverloadError,
    RequestError,
    ServiceError,
    SpecMismatchError,
    StoreError,
    UnavailableError,
    UnknownTableError,
)
from engram.proto.v1 import engram_pb2 as pb
from engram.rows import Bytes, Rows
from engram.tiers import Int32s, Int64s, Ngrams

ERROR_CODE_KEY = "engram-error-code"
"""Trailing metadata of a call that engram itself refused: the `ErrorCode` as a number."""


def _other_table(message: str) -> EngramError:
    return SpecMismatchError(message, "fingerprint")


@dataclass(frozen=True)
class Fault:
    """How one kind of failure travels: in the Lookup stream, and as status of a unary call."""

    kind: type[EngramError]
    code: pb.ErrorCode
    status: grpc.StatusCode
    rebuild: Callable[[str], EngramError]


FAULTS = (
    Fault(RequestError, pb.ERROR_CODE_BAD_REQUEST, grpc.StatusCode.INVALID_ARGUMENT, RequestError),
    Fault(
        UnknownTableError,
        pb.ERROR_CODE_UNKNOWN_TABLE,
        grpc.StatusCode.NOT_FOUND,
        UnknownTableError,
    ),
    Fault(
        SpecMismatchError,
        pb.ERROR_CODE_OTHER_TABLE,
        grpc.StatusCode.FAILED_PRECONDITION,
        _other_table,
    ),
    Fault(
        OverloadError, pb.ERROR_CODE_OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadError
    ),
    Fault(
        UnavailableError, pb.ERROR_CODE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, UnavailableError
    ),
    Fault(StoreError, pb.ERROR_CODE_STORE, grpc.StatusCode.DATA_LOSS, StoreError),
    Fault(ServiceError, pb.ERROR_CODE_INTERNAL, grpc.StatusCode.INTERNAL, ServiceError),
)
"""The whole mapping, both ways. The first that fits counts; whatever fits none is INTERNAL."""


def fault_of(error: Exception) -> Fault:
    """How `error` travels."""
    return next((fault for fault in FAULTS if isinstance(error, fault.kind)), FAULTS[-1])


def error_of(code: int, message: str) -> EngramError:
    """The error that came as `code`."""
    return next((f for f in FAULTS if f.code == code), FAULTS[-1]).rebuild(message)


def error_of_call(error: Any, target: str) -> EngramError:
    """The error behind a gRPC call to `target` that ended with the RpcError `error`."""
    status, details = error.code(), error.details() or "no details"
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_CODE_KEY and value.isdecimal():
            return error_of(int(value), details)
    # From here on it was gRPC that failed, or something that is not engram.
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return UnavailableError(f"what answers at {target} is not engram; check the address")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"the sidecar at {target} did not answer in time; is it stopped?")
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        reason = details.rsplit("error: ")[-1]
        return UnavailableError(
            f"the sidecar at {target} cannot be reached ({reason}); is 'engram serve' running?"
        )
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _exhausted(details, target)
    return ServiceError(f"the sidecar at {target} failed with {status.name}: {details}")


def _exhausted(details: str, target: str) -> EngramError:
    if "larger than max" in details:
        # The same again would be refused again, so this is no overload.
        return RequestError(
            f"a message is over the limit of the sidecar at {target} or of this client "
            f"({details}); ask for fewer rows at once"
        )
    return OverloadError(f"the sidecar at {target} has no room ({details}); try again later")


def pack_failures(failures: Failures) -> list[pb.FailedRows]:
    """Failed rows as messages; the inverse of `unpack_failures`."""
    return [
        pb.FailedRows(layer=layer, row_ids=rows, cause=failures.cause)
        for layer, rows in failures.rows.items()
    ]


def unpack_failures(packed: Iterable[pb.FailedRows], failures: Failures) -> None:
    """Add to `failures` what messages say."""
    for each in packed:
        failures.add({each.layer: each.row_ids}, each.cause)


def pack_ngrams(ngrams: Ngrams) -> pb.Ngrams:
    """N-grams as a message; the inverse of `unpack_ngrams`."""
    used = np.arange(ngrams.windows.shape[1]) < ngrams.orders[:, None]
    return pb.Ngrams(
        orders=ngrams.orders.astype(np.uint8).tobytes(),
        ids=ngrams.windows[used].astype("<i4", copy=False).tobytes(),
    )


def unpack_ngrams(packed: pb.Ngrams, min_order: int, max_order: int, vocab_size: int) -> Ngrams:
    """N-grams of a message, every number checked.

    Args:
        vocab_size: number of canonical ids.

    Raises:
        RequestError: an order or id out of range, or too few or too many ids.
    """
    orders = np.frombuffer(packed.orders, np.uint8)
    if orders.size and not min_order <= int(orders.min()) <= int(orders.max()) <= max_order:
        _refuse(f"n-gram orders must be {min_order} to {max_order}")
    wanted = 4 * int(orders.sum(dtype=np.int64))
    if len(packed.ids) != wanted:
        _refuse(f"the n-grams' orders need {wanted} bytes of ids, not {len(packed.ids)}")
    ids = np.frombuffer(packed.ids, "<i4")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        _refuse(f"n-gram ids must be canonical ids, 0 to {vocab_size - 1}")
    windows: Int32s = np.full((orders.size, max_order), -1, np.int32)
    windows[np.arange(max_order) < orders[:, None]] = ids
    return Ngrams(windows, orders.astype(np.int32))


def unpack_row_ids(packed: bytes, rows: int) -> Int64s:
    """Row ids of a message, int64 `[R]`.

    Raises:
        RequestError: not whole int64 numbers, or ids out of `[0, rows)`.
    """
    if len(packed) % 8:
        _refuse(f"row ids must be 8 bytes each; {len(packed)} bytes came")
    ids = np.frombuffer(packed, "<i8").astype(np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        _refuse(f"row ids must be 0 to {rows - 1}")
    return ids


def _refuse(problem: str) -> NoReturn:
    raise RequestError(f"the request is malformed: {problem}; use an engram client that matches")


@kernel
def _scatter(source, places, target, width):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for i in range(places.size):
        copy_bytes(target + places[i] * width, source + i * width, width)


def scatter(chunk: bytes, places: Int64s, out: Bytes) -> None:
    """Copy row i of `chunk` to row `places[i]` of `out`.

    Args:
        chunk: `len(places)` rows, as long as those of `out`.
        places: int64 `[R]`, each below `len(out)`.
        out: uint8 `[R', bytes]`, C-contiguous.
    """
    source = np.frombuffer(chunk, np.uint8)
    _scatter(source.ctypes.data, places, out.ctypes.data, out.shape[1])


def scatter_rows(reply: pb.LookupResponse, places: Int64s, out: Rows) -> None:
    """Copy the rows of a reply whose lengths were checked to `places` in `out`."""
    scatter(reply.values, places, out.values)
    if out.scales is not None:
        scatter(reply.scales, places, out.scales)


def scatter_twin(chunk: bytes, places: Int64s, out: Bytes) -> None:
    """`scatter` in NumPy: its oracle."""
    out[places] = np.frombuffer(chunk, np.uint8).reshape(len(places), out.shape[1])
