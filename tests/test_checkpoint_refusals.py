"""Checkpoints that are refused, by a line that names what is wrong; nothing is left behind."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import small_qwen, small_v41
from small_checkpoints import QWEN, SHARDS, import_rows, qwen_checkpoint, qwen_layer, v41_checkpoint
from table_files import save_index, save_tensors

from engram.checkpoint import open_checkpoint
from engram.errors import CheckpointError
from engram.rows import RowFormat
from engram.store.writer import build_table


def rewrite(directory, change, number=0):
    """Apply `change` to the name -> (dtype, array) of one file of a bf16 Qwen checkpoint."""
    spec = small_qwen()
    rng = np.random.default_rng(3)
    tensors, _ = qwen_layer(rng, spec, spec.layer_ids[number], change.__name__, SHARDS)
    change(tensors)
    save_tensors(directory / f"model-{number}.safetensors", tensors)


def stem(tensors):
    return next(iter(tensors)).split(".shard_")[0].removesuffix(".weight_scale")


def bf16(edit):
    def change(tensors):
        edit(tensors, stem(tensors))

    change.__name__ = "bf16"
    return change


def fp8(edit):
    change = bf16(edit)
    change.__name__ = "fp8"
    return change


def drop(name):
    return lambda tensors, base: tensors.pop(f"{base}.{name}")


def put(name, dtype, array):
    return lambda tensors, base: tensors.update({f"{base}.{name}": (dtype, array)})


ONE = np.ones(1, np.float32)
REFUSED = {
    "missing shard": (bf16(drop("shard_4.weight")), r"shard 4 of .* is missing"),
    "missing last shard": (
        bf16(drop("shard_12.weight")),
        r"the spec needs \d+; a shard is missing",
    ),
    "wrong dtype": (
        bf16(put("shard_3.weight", "I16", np.zeros((5, 32), np.int16))),
        r"shard_3\.weight in .* is I16 \[5, 32\], expected BF16 \[rows, 32\]",
    ),
    "unknown dtype everywhere": (
        bf16(
            lambda tensors, base: tensors.update(
                {name: ("I16", array) for name, (_, array) in tensors.items()}
            )
        ),
        r"is I16 .* expected BF16, F16, F32, F8_E4M3 with",
    ),
    "wrong width": (
        bf16(put("shard_0.weight", "BF16", np.zeros((5, 31), np.uint16))),
        r"shard_0\.weight .*\[5, 31\], expected BF16 \[rows, 32\]",
    ),
    "wrong rank": (
        bf16(put("shard_1.weight", "BF16", np.zeros(32, np.uint16))),
        r"shard_1\.weight .*\[32\], expected",
    ),
    "too many rows": (
        bf16(put("shard_13.weight", "BF16", np.zeros((5, 32), np.uint16))),
        r"the spec needs \d+",
    ),
    "two prefixes": (
        bf16(
            lambda tensors, base: tensors.update(
                {f"mtp.{base}.shard_0.weight": next(iter(tensors.values()))}
            )
        ),
        r"both .* could be",
    ),
    "formats differ": (
        fp8(lambda tensors, base: None),
        r"make separate tables",
    ),
    "no global scale": (fp8(drop("weight_scale")), r"weight_scale, is missing"),
    "zero scale": (fp8(put("weight_scale", "F32", 0 * ONE)), r"finite and positive"),
    "negative scale": (fp8(put("weight_scale", "F32", -ONE)), r"finite and positive"),
    "infinite scale": (fp8(put("weight_scale", "F32", ONE * np.inf)), r"finite and positive"),
    "nan scale": (fp8(put("weight_scale", "F32", ONE * np.nan)), r"finite and positive"),
    "plain values and a scale": (
        bf16(put("weight_scale", "F32", ONE)),
        r"shard_0\.weight .* is BF16 .*\.ngram_embedding\.weight_scale is beside it",
    ),
    "plain values and block scales": (
        bf16(put("shard_3.weight_scale", "F8_E4M3", np.zeros((5, 2), np.uint8))),
        r"shard_3\.weight .* is BF16 .*shard_3\.weight_scale is beside it",
    ),
    "plain values and maxima": (
        bf16(put("shard_3.absmax", "F32", ONE)),
        r"shard_3\.weight .* is BF16 .*shard_3\.absmax is beside it",
    ),
    "many scales": (
        fp8(put("weight_scale", "F32", np.ones(16, np.float32))),
        r"weight_scale .*\[16\], expected one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_left(tmp_path, case):
    change, message = REFUSED[case]
    source = tmp_path / "source"
    source.mkdir()
    spec = small_qwen()
    qwen_checkpoint(source, spec)
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_rows(source, spec, tmp_path / "table")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_missing_layer_names_what_was_sought(tmp_path):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"none of its 13 tensors is layer 2's layers\.2\.ple\.ple_embedding\."
        r"ngram_embedding\.shard_\{k\}\.weight or",
    ):
        open_checkpoint(tmp_path, spec)


def test_stated_hash_that_differs(tmp_path):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    name = QWEN.format(layer=0) + ".ngram_heads_vocab_sizes"
    primes = np.array(spec.layers[0].primes) + 2
    save_tensors(tmp_path / "buffers.safetensors", {name: ("I64", primes)})
    with pytest.raises(CheckpointError, match=r"ngram_heads_vocab_sizes .* the spec gives"):
        open_checkpoint(tmp_path, spec)
    save_tensors(tmp_path / "buffers.safetensors", {name: ("I64", primes[:3])})
    with pytest.raises(CheckpointError, match=r"I64 \[3\], expected I64 with 16 numbers"):
        open_checkpoint(tmp_path, spec)


def test_format_that_was_not_asked_for(tmp_path):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    with pytest.raises(CheckpointError, match=r"holds .*bf16.* not .*fp16"):
        open_checkpoint(tmp_path, spec, RowFormat("fp16", spec.dim))


@pytest.mark.parametrize("scale", ["missing", "F32", "narrow"])
def test_v41_scales(tmp_path, scale):
    spec = small_v41()
    v41_checkpoint(tmp_path, spec, names=(".weight", ".scale"))
    layer = spec.layers[0]
    stem = f"layers.{layer.layer}.engram.embed"
    tensors = {f"{stem}.weight": ("F8_E4M3", np.zeros((layer.rows, 64), np.uint8))}
    message = r"the tensor of scales, .* is missing"
    if scale == "F32":
        tensors[f"{stem}.scale"] = ("F32", np.zeros((layer.rows, 2), np.float32))
        message = r"scale .* is F32 .*expected F8_E8M0 or U8 or I8"
    if scale == "narrow":
        tensors[f"{stem}.scale"] = ("F8_E8M0", np.zeros((layer.rows, 1), np.uint8))
        message = r"scale .*expected F8_E8M0 .*, 2\]"
    save_tensors(tmp_path / "part0.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, spec)


def test_truncated_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    spec = small_qwen()
    qwen_checkpoint(source, spec)
    path = source / "model-1.safetensors"
    whole = path.read_bytes()
    for count in (len(whole) - 1, len(whole) // 2, 100, 7, 0):
        path.write_bytes(whole[:count])
        with pytest.raises(CheckpointError, match=r"model-1\.safetensors is truncated"):
            import_rows(source, spec, tmp_path / "table")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_file_that_shrinks_while_it_is_read(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    spec = small_qwen()
    qwen_checkpoint(source, spec)
    schema, rows = open_checkpoint(source, spec)
    path = source / "model-1.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="changed while"):
        build_table(tmp_path / "table", schema, rows)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        build_table(tmp_path / "table", schema, rows)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((2**40).to_bytes(8, "little") + b"{}", "truncated"),
        (header([1, 2]), "malformed header"),
        (b"\x02" + bytes(7) + b"{]", "malformed header"),
        (header({"a": {"dtype": "BF16"}}), "header of 'a' is malformed"),
        (header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}), "truncated"),
        (header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 3]}}) + b"123", "cannot"),
        (header({"a": {"dtype": "?", "shape": [4], "data_offsets": [3, 0]}}) + b"123", "cannot"),
        (header({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [-1, 0]}}), "cannot"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, small_qwen())


def test_huge_header_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((10**9).to_bytes(8, "little"))
    os.truncate(path, 2 * 10**9)
    with pytest.raises(CheckpointError, match="has a header of 1000000000 bytes"):
        open_checkpoint(tmp_path, small_qwen())


def test_directories_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        open_checkpoint(tmp_path, small_qwen())
    qwen_checkpoint(tmp_path, small_qwen())
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "model-0.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="remove the files"):
        open_checkpoint(tmp_path, small_qwen())
    save_index(tmp_path, {"model-0.safetensors": ["nobody.has.this"]})
    with pytest.raises(CheckpointError, match=r"lacks tensor 'nobody\.has\.this'"):
        open_checkpoint(tmp_path, small_qwen())
    save_index(tmp_path, {"../model-0.safetensors": ["a"]})
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_checkpoint(tmp_path, small_qwen())
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index"):
        open_checkpoint(tmp_path, small_qwen())
