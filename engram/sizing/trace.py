"""Traces: which n-grams were asked for, as a sample in a file. Layout in `docs/formats.md`.

A trace holds canonical ids, never text. Who has the tokenizer can read short pieces out of it
(n-grams), and all of the text if every n-gram was recorded (level 0).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from engram.errors import TraceError
from engram.sizing.simulator import LEVEL_MAX, Hashes, hash_ngrams
from engram.store.files import open_regular
from engram.tiers import Int32s, Int64s

MAGIC, VERSION = b"engramTR", 1
FILE_BYTES_MAX = 1 << 30
_HEADER = struct.Struct("<8sIBBBx16s16sQQQQ")
_LOOKUP = np.dtype([("samples", "<u8"), ("tokens", "<u8"), ("accesses", "<u8")])
_CHECKSUM_BYTES = 16
_COUNT_LIMIT = 2**56


@dataclass(frozen=True)
class Trace:
    """Sampled n-grams of lookups, in the order in which they were asked for.

    Attributes:
        fingerprint: of the table they were asked of, 32 hexadecimal digits.
        spec_digest: of its spec, likewise.
        level: n-grams whose hash begins with so many zero bits were recorded: one in 2 ** level.
        min_order: of the spec.
        lookups: int64 `[B, 3]`: up to the end of each lookup of which something was recorded, the
            n-grams recorded, the tokens looked up and the n-grams asked for, since the start.
        windows: int32 `[S, max_order]`, canonical ids, newest first; -1 from the order on.
        orders: uint8 `[S]`.
        tokens, accesses: of all lookups.
    """

    fingerprint: str
    spec_digest: str
    level: int
    min_order: int
    lookups: Int64s
    windows: Int32s
    orders: npt.NDArray[np.uint8]
    tokens: int
    accesses: int

    @property
    def max_order(self) -> int:
        return int(self.windows.shape[1])

    @property
    def starts(self) -> Int64s:
        """int64 `[B + 1]`: where each lookup begins among the samples, then S."""
        return np.concatenate([[0], self.lookups[:, 0]]).astype(np.int64)

    def hashes(self) -> Hashes:
        """uint64 `[S]`."""
        return hash_ngrams(self.windows, self.orders)

    def require_table(self, fingerprint: str, name: str) -> None:
        """Refuse another table than that of the recording.

        Raises:
            TraceError: both fingerprints are named.
        """
        if fingerprint != self.fingerprint:
            raise TraceError(
                f"the trace is of the table with fingerprint {self.fingerprint}, but {name} has "
                f"{fingerprint}; record a trace of this table"
            )


def write_trace(path: Path, trace: Trace, *, replace: bool = False) -> None:
    """Write a whole file, or none.

    Args:
        replace: take the place of a file that is there.

    Raises:
        TraceError: the file exists.
        OSError: it cannot be written.
    """
    lookups = np.empty(len(trace.lookups), _LOOKUP)
    for column, name in enumerate(_LOOKUP.names or ()):
        lookups[name] = trace.lookups[:, column]
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        trace.level,
        trace.min_order,
        trace.max_order,
        bytes.fromhex(trace.fingerprint),
        bytes.fromhex(trace.spec_digest),
        trace.tokens,
        trace.accesses,
        len(trace.lookups),
        len(trace.orders),
    )
    windows = np.ascontiguousarray(trace.windows, "<i4").tobytes()
    body = b"".join([header, lookups.tobytes(), trace.orders.tobytes(), windows])
    if path.exists() and not replace:
        raise TraceError(f"{path} exists; remove it, or name another file")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(body + xxhash.xxh3_128_digest(body))
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            unfinished.replace(path)
        else:
            os.link(unfinished, path)
    except FileExistsError:
        raise TraceError(f"{path} exists; remove it, or name another file") from None
    finally:
        unfinished.unlink(missing_ok=True)


def read_trace(path: Path) -> Trace:
    """Read and verify a file.

    Raises:
        TraceError: no trace, of another version, damaged, or over `FILE_BYTES_MAX`.
    """
    try:
        with open(open_regular(path), "rb") as stream:
            # Asked for more than there is, a stream makes room for all of it first.
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(min(size, FILE_BYTES_MAX))
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; check the path") from None
    if size > FILE_BYTES_MAX:
        raise TraceError(f"{path} is over {FILE_BYTES_MAX >> 20} MiB, more than any trace")
    try:
        return _parsed(memoryview(data))
    except ValueError as error:
        raise TraceError(f"{path}: {error}; record it again") from None


def _parsed(data: memoryview) -> Trace:
    """The trace in `data`; ValueError says what is wrong with it."""
    if len(data) < _HEADER.size + _CHECKSUM_BYTES or data[: len(MAGIC)] != MAGIC:
        raise ValueError("this is no trace")
    _, version, level, low, high, table, spec, tokens, accesses, count, samples = (
        _HEADER.unpack_from(data)
    )
    if version != VERSION:
        raise ValueError(f"trace format version {version}, but this engram reads {VERSION}")
    # What the header claims is believed only of a file that is as long: nothing else is allocated.
    expected = _HEADER.size + count * _LOOKUP.itemsize + samples * (1 + 4 * high) + _CHECKSUM_BYTES
    body = data[:-_CHECKSUM_BYTES]
    if len(data) != expected or data[len(body) :] != xxhash.xxh3_128_digest(body):
        raise ValueError("the trace is damaged: it does not match its own length and checksum")
    if not 1 <= low <= high or level > LEVEL_MAX or not count <= samples:
        raise ValueError("the trace contradicts itself in its header")
    at = _HEADER.size
    table_of = np.frombuffer(body, _LOOKUP, count, at)
    at += table_of.nbytes
    orders = np.frombuffer(body, np.uint8, samples, at)
    windows = np.frombuffer(body, "<i4", samples * high, at + samples).reshape(samples, high)
    trace = Trace(
        fingerprint=table.hex(),
        spec_digest=spec.hex(),
        level=level,
        min_order=low,
        lookups=_lookups(table_of, samples, tokens, accesses),
        windows=windows.astype(np.int32),
        orders=orders.copy(),
        tokens=tokens,
        accesses=accesses,
    )
    _require_ngrams(trace)
    return trace


def _lookups(table: npt.NDArray[np.void], samples: int, tokens: int, accesses: int) -> Int64s:
    if max(tokens, accesses) >= _COUNT_LIMIT:
        raise ValueError("the trace counts more than there can be")
    columns = []
    for name, total in (("samples", samples), ("tokens", tokens), ("accesses", accesses)):
        column = table[name]
        if len(column) and (int(column.max()) > total or bool((column[1:] < column[:-1]).any())):
            raise ValueError(f"the trace contradicts itself in its {name}")
        columns.append(column.astype(np.int64))
    counted = columns[0]
    if bool((np.diff(counted, prepend=0) <= 0).any()) or int(counted.max(initial=0)) != samples:
        raise ValueError("the trace contradicts itself in its samples")
    if samples > accesses:
        raise ValueError("the trace has more samples than n-grams")
    return np.stack(columns, axis=1)


def _require_ngrams(trace: Trace) -> None:
    orders, windows = trace.orders, trace.windows
    if len(orders) and not trace.min_order <= int(orders.min()) <= int(orders.max()) <= (
        trace.max_order
    ):
        raise ValueError("the trace has n-grams of orders that its table has not")
    used = np.arange(trace.max_order) < orders[:, None]
    if bool((windows[used] < 0).any()) or bool((windows[~used] != -1).any()):
        raise ValueError("the trace has n-grams that cannot be")
    if trace.level and bool((trace.hashes() >> np.uint64(64 - trace.level)).any()):
        raise ValueError("the trace has n-grams outside its own sample")
