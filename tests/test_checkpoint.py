"""Checkpoints become tables bit for bit: every format, layout and name."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import small_qwen, small_v41
from small_checkpoints import QWEN, import_rows, qwen_checkpoint, qwen_layer, v41_checkpoint
from table_files import save_index, save_tensors

from engram.checkpoint import open_checkpoint
from engram.errors import CheckpointError
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.store.safetensors import read_header


def assert_rows(found, expected):
    assert found.keys() == expected.keys()
    for layer, rows in expected.items():
        np.testing.assert_array_equal(found[layer], rows)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "fp8", "nvfp4", "nf4"])
def test_qwen_shards_of_every_format(tmp_path, kind):
    spec = small_qwen()
    expected = qwen_checkpoint(tmp_path, spec, kind)
    manifest, found = import_rows(tmp_path, spec, tmp_path / "table")
    assert_rows(found, expected)
    assert manifest.row_format.name == kind
    scale = {"fp8": 0.5, "nvfp4": 0.25}.get(kind)
    assert manifest.row_format.global_scale == scale
    assert manifest.source["kind"] == "checkpoint"


def test_qwen_whole_tensor_any_prefix_and_stated_hash(tmp_path):
    spec = small_qwen()
    rng = np.random.default_rng(5)
    tensors, expected = {}, {}
    for hashed in spec.layers:
        found, expected[hashed.layer] = qwen_layer(rng, spec, hashed.layer, "bf16", None)
        module = QWEN.format(layer=hashed.layer)
        stated = {
            "layer_multipliers": hashed.multipliers,
            "ngram_heads_vocab_sizes": hashed.primes,
            "ngram_heads_offsets": hashed.offsets,
        }
        found |= {f"{module}.{name}": ("I64", np.array(v)) for name, v in stated.items()}
        tensors |= {name.replace("language_model", "odd.prefix"): t for name, t in found.items()}
    save_tensors(tmp_path / "model.safetensors", tensors)
    assert_rows(import_rows(tmp_path, spec, tmp_path / "table")[1], expected)


@pytest.mark.parametrize(
    ("scale_dtype", "names"),
    [
        ("F8_E8M0", (".weight", ".scale")),
        ("U8", ("_tokens.weight", "_tokens.weight_scale_inv")),
        ("I8", (".weight", ".scale")),
    ],
)
def test_v41_values_and_scales_interleave(tmp_path, scale_dtype, names):
    spec = small_v41()
    expected = v41_checkpoint(tmp_path, spec, scale_dtype, names)
    manifest, found = import_rows(tmp_path, spec, tmp_path / "table")
    assert_rows(found, expected)
    assert manifest.row_format == RowFormat("fp8-ue8m0", spec.dim)


def test_demo_embedding(tmp_path):
    spec = NgramSpec.deepseek_demo(
        tokenizer=np.arange(300, dtype=np.int32),
        engram_vocab_size=[200, 200],
        n_embed_per_ngram=64,
        layer_ids=[1, 15],
    )
    rng = np.random.default_rng(6)
    tensors, expected = {}, {}
    for layer in spec.layers:
        values = rng.random((layer.rows, spec.dim)).astype(np.float32)
        name = f"layers.{layer.layer}.engram.multi_head_embedding.embedding.weight"
        tensors[name] = ("F32", values)
        expected[layer.layer] = values.view(np.uint8)
    save_tensors(tmp_path / "demo.safetensors", tensors)
    assert_rows(import_rows(tmp_path, spec, tmp_path / "table")[1], expected)


def test_files_written_by_the_safetensors_library(tmp_path):
    import torch
    from safetensors.torch import save_file

    spec = small_v41()
    expected = {}
    for layer in spec.layers:
        values = torch.randint(0, 256, (layer.rows, spec.dim), dtype=torch.uint8)
        scales = torch.randint(0, 256, (layer.rows, spec.dim // 32), dtype=torch.uint8)
        stem = f"model.layers.{layer.layer}.engram.embed"
        save_file(
            {
                f"{stem}.weight": values.view(torch.float8_e4m3fn),
                f"{stem}.scale": scales.view(torch.float8_e8m0fnu),
            },
            tmp_path / f"{layer.layer}.safetensors",
        )
        expected[layer.layer] = torch.cat([values, scales], 1).numpy()
    assert_rows(import_rows(tmp_path, spec, tmp_path / "table")[1], expected)


def test_index_chooses_the_files(tmp_path):
    spec = small_qwen()
    expected = qwen_checkpoint(tmp_path, spec)
    names = {
        path.name: [tensor.name for tensor in read_header(path)]
        for path in tmp_path.glob("*.safetensors")
    }
    save_index(tmp_path, names)
    # A stray copy under another name would be a duplicate without the index.
    (tmp_path / "old.safetensors").write_bytes((tmp_path / "model-0.safetensors").read_bytes())
    assert_rows(import_rows(tmp_path, spec, tmp_path / "table")[1], expected)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        open_checkpoint(tmp_path, spec)


def test_digest_follows_the_content(tmp_path):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    path = tmp_path / "model-0.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    first = open_checkpoint(tmp_path, spec)[1].digest
    assert open_checkpoint(tmp_path, spec)[1].digest == first
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=times)
    assert open_checkpoint(tmp_path, spec)[1].digest != first
