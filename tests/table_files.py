"""A table's rows, read from its files with NumPy alone, and small tensor files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engram.store.manifest import read_manifest

PAGE = 4096


def rows_of(directory: Path) -> dict[int, np.ndarray]:
    """All rows by layer, uint8 `[rows, row_bytes]`."""
    manifest, physical = read_manifest(directory)
    data = np.fromfile(directory / "data.mdb", np.uint8)
    row_bytes = manifest.row_format.row_bytes
    per_block = 4080 // (row_bytes + 4)
    found: dict[int, list[np.ndarray]] = {}
    for extent, page in zip(manifest.extents, physical.extent_pages, strict=True):
        blocks = -(-extent.rows // per_block)
        start = page * PAGE + 16
        value = np.zeros(blocks * PAGE, np.uint8)
        value[: blocks * PAGE - 16] = data[start : start + blocks * PAGE - 16]
        packed = value.reshape(blocks, PAGE)[:, : per_block * row_bytes]
        rows = packed.reshape(blocks * per_block, row_bytes)[: extent.rows]
        found.setdefault(extent.layer, []).append(rows)
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def save_tensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file of (dtype name, array).

    NumPy lacks most of the dtypes, so an array only gives bytes and shape: uint16 for BF16, uint8
    for the fp8 kinds.
    """
    header, blobs, end = {}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        shape = list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(blob)]}
        end += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def save_index(directory: Path, files: dict[str, list[str]]) -> None:
    """Write an index that puts these tensor names into these files."""
    weight_map = {name: file for file, names in files.items() for name in names}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
