"""Families: from a checkpoint's config, where its tensors stand, and how one is added."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from test_spec_compression import byte_level

from engram.errors import SpecError
from engram.spec import NgramSpec, families
from engram.spec.families import family, matches

TOKENS = [f"{letter}{i}" for i in range(8) for letter in "aAbB"]
COMPRESSED = 16

QWEN = {
    "model_type": "qwen4_exp_text",
    "vocab_size": 300,
    "hidden_size": 64,
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 1000,
    "make_ngram_vocab_size_divisible_by": 128,
    "seed": 7,
    "eos_token_id": [9, 11],
    "ple_layer_ids": [3, 1],
    "ple_embed_dim": 32,
}
V41 = {
    "model_type": "deepseek_v41",
    "engram_layer_ids": [5, 2],
    "engram_vocab_size": 100,
    "engram_max_ngram_size": 3,
    "engram_n_heads": 2,
    "engram_head_dim": 32,
    "engram_num_embeddings": [101 + 103 + 107 + 109, 113 + 127 + 131 + 137],
    "engram_compressed_vocab_size": COMPRESSED,
    "engram_pad_token_id": 2,
}
DEMO = {
    "model_type": "deepseek_demo",
    "engram_vocab_size": [100, 200],
    "max_ngram_size": 3,
    "n_embed_per_ngram": 64,
    "n_head_per_ngram": 2,
    "layer_ids": [1, 4],
    "pad_id": 2,
    "seed": 3,
}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a config beside a small tokenizer and returns the directory."""
    byte_level(TOKENS).save(str(tmp_path / "tokenizer.json"))

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_qwen_config(checkpoint):
    spec = NgramSpec.from_pretrained(checkpoint(QWEN))
    assert spec == NgramSpec.qwen4_exp(
        vocab_size=300,
        ngram_size=3,
        heads_per_ngram=2,
        ngram_vocab_size_base=1000,
        seed=7,
        eos_token_id=9,
        ple_layer_ids=[1, 3],
        ple_embed_dim=32,
    )
    assert spec.layer_ids == (0, 2)
    assert all(each.rows % 128 == 0 for each in spec.layers)


def test_qwen_config_nested_takes_what_only_the_outer_one_says(checkpoint):
    inner = {name: value for name, value in QWEN.items() if name != "eos_token_id"}
    outer = {"model_type": "qwen4_exp", "text_config": inner, "eos_token_id": 9}
    assert NgramSpec.from_pretrained(checkpoint(outer)) == NgramSpec.from_pretrained(
        checkpoint(QWEN)
    )
    outer["text_config"] = inner | {"eos_token_id": None}
    assert NgramSpec.from_pretrained(checkpoint(outer)).blocked_id == 9


def test_qwen_config_as_the_library_saves_and_computes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    config = transformers.Qwen4ExpTextConfig(
        vocab_size=90,
        hidden_size=48,
        num_hidden_layers=4,
        ple_layer_ids=[1, 3],
        ngram_size=4,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        eos_token_id=5,
    )
    config.save_pretrained(tmp_path)
    spec = NgramSpec.from_pretrained(tmp_path)
    for ordinal, each in enumerate(spec.layers):
        theirs = modeling.Qwen4ExpTextNGramEmbedding(config, 48, each.layer, ordinal)
        assert theirs.layer_multipliers.tolist() == list(each.multipliers)
        assert theirs.ngram_heads_vocab_sizes.tolist() == list(each.primes)
        assert theirs.ngram_heads_offsets.tolist() == list(each.offsets)
        assert tuple(theirs.ngram_embedding.weight.shape) == (each.rows, spec.dim)


def test_v41_config(checkpoint):
    spec = NgramSpec.from_pretrained(checkpoint(V41))
    assert spec.canonical_vocab_size == COMPRESSED
    assert spec.dead_positions
    # Primes are handed out in the config's order of layers, whatever the layers' own.
    assert [(each.layer, each.primes[0]) for each in spec.layers] == [(2, 113), (5, 101)]
    assert NgramSpec.from_pretrained(checkpoint({"model_type": "x", "text_config": V41})) == spec


def test_demo_config(checkpoint):
    spec = NgramSpec.from_pretrained(checkpoint(DEMO))
    assert spec.dim == 32
    assert spec.layers[0].primes == (101, 103, 211, 223)
    assert spec.layers[1].primes == (107, 109, 227, 229)
    assert not spec.dead_positions
    assert NgramSpec.from_pretrained(
        checkpoint(DEMO | {"engram_vocab_size": 100})
    ) == NgramSpec.from_pretrained(checkpoint(DEMO | {"engram_vocab_size": [100, 100]}))


