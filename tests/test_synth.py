"""Synthetic rows: a pure function of seed, layer and row, finite in every format."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import build_synthetic, small_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files import rows_of

from engram.errors import SelectionError
from engram.rows import ROW_FORMATS, RowFormat
from engram.ssd import schema_of
from engram.store.manifest import read_manifest
from engram.store.synth import SyntheticSource, synthetic_rows, synthetic_rows_twin

GLOBAL = ("fp8", "nvfp4")


def row_format(name, dim=160):
    return RowFormat(name, dim, 1.0 if name in GLOBAL else None)


def dims(name):
    unit = {"fp8-ue8m0": 32, "nvfp4": 16, "nf4": 2}.get(name, 1)
    return st.integers(1, 200 // unit).map(lambda count: count * unit)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(ROW_FORMATS), seed=st.integers(0, 2**64 - 1))
def test_kernel_equals_twin(data, name, seed):
    fmt = row_format(name, data.draw(dims(name)))
    layer = data.draw(st.integers(0, 1000))
    ids = np.array(data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=20)), np.int64)
    rows = synthetic_rows(seed, fmt, layer, ids)
    assert rows.shape == (len(ids), fmt.row_bytes)
    np.testing.assert_array_equal(rows, synthetic_rows_twin(seed, fmt, layer, ids))


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_rows_come_in_any_order(name):
    fmt = row_format(name)
    ids = np.arange(500, 1500, dtype=np.int64)
    shuffled = np.random.default_rng(0).permutation(1000)
    rows = synthetic_rows(9, fmt, 3, ids)
    np.testing.assert_array_equal(synthetic_rows(9, fmt, 3, ids[shuffled]), rows[shuffled])
    np.testing.assert_array_equal(synthetic_rows(9, fmt, 3, ids[::2]), rows[::2])
    assert len({row.tobytes() for row in rows}) == 1000
    for other in (synthetic_rows(8, fmt, 3, ids), synthetic_rows(9, fmt, 4, ids)):
        assert (other != rows).any(axis=1).all()


def floats(name, packed, fmt):
    """Values and scales as float32."""
    values, scales = packed[:, : fmt.value_bytes], packed[:, fmt.value_bytes :]
    if name == "bf16":
        return [(values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)]
    if name in ("fp16", "fp32"):
        return [values.view(np.float16 if name == "fp16" else np.float32).astype(np.float32)]
    return [scales.copy().view(np.float32)] if name == "nf4" else []


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_every_number_is_finite_and_of_moderate_size(name):
    fmt = row_format(name)
    packed = synthetic_rows(1, fmt, 0, np.arange(20000, dtype=np.int64))
    for numbers in floats(name, packed, fmt):
        assert np.isfinite(numbers).all()
        assert np.abs(numbers).min() > 2**-4
        assert np.abs(numbers).max() < 2**6
    values, scales = packed[:, : fmt.value_bytes], packed[:, fmt.value_bytes :]
    if name in ("fp8", "fp8-ue8m0"):
        assert not ((values & 0x7F) == 0x7F).any()
        assert len(np.unique(values)) == 254
    if name == "fp8-ue8m0":
        assert 112 <= scales.min() < 127 < scales.max() <= 142
    if name == "nvfp4":
        assert scales.min() > 0
        assert scales.max() < 0x7F
    if name == "nf4":
        assert (scales.copy().view(np.float32) > 0).all()


def test_bytes_are_pinned():
    """They may never change: tables on disk were made by this rule."""
    rows = synthetic_rows(1, RowFormat("fp8-ue8m0", 32), 14, np.array([0, 384006167], np.int64))
    assert [row.tobytes().hex() for row in rows] == [
        "4102b93736d0c03a877e5a777134b7d8bb8397588f5a0464ced5d5510602726486",
        "81e51377262dbdb204878f4ca4c5928152d1049f5f1765135e5425007bb3346478",
    ]


def test_table_holds_them(tmp_path):
    spec = small_qwen()
    fmt = RowFormat("nf4", spec.dim)
    path = build_synthetic(tmp_path / "table", spec, fmt, seed=5)
    manifest, _ = read_manifest(path)
    assert manifest.source["kind"] == "synth"
    assert manifest.source["seed"] == 5
    for layer, rows in rows_of(path).items():
        ids = np.arange(len(rows), dtype=np.int64)
        np.testing.assert_array_equal(rows, synthetic_rows(manifest.table_seed, fmt, layer, ids))


def test_seed_and_schema_make_the_table_seed():
    spec = small_qwen()
    seeds = {
        SyntheticSource(schema_of(spec, RowFormat(name, spec.dim)), seed).table_seed
        for name in ("bf16", "fp16")
        for seed in (0, 1)
    }
    assert len(seeds) == 4


@pytest.mark.parametrize("ids", [np.zeros(3, np.int32), np.zeros((2, 2), np.int64)])
def test_ids_of_another_kind_are_refused(ids):
    with pytest.raises(SelectionError, match="row ids must be int64"):
        synthetic_rows(0, RowFormat("bf16", 8), 0, ids)
