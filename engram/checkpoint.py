"""Checkpoints as sources of tables: rows as they are, streamed from safetensors files.

See `engram._checkpoint_tensors` for the tensors and formats that are accepted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from engram._checkpoint_tensors import Finder, Shard
from engram.errors import CheckpointError
from engram.rows import Bytes, RowFormat
from engram.spec.families import family
from engram.ssd import schema_of
from engram.store.manifest import Schema
from engram.store.pack import join_rows
from engram.store.safetensors import Tensor, find_tensors, read_tensor

if TYPE_CHECKING:
    from engram.spec import NgramSpec

_SAMPLES = 1024
_SAMPLE_BYTES = 4096


def open_checkpoint(
    directory: Path, spec: NgramSpec, row_format: RowFormat | None = None
) -> tuple[Schema, CheckpointSource]:
    """Find the tables of `spec` in a checkpoint directory.

    Args:
        directory: with `*.safetensors`, and their index or not.
        spec: what the checkpoint is to match.
        row_format: what it must hold; by default whatever it holds.

    Returns:
        What `build_table` needs.

    Raises:
        CheckpointError: a tensor or file is missing, truncated, or of another dtype or shape than
            the spec and the formats above allow; or the layers' formats differ.
    """
    directory = Path(directory)
    tensors = find_tensors(directory)
    finder = Finder(directory, tensors, spec.dim)
    rows = {each.layer: each.rows for each in spec.layers}
    formats: dict[int, RowFormat] = {}
    shards: dict[int, list[Shard]] = {}
    for wanted in family(spec.family).tensors(spec):
        formats[wanted.layer], shards[wanted.layer] = finder.layer(wanted, rows[wanted.layer])
        finder.check_buffers(wanted)
    found = _common_format(directory, formats)
    if row_format not in (None, found):
        raise CheckpointError(f"{directory} holds {found}, not {row_format}")
    return schema_of(spec, found), CheckpointSource(directory, found, shards)


def _common_format(directory: Path, formats: dict[int, RowFormat]) -> RowFormat:
    (first, common), *others = formats.items()
    for layer, row_format in others:
        if row_format != common:
            raise CheckpointError(
                f"{directory}: layer {first} holds {common}, layer {layer} {row_format}; "
                "a table's layers share one format: make separate tables"
            )
    return common


class CheckpointSource:
    """A `RowSource` that reads a checkpoint's tensors as they are asked for.

    `digest` covers the tensors' names, dtypes, shapes, places, file sizes and times, and samples
    of their bytes: enough to tell tables apart and to guard a resumed import without reading
    everything twice. The table's fingerprint covers every byte.
    """

    def __init__(
        self, directory: Path, row_format: RowFormat, shards: dict[int, list[Shard]]
    ) -> None:
        self._row_format = row_format
        self._shards = shards
        parts = [part for layer in shards.values() for shard in layer for part in _parts(shard)]
        self.digest = _digest_of(parts)
        self.description: dict[str, Any] = {
            "kind": "checkpoint",
            "name": directory.resolve().name,
            "files": len({part.file for part in parts}),
            "tensors": len(parts),
            "bytes": sum(part.count for part in parts),
        }

    def read(self, layer: int, first_row: int, out: Bytes) -> None:
        """Read rows `first_row` onwards of `layer` into `out`, uint8 `[n, row_bytes]`.

        Raises:
            CheckpointError: the layer or rows do not exist, or a file cannot be read.
        """
        done = 0
        for shard in self._shards.get(layer, []):
            skip = first_row + done - shard.first_row
            if done < len(out) and 0 <= skip < shard.rows:
                count = min(shard.rows - skip, len(out) - done)
                self._read_shard(shard, skip, out[done : done + count])
                done += count
        if done < len(out):
            raise CheckpointError(f"layer {layer} has no rows {first_row + done}..; import again")

    def _read_shard(self, shard: Shard, first: int, out: Bytes) -> None:
        value_bytes, scale_bytes = self._row_format.value_bytes, self._row_format.scale_bytes
        if shard.scales is None:
            read_tensor(shard.values, first * value_bytes, out, streaming=True)
            return
        values = np.empty((len(out), value_bytes), np.uint8)
        scales = np.empty((len(out), scale_bytes), np.uint8)
        read_tensor(shard.values, first * value_bytes, values, streaming=True)
        read_tensor(shard.scales, first * scale_bytes, scales, streaming=True)
        join_rows(values, scales, out)


def _parts(shard: Shard) -> list[Tensor]:
    return [shard.values] if shard.scales is None else [shard.values, shard.scales]


def _digest_of(tensors: list[Tensor]) -> str:
    state = xxhash.xxh3_128()
    samples = max(4, _SAMPLES // len(tensors))
    for tensor in tensors:
        state.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.start} ".encode())
        file = tensor.file
        state.update(f"{file.path.name} {file.size} {file.modified_ns} ".encode())
        sample = np.empty(min(_SAMPLE_BYTES, tensor.count), np.uint8)
        last = tensor.count - sample.size
        for place in sorted({last * number // (samples - 1) for number in range(samples)}):
            read_tensor(tensor, place, sample)
            state.update(sample.data)
    return state.hexdigest()
