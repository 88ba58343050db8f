"""Small checkpoints of the families, and the rows they mean."""

from __future__ import annotations

import numpy as np
from table_files import rows_of, save_tensors

from engram.checkpoint import open_checkpoint
from engram.store.writer import build_table

QWEN = "model.language_model.layers.{layer}.ple.ple_embedding"
SHARDS = 13
"""Enough that lexicographic order would be wrong."""


def random_bytes(rng, shape, dtype=np.uint8):
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def qwen_layer(rng, spec, layer, kind, shards):
    """Tensors of one layer and the rows they mean; `shards` None = one tensor."""
    rows = next(each.rows for each in spec.layers if each.layer == layer)
    module = QWEN.format(layer=layer) + ".ngram_embedding"
    dim = spec.dim
    values, scales, extra = {
        "bf16": lambda: (("BF16", random_bytes(rng, (rows, dim), np.uint16)), None, {}),
        "fp16": lambda: (("F16", rng.random((rows, dim)).astype(np.float16)), None, {}),
        "fp32": lambda: (("F32", rng.random((rows, dim)).astype(np.float32)), None, {}),
        "fp8": lambda: (
            ("F8_E4M3", random_bytes(rng, (rows, dim))),
            None,
            {"weight_scale": ("F32", np.array([0.5], np.float32))},
        ),
        "nvfp4": lambda: (
            ("U8", random_bytes(rng, (rows, dim // 2))),
            ("weight_scale", "F8_E4M3", random_bytes(rng, (rows, dim // 16))),
            {"weight_scale_2": ("F32", np.array(0.25, np.float32))},
        ),
        "nf4": lambda: (
            ("U8", random_bytes(rng, (rows, dim // 2))),
            ("absmax", "F32", rng.random(rows).astype(np.float32)),
            {},
        ),
    }[kind]()
    each = rows if shards is None else -(-rows // shards)
    tensors = {f"{module}.{name}": tensor for name, tensor in extra.items()}
    for number, first in enumerate(range(0, rows, each)):
        stem = module if shards is None else f"{module}.shard_{number}"
        tensors[f"{stem}.weight"] = (values[0], values[1][first : first + each])
        if scales is not None:
            tensors[f"{stem}.{scales[0]}"] = (scales[1], scales[2][first : first + each])
    parts = [values[1]] if scales is None else [values[1], scales[2]]
    packed = [part.reshape(rows, -1).view(np.uint8) for part in parts]
    return tensors, np.concatenate(packed, axis=1)


def qwen_checkpoint(directory, spec, kind="bf16", shards=SHARDS):
    """A checkpoint of two files without an index; returns the rows it means, by layer."""
    rng = np.random.default_rng(3)
    expected = {}
    for number, layer in enumerate(spec.layer_ids):
        tensors, expected[layer] = qwen_layer(rng, spec, layer, kind, shards)
        save_tensors(directory / f"model-{number}.safetensors", tensors)
    return expected


def v41_checkpoint(directory, spec, scale_dtype="F8_E8M0", names=("weight", "scale")):
    rng = np.random.default_rng(4)
    expected = {}
    for number, layer in enumerate(spec.layers):
        values = random_bytes(rng, (layer.rows, spec.dim))
        scales = random_bytes(rng, (layer.rows, spec.dim // 32))
        stem = f"layers.{layer.layer}.engram.embed"
        save_tensors(
            directory / f"part{number}.safetensors",
            {
                "model.norm.weight": ("BF16", np.zeros(3, np.uint16)),
                f"{stem}{names[1]}": (scale_dtype, scales),
                f"{stem}{names[0]}": ("F8_E4M3", values),
            }
            if number
            else {
                f"{stem}{names[0]}": ("F8_E4M3", values),
                f"{stem}{names[1]}": (scale_dtype, scales),
            },
        )
        expected[layer.layer] = np.concatenate([values, scales], axis=1)
    return expected


def import_rows(directory, spec, destination):
    schema, source = open_checkpoint(directory, spec)
    manifest = build_table(destination, schema, source, extent_blocks=16)
    return manifest, rows_of(destination)
