"""What many tests stand on: the real tokenizer, small specs of every family, small tables."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from engram.demo.corpus import tokenizer_file
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.ssd import schema_of
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

SMALL_EXTENT_BLOCKS = 16

# Whoever starts the tests in the background may have switched interrupts off, and tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Sidecars started by commands would take a quarter of the machine each.
os.environ.setdefault("ENGRAM_RAM", "16MiB")
# And all of them the same port.
os.environ.setdefault("ENGRAM_HTTP", "off")


@pytest.fixture(scope="session")
def deepseek_tokenizer() -> Path:
    """`tokenizer.json` of DeepSeek-V4."""
    return tokenizer_file()


def small_qwen(**changes) -> NgramSpec:
    """Qwen4Exp with a vocabulary of 512 and about 500 rows a head."""
    parameters = {
        "vocab_size": 512,
        "ngram_vocab_size_base": 500,
        "eos_token_id": 2,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 512,
    }
    return NgramSpec.qwen4_exp(**(parameters | changes))


def small_v41(**changes) -> NgramSpec:
    """DeepSeek-V4.1 with a random token map over 600 ids and about 300 rows a head."""
    token_map = np.random.default_rng(7).integers(0, 450, 600).astype(np.int32)
    token_map[:450] = np.arange(450)
    parameters = {"tokenizer": token_map, "engram_vocab_size": 300, "head_dim": 64}
    return NgramSpec.deepseek_v41(**(parameters | changes))


def build_synthetic(
    path: Path, spec: NgramSpec, row_format: RowFormat, seed: int = 0, **options
) -> Path:
    """A synthetic table at `path`, of small extents."""
    schema = schema_of(spec, row_format)
    options = {"extent_blocks": SMALL_EXTENT_BLOCKS} | options
    build_table(path, schema, SyntheticSource(schema, seed), **options)
    return path


@pytest.fixture(scope="session")
def v41_table(tmp_path_factory) -> Path:
    """A small synthetic table of V4.1 geometry, with scales and dead positions."""
    spec = small_v41()
    path = tmp_path_factory.mktemp("tables") / "v41"
    return build_synthetic(path, spec, RowFormat("fp8-ue8m0", spec.dim))


@pytest.fixture(scope="session")
def qwen_table(tmp_path_factory) -> Path:
    """A small synthetic table of Qwen4Exp geometry, bf16."""
    spec = small_qwen()
    path = tmp_path_factory.mktemp("tables") / "qwen"
    return build_synthetic(path, spec, RowFormat("bf16", spec.dim))
