"""Tensors in safetensors files, read piece by piece without a map.

A mapped file's pages count as memory of the process that reads it, and stay in the page cache at
the expense of everything else there. So pieces are read into buffers, asked for ahead, and dropped
from the cache behind.

The format is that of https://github.com/huggingface/safetensors: a length (u64), that many bytes
of JSON, then the tensors' bytes: all of them, each once. A file is held to it strictly, because
offsets that stray give rows that are somebody else's.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.errors import CheckpointError
from engram.rows import Bytes
from engram.store.files import open_regular, read_regular

INDEX_FILE = "model.safetensors.index.json"
_HEADER_BYTES_MAX = 100_000_000
_SIZE_LIMIT = 2**63
_RANK_MAX = 64
_LENGTH_BYTES = 8
_AHEAD_BYTES = 4 << 20
_PAGE_BYTES = 4096

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file as it was when its header was read; another size or time is another file."""

    path: Path
    size: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        dtype: as safetensors spells it: BF16, F8_E4M3, ..
        start: byte in the file.
        count: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: TensorFile
    start: int
    count: int

    def __str__(self) -> str:
        return f"{self.name} in {self.file.path}"


def find_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory by name: those of its index, or of all its files.

    Raises:
        CheckpointError: no safetensors there, a file that the index names is missing, one that is
            truncated or malformed, or a name that two files have.
    """
    index = directory / INDEX_FILE
    names = _indexed_files(index) if index.exists() else None
    paths = sorted(directory.glob("*.safetensors")) if names is None else sorted(names)
    if not paths:
        raise CheckpointError(
            f"{directory} holds no *.safetensors files; give the directory of a checkpoint"
        )
    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.name.isprintable():
            raise CheckpointError(f"{directory} has a file {path.name!r}; give it a plain name")
        for tensor in read_header(path):
            if names is not None and tensor.name not in names[path]:
                continue
            if tensor.name in found:
                raise CheckpointError(
                    f"tensor {tensor.name} is in {path} and in {found[tensor.name].file.path}; "
                    "remove the files that do not belong to the checkpoint"
                )
            found[tensor.name] = tensor
    for path, expected in (names or {}).items():
        absent = sorted(expected.difference(found))
        if absent:
            raise CheckpointError(
                f"{path} lacks tensor {absent[0]!r}, which {index} puts there; download it again"
            )
    return found


def _indexed_files(index: Path) -> dict[Path, set[str]]:
    """Tensor names by file, as the index has them."""
    try:
        weight_map = _load(read_regular(index))["weight_map"]
        entries = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not an index of tensors; download it again") from None
    files: dict[Path, set[str]] = {}
    for name, file in entries:
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a file beside it")
        files.setdefault(index.parent / file, set()).add(name)
    return files


def _load(text: bytes) -> dict[str, Any]:
    """A JSON object in which no name stands twice.

    Raises:
        ValueError, RecursionError: it is anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError("a name stands twice")
        return fields

    fields = json.loads(text.decode(), object_pairs_hook=once)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    return fields


def read_header(path: Path) -> list[Tensor]:
    """Tensors of one file.

    Raises:
        CheckpointError: missing, truncated or malformed.
    """
    try:
        with open(open_regular(path), "rb") as stream:
            status = os.fstat(stream.fileno())
            prefix = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            data_start = _LENGTH_BYTES + length
            if len(prefix) < _LENGTH_BYTES or data_start > status.st_size:
                raise CheckpointError(
                    f"{path} is truncated: its header does not fit its {status.st_size} bytes; "
                    "download it again"
                )
            if length > _HEADER_BYTES_MAX:
                raise CheckpointError(
                    f"{path} has a header of {length} bytes, more than {_HEADER_BYTES_MAX}; "
                    "it is not a safetensors file"
                )
            text = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    file = TensorFile(path, status.st_size, status.st_mtime_ns)
    try:
        entries = _load(text)
    except (ValueError, RecursionError) as error:
        problem = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} has a malformed header ({problem}); download it again"
        ) from None
    entries.pop("__metadata__", None)
    tensors = [_tensor(file, data_start, name, entry) for name, entry in entries.items()]
    _check_contiguous(file, data_start, tensors)
    return tensors


def _check_contiguous(file: TensorFile, data_start: int, tensors: list[Tensor]) -> None:
    """Require that every byte after the header belongs to one tensor, as the format demands."""
    end = data_start
    for tensor in sorted(tensors, key=lambda each: (each.start, each.count)):
        if tensor.start != end:
            raise CheckpointError(
                f"{tensor} begins at byte {tensor.start}, but the bytes before it end at {end}; "
                "download the file again"
            )
        end += tensor.count
    if end != file.size:
        raise CheckpointError(
            f"{file.path} has {file.size - end} bytes that are no tensor's; download it again"
        )


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _RANK_MAX:
        raise ValueError
    if any(type(each) is not int or abs(each) >= _SIZE_LIMIT for each in values):
        raise ValueError
    return tuple(values)


def _tensor(file: TensorFile, data_start: int, name: str, entry: Any) -> Tensor:
    try:
        dtype = entry["dtype"]
        shape = _sizes(entry["shape"])
        begin, end = _sizes(entry["data_offsets"])
        if not (isinstance(dtype, str) and dtype.isprintable() and name.isprintable()):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file.path}: header of {name!r} is malformed; download the file again"
        ) from None
    # An unknown dtype may belong to a tensor that nobody asks for; its extent still has to fit.
    item_bytes = _ITEM_BYTES.get(dtype)
    expected = None if item_bytes is None else math.prod(shape) * item_bytes
    if not 0 <= begin <= end or min(shape, default=0) < 0 or expected not in (None, end - begin):
        raise CheckpointError(
            f"{file.path}: {name} of dtype {dtype} and shape {list(shape)} cannot have "
            f"bytes {begin} to {end}; download the file again"
        )
    if data_start + end > file.size:
        raise CheckpointError(
            f"{file.path} is truncated: {name} ends at byte {data_start + end}, "
            f"the file at {file.size}; download it again"
        )
    return Tensor(name, dtype, shape, file, data_start + begin, end - begin)


def read_tensor(tensor: Tensor, first_byte: int, out: Bytes, *, streaming: bool = False) -> None:
    """Fill `out` with the tensor's bytes from `first_byte` on.

    Args:
        out: C-contiguous uint8 of any shape.
        streaming: the next call wants what follows: have it read ahead, and drop what was read.

    Raises:
        CheckpointError: the file went away, changed, ended early or cannot be read.
    """
    path = tensor.file.path
    if first_byte + out.nbytes > tensor.count:
        raise CheckpointError(f"{tensor} has {tensor.count} bytes, more were asked for")
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (tensor.file.size, tensor.file.modified_ns):
            raise CheckpointError(f"{path} changed while it was being read; import again")
        start = tensor.start + first_byte
        _read_all(descriptor, start, out, path)
        if streaming:
            end, first_page = start + out.nbytes, start - start % _PAGE_BYTES
            os.posix_fadvise(descriptor, end, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            os.posix_fadvise(descriptor, first_page, end - first_page, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check its device"
        ) from None
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, position: int, out: Bytes, path: Path) -> None:
    view = out.reshape(-1).data
    while view:
        count = os.preadv(descriptor, [view], position)
        if not count:
            raise CheckpointError(f"{path} ends at byte {position}; download it again")
        view = view[count:]
        position += count