BAD = {
    "another compressed size": (
        V41 | {"engram_compressed_vocab_size": 17},
        "engram_compressed_vocab_size is 17, but its parameters and tokenizer give 16",
    ),
    "other row counts": (
        V41 | {"engram_num_embeddings": [421, 508]},
        r"engram_num_embeddings is \[421, 508\], but .* give \[420, 508\]",
    ),
    "row counts of one layer": (
        V41 | {"engram_num_embeddings": [420]},
        r"engram_num_embeddings is \[420\], but",
    ),
    "pad beyond the vocabulary": (V41 | {"engram_pad_token_id": 32}, "pad id 32 is not in"),
    "a string for a number": (V41 | {"engram_n_heads": "8"}, "engram_n_heads must be an integer"),
    "a boolean for a number": (V41 | {"engram_n_heads": True}, "must be an integer, not True"),
    "an empty list": (V41 | {"engram_layer_ids": []}, "engram_layer_ids must be a list"),
    "strings in a list": (V41 | {"engram_layer_ids": ["1"]}, "must be an integer, not '1'"),
    "a layer twice": (V41 | {"engram_layer_ids": [2, 2]}, "named once each"),
    "a layer below zero": (V41 | {"engram_layer_ids": [2, -2]}, "must not be negative"),
    "orders below two": (V41 | {"engram_max_ngram_size": 1}, "one positive size for each order"),
    "no heads": (V41 | {"engram_n_heads": 0}, "heads must be positive"),
    "sizes of other orders": (
        DEMO | {"engram_vocab_size": [100]},
        "must hold one positive size for each order",
    ),
    "values that cannot be divided": (DEMO | {"n_embed_per_ngram": 65}, "cannot be divided"),
    "embedding that cannot be divided": (QWEN | {"ple_embed_dim": 33}, "cannot be divided"),
    "no eos": (QWEN | {"eos_token_id": None}, "lacks eos_token_id"),
    "an empty list of eos": (QWEN | {"eos_token_id": []}, r"eos_token_id must be .*, not \[\]"),
    "eos beyond the vocabulary": (QWEN | {"eos_token_id": 300}, "blocked_id 300 is not one"),
    "no layers with memory": (QWEN | {"ple_layer_ids": []}, "ple_layer_ids must be a list"),
    "a layer number zero": (QWEN | {"ple_layer_ids": [0]}, "ascending from 0 on"),
    "a table size of zero": (QWEN | {"ngram_vocab_size_base": 0}, "must be positive"),
    "an unknown model": ({"model_type": "llama"}, "model_type 'llama' has no n-gram memory"),
    "no model type": ({"vocab_size": 5}, "lacks model_type"),
    "not an object": ([1], "must hold a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_configs_that_do_not_add_up(checkpoint, name):
    config, message = BAD[name]
    with pytest.raises(SpecError, match=message) as caught:
        NgramSpec.from_pretrained(checkpoint(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [QWEN, V41, DEMO], ids=lambda config: config["model_type"])
def test_every_missing_field_is_named(checkpoint, config):
    may_lack = {"model_type", "hidden_size", "seed", "make_ngram_vocab_size_divisible_by"}
    for field in config.keys() - (may_lack if config is QWEN else {"model_type"}):
        missing = {name: value for name, value in config.items() if name != field}
        wanted = "hidden_size" if field == "ple_embed_dim" else field
        if field == "ple_embed_dim":
            del missing["hidden_size"]
        with pytest.raises(SpecError, match=rf"config\.json lacks {wanted}; it must be"):
            NgramSpec.from_pretrained(checkpoint(missing))


def test_files_that_are_missing_or_no_json(tmp_path):
    with pytest.raises(SpecError, match=r"config\.json cannot be read \(No such file"):
        NgramSpec.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"config\.json is not JSON"):
        NgramSpec.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(V41))
    with pytest.raises(SpecError, match=r"tokenizer\.json does not exist"):
        NgramSpec.from_pretrained(tmp_path)


def _one(patterns, name):
    """Which of the patterns match `name`."""
    return [i for i, pattern in enumerate(patterns) if matches(pattern, name)]


def test_v41_tensors(checkpoint):
    spec = NgramSpec.from_pretrained(checkpoint(V41))
    two, five = family("deepseek-v41").tensors(spec)
    assert (two.layer, five.layer) == (2, 5)
    for name in ("layers.2.engram.embed.weight", "model.layers.2.engram.embed_tokens.weight"):
        assert _one(two.values, name) == [0]
        assert _one(five.values, name) == []
    for name in (
        "model.layers.5.engram.embed.scale",
        "layers.5.engram.embed_tokens.weight_scale_inv",
    ):
        assert matches(five.scales, name)
        assert not matches(two.scales, name)
    for name in ("layers.12.engram.embed.weight", "xlayers.2.engram.embed.weight",
                 "layers.2.engram.embed.weight.bak"):  # fmt: skip
        assert _one(two.values, name) == []


def test_qwen_tensors(checkpoint):
    spec = NgramSpec.from_pretrained(checkpoint(QWEN))
    first, second = family("qwen4_exp").tensors(spec)
    base = "model.language_model.layers.2.ple.ple_embedding."
    shard = next(filter(None, (matches(p, base + "ngram_embedding.shard_17.weight")
                               for p in second.values)))  # fmt: skip
    assert shard["shard"] == "17"
    assert _one(second.values, base + "ngram_embedding.weight") == [1]
    assert matches(second.global_scale, base + "ngram_embedding.weight_scale")
    assert _one(first.values, base + "ngram_embedding.weight") == []
    assert second.scales is None
    stated = {
        name: values
        for name in ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")
        for pattern, values in second.checks.items()
        if matches(pattern, base + name)
    }
    hashed = spec.layers[1]
    assert list(stated.values()) == [hashed.multipliers, hashed.primes, hashed.offsets]


def test_demo_tensors(checkpoint):
    embedding = "multi_head_embedding.embedding.weight"
    spec = NgramSpec.from_pretrained(checkpoint(DEMO))
    one, four = family("deepseek_demo").tensors(spec)
    assert _one(one.values, f"layers.1.engram.{embedding}") == [0]
    assert _one(one.values, f"1.{embedding}") == [0]
    assert _one(four.values, f"layers.1.engram.{embedding}") == []
    assert _one(one.values, f"1.layers.4.engram.{embedding}") == []
    assert _one(four.values, f"1.layers.4.engram.{embedding}") == [0]
    assert _one(one.values, f"layers.11.engram.{embedding}") == []
    alone = NgramSpec.from_pretrained(checkpoint(DEMO | {"layer_ids": [4]}))
    (only,) = family("deepseek_demo").tensors(alone)
    assert _one(only.values, embedding) == [0]
    assert _one(only.values, f"anything.{embedding}") == [0]


def test_every_family_says_what_the_commands_need():
    assert set(families.families()) >= {"deepseek_demo", "deepseek_v41", "qwen4_exp"}
    for each in families.families().values():
        sized = {each.size_parameter: 300}
        if each.needs_tokenizer:
            sized["tokenizer"] = np.arange(50, dtype=np.int32)
        spec = NgramSpec.of_family(each.name, **sized)
        assert spec.family == each.name
        assert [tensors.layer for tensors in each.tensors(spec)] == list(spec.layer_ids)
        assert all(300 <= prime < 1500 for layer in spec.layers for prime in layer.primes)


def test_an_unknown_family_is_named():
    with pytest.raises(SpecError, match="family 'llama' is unknown; choose one of deepseek_demo"):
        NgramSpec.of_family("llama")


NEW_FAMILY = """
from engram.spec import LayerHash, NgramSpec
from engram.spec._family import Family, LayerTensors


def build(*, size=11):
    layers = (LayerHash(0, (1,), (size,), size),)
    return NgramSpec("unigrams", 50, 1, 1, 1, 4, layers, 0, None, False)


FAMILY = Family(
    name="unigrams",
    model_types=("unigram_model",),
    build=build,
    from_config=lambda config, directory: build(size=config.integer("size")),
    tensors=lambda spec: [LayerTensors(0, ("table",))],
    row_format="fp32",
    size_parameter="size",
    needs_tokenizer=False,
)
"""


def test_a_family_is_added_by_one_module(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "unigrams.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "more")])
    families.families.cache_clear()
    try:
        spec = NgramSpec.from_pretrained(checkpoint({"model_type": "unigram_model", "size": 7}))
        assert spec.row_ids([0, 1, 8]).ravel().tolist() == [0, 1, 1]
        assert NgramSpec.of_family("unigrams").layers[0].rows == 11
    finally:
        families.families.cache_clear()
        sys.modules.pop("engram.spec.families.unigrams", None)
