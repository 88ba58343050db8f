"""Which tensors of a checkpoint hold a layer's rows, and in which row format.

What a family's checkpoint calls its tensors, the family says (`LayerTensors`). The row format
follows from dtypes and companions of the tensor with the values, `X.weight`:

    values                  companions                                        row format
    BF16, F16, F32 [R, dim]   none                                            bf16, fp16, fp32
    F8_E4M3 [R, dim]          the family's scales, F8_E8M0 (U8, I8) [R, dim/32]   fp8-ue8m0
    F8_E4M3 [R, dim]          the family's global scale, one number           fp8
    U8 [R, dim/2]             X.weight_scale F8_E4M3 [R, dim/16], and the     nvfp4
                              family's global scale with `_2` appended
    U8 [R, dim/2]             X.absmax or X.weight.absmax, F32 [R]            nf4

For shards, X includes the shard (`..shard_7.weight`, `..shard_7.absmax`); a global scale is one
for all shards. Plain values beside a scale are refused. Nothing else is accepted, and nothing is
converted: rows are stored as they are.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram.errors import CheckpointError, SpecError
from engram.rows import Bytes, RowFormat
from engram.spec.families import LayerTensors, matches
from engram.store.safetensors import Tensor, read_tensor

_SHARD_DIGITS_MAX = 9
_PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_VALUE_DTYPE = {"fp8-ue8m0": "F8_E4M3", "fp8": "F8_E4M3", "nvfp4": "U8", "nf4": "U8"}
_SCALE_DTYPES = {"fp8-ue8m0": ("F8_E8M0", "U8", "I8"), "nvfp4": ("F8_E4M3",), "nf4": ("F32",)}


@dataclass(frozen=True)
class Shard:
    """Consecutive rows: a tensor of values and, for some formats, one of scales."""

    first_row: int
    rows: int
    values: Tensor
    scales: Tensor | None


class Finder:
    """Looks for a layer's tensors by the family's patterns."""

    def __init__(self, directory: Path, tensors: dict[str, Tensor], dim: int) -> None:
        self._directory = directory
        self._tensors = tensors
        self._dim = dim

    def layer(self, wanted: LayerTensors, rows: int) -> tuple[RowFormat, list[Shard]]:
        """Format and shards of one layer, in row order."""
        values = self._values(wanted)
        row_format = self._row_format(wanted, values[0])
        shards = []
        first_row = 0
        for tensor in values:
            if row_format.name in _PLAIN.values():
                self._refuse_scales(wanted, tensor)
            here = self._check_values(tensor, row_format)
            scales = self._scales(wanted, tensor, here, row_format)
            shards.append(Shard(first_row, here, tensor, scales))
            first_row += here
        if first_row != rows:
            raise CheckpointError(
                f"{self._directory}: layer {wanted.layer} has {first_row} rows in {len(values)} "
                f"tensors like {values[-1].name}, the spec needs {rows}; a shard is missing or "
                "the checkpoint belongs to another config"
            )
        return row_format, shards

    def check_buffers(self, wanted: LayerTensors) -> None:
        """Compare the hash parameters that a checkpoint states with the spec's."""
        for pattern, expected in wanted.checks.items():
            tensor = self._one(pattern)
            if tensor is None:
                continue
            if tensor.dtype != "I64" or tensor.count != 8 * len(expected):
                raise self._unexpected(tensor, f"I64 with {len(expected)} numbers")
            stated = tuple(int(number) for number in _load(tensor).view("<i8"))
            if stated != tuple(expected):
                raise CheckpointError(
                    f"{tensor} holds {list(stated)[:4]}.., the spec gives {list(expected)[:4]}..; "
                    "config and checkpoint must come from the same model"
                )

    def _values(self, wanted: LayerTensors) -> list[Tensor]:
        kinds = [
            (pattern, found)
            for pattern in wanted.values
            if (found := {name: each for name in self._tensors if (each := matches(pattern, name))})
        ]
        if len(kinds) > 1:
            raise self._ambiguous(kinds[0][0], [next(iter(found)) for _, found in kinds])
        for pattern, found in kinds:
            if "shard" in re.compile(pattern).groupindex:
                return self._in_order(pattern, found)
            tensor = self._one(pattern)
            assert tensor is not None
            return [tensor]
        sought = " or ".join(_readable(pattern) for pattern in wanted.values)
        raise CheckpointError(
            f"{self._directory}: none of its {len(self._tensors)} tensors is layer "
            f"{wanted.layer}'s {sought}; check that config and checkpoint belong together"
        )

    def _in_order(self, pattern: str, found: dict[str, re.Match[str]]) -> list[Tensor]:
        """Shards in numeric order; every number from 0 on must be there once."""
        numbered: dict[int, str] = {}
        stems = set()
        for name, match in found.items():
            start, end = match.span("shard")
            stems.add((name[:start], name[end:]))
            if len(match["shard"]) > _SHARD_DIGITS_MAX:
                raise CheckpointError(
                    f"{self._directory}: tensor {name[:200]} has a shard number of "
                    f"{len(match['shard'])} digits; it belongs to no checkpoint"
                )
            number = int(match["shard"])
            if number in numbered or len(stems) > 1:
                raise self._ambiguous(pattern, [name, next(iter(numbered.values()))])
            numbered[number] = name
        numbers = sorted(numbered)
        missing = next((place for place, number in enumerate(numbers) if place != number), None)
        if missing is not None:
            raise CheckpointError(
                f"{self._directory}: shard {missing} of {_readable(pattern)} is missing, "
                f"shards up to {numbers[-1]} are there; download the checkpoint again"
            )
        return [self._tensors[numbered[number]] for number in numbers]

    def _one(self, pattern: str) -> Tensor | None:
        names = [name for name in self._tensors if matches(pattern, name)]
        if len(names) > 1:
            raise self._ambiguous(pattern, names)
        return self._tensors[names[0]] if names else None

    def _required(self, pattern: str, what: str) -> Tensor:
        tensor = self._one(pattern)
        if tensor is None:
            raise CheckpointError(
                f"{self._directory}: {what}, {_readable(pattern)}, is missing among its "
                f"{len(self._tensors)} tensors; without it the values have no meaning"
            )
        return tensor

    def _row_format(self, wanted: LayerTensors, values: Tensor) -> RowFormat:
        """What the values' dtype and companions say."""
        scales = self._one(wanted.scales) if wanted.scales else None
        if values.dtype in _PLAIN and scales is None:
            return RowFormat(_PLAIN[values.dtype], self._dim)
        name: str | None = None
        global_scale: str | None = None
        if values.dtype == "F8_E4M3" and wanted.scales:
            name = "fp8-ue8m0"
        elif values.dtype == "F8_E4M3" and wanted.global_scale:
            name, global_scale = "fp8", wanted.global_scale
        elif values.dtype == "U8" and not wanted.scales:
            if self._absmax(values) is not None:
                name = "nf4"
            elif wanted.global_scale and self._block_scales(values) is not None:
                name, global_scale = "nvfp4", f"{wanted.global_scale}_2"
        if name is None:
            raise self._unexpected(values, self._accepted(wanted))
        scale = None if global_scale is None else self._global_scale(global_scale)
        try:
            return RowFormat(name, self._dim, scale)
        except SpecError as error:
            raise CheckpointError(f"{values}: {error}") from None

    def _refuse_scales(self, wanted: LayerTensors, values: Tensor) -> None:
        """Rows of numbers that mean something only with a scale must not pass for plain ones."""
        scales = self._one(wanted.global_scale) if wanted.global_scale else None
        scales = scales or self._block_scales(values) or self._absmax(values)
        if scales is not None:
            raise CheckpointError(
                f"{values} is {values.dtype} and needs no scale, yet {scales.name} is beside it; "
                "import a checkpoint without it, or the quantized one it belongs to"
            )

    def _accepted(self, wanted: LayerTensors) -> str:
        if wanted.scales:
            return f"F8_E4M3 with {_readable(wanted.scales)}, or BF16, F16, F32 without"
        quantized = ", F8_E4M3 with one weight_scale, or U8 with weight_scale or absmax"
        return "BF16, F16, F32" + (quantized if wanted.global_scale else "")

    def _global_scale(self, pattern: str) -> float:
        tensor = self._required(pattern, "the global scale")
        if tensor.shape not in ((), (1,)) or tensor.dtype not in _PLAIN:
            raise self._unexpected(tensor, "one F32, F16 or BF16 number, shape [] or [1]")
        raw = _load(tensor)
        if tensor.dtype == "BF16":
            raw = np.concatenate([np.zeros(2, np.uint8), raw])
        scale = float(raw.view("<f2" if tensor.dtype == "F16" else "<f4")[0])
        if not (math.isfinite(scale) and scale > 0):
            raise CheckpointError(
                f"{tensor} holds {scale}; a scale must be finite and positive: the checkpoint is "
                "not usable"
            )
        return scale

    def _check_values(self, tensor: Tensor, row_format: RowFormat) -> int:
        """Rows of a tensor of values."""
        dtype = _VALUE_DTYPE.get(row_format.name, tensor.dtype)
        if row_format.name in _PLAIN.values():
            dtype = next(key for key, name in _PLAIN.items() if name == row_format.name)
        width = row_format.value_bytes if dtype == "U8" else row_format.dim
        if tensor.dtype != dtype or len(tensor.shape) != 2 or tensor.shape[1] != width:
            raise self._unexpected(tensor, f"{dtype} [rows, {width}]")
        return tensor.shape[0]

    def _scales(
        self, wanted: LayerTensors, values: Tensor, rows: int, row_format: RowFormat
    ) -> Tensor | None:
        if not row_format.scale_bytes:
            return None
        if wanted.scales:
            tensor: Tensor | None = self._required(wanted.scales, "the tensor of scales")
        else:
            both = {"nf4": self._absmax, "nvfp4": self._block_scales}
            tensor = both[row_format.name](values)
        if tensor is None:
            raise CheckpointError(
                f"{values} has no tensor of scales beside it, other shards have; "
                "download the checkpoint again"
            )
        dtypes = _SCALE_DTYPES[row_format.name]
        shapes: list[tuple[int, ...]] = [(rows, row_format.scale_bytes)]
        if row_format.name == "nf4":
            shapes = [(rows,), (rows, 1)]
        if tensor.dtype not in dtypes or tensor.shape not in shapes:
            raise self._unexpected(tensor, f"{' or '.join(dtypes)} {list(shapes[0])}")
        return tensor

    def _absmax(self, values: Tensor) -> Tensor | None:
        stem = values.name.removesuffix("weight")
        return self._tensors.get(f"{stem}absmax") or self._tensors.get(f"{stem}weight.absmax")

    def _block_scales(self, values: Tensor) -> Tensor | None:
        return self._tensors.get(f"{values.name}_scale")

    def _ambiguous(self, pattern: str, names: list[str]) -> CheckpointError:
        return CheckpointError(
            f"{self._directory}: both {names[0]} and {names[1]} could be {_readable(pattern)}; "
            "import from a directory that holds one model"
        )

    def _unexpected(self, tensor: Tensor, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{tensor} is {tensor.dtype} {list(tensor.shape)}, expected {expected}"
        )


def _readable(pattern: str) -> str:
    """A name pattern for people."""
    return re.sub(r"\(\?P<shard>[^)]*\)", "{k}", pattern).replace("\\.", ".")


def _load(tensor: Tensor) -> Bytes:
    """All bytes of a small tensor."""
    out = np.empty(tensor.count, np.uint8)
    read_tensor(tensor, 0, out)
    return out
