"""The contract that every tier passes, and the table above it, against the plain model."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
from conftest import small_qwen, small_v41
from dict_tier import DictTier
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecars import Sidecar

import engram
from engram.errors import (
    RowIntegrityError,
    SelectionError,
    ServiceError,
    SpecMismatchError,
    StoreError,
    TokenError,
)
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat, Rows
from engram.ssd import SsdTier, schema_of
from engram.store.manifest import read_manifest
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table
from engram.table import Table
from engram.tiers import Ngrams, Selection

RAM_TIERS = ("ram", "ram-tiny", "ram-0")
SERVED_TIERS = ("remote", "attached", "attached-to-none")
TIERS = ("model", "ssd-pread", "ssd-map", *RAM_TIERS, *SERVED_TIERS)
RAM_BYTES = {"ram": 1 << 20, "ram-tiny": 40_000, "ram-0": 0}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def sidecar_address(v41_table, run_folder):
    with Sidecar(run_folder / "s.sock", {"v41": v41_table}, ram="1MiB") as running:
        yield running.address


def _model(path):
    manifest, _ = read_manifest(path)
    return DictTier(small_v41(), manifest.row_format, manifest.table_seed)


@pytest.fixture(scope="module", params=TIERS)
def tier(request, v41_table):
    with contextlib.closing(_made(request.param, request, v41_table)) as made:
        yield made


def _made(kind, request, path):
    if kind == "model":
        return _model(path)
    if kind == "remote":
        from engram.remote import RemoteTier

        return RemoteTier(request.getfixturevalue("sidecar_address"), "v41")
    if kind == "attached":
        return engram.connect(request.getfixturevalue("sidecar_address"))._tier
    if kind == "attached-to-none":
        with Sidecar(request.getfixturevalue("run_folder") / "n.sock", {"v41": path}) as gone:
            return engram.connect(gone.address)._tier
    ssd = SsdTier(path, guard=kind == "ssd-map")
    if kind in RAM_BYTES:
        return ram_tiers({"v41": ssd}, RAM_BYTES[kind], shared=False)["v41"]
    return ssd


@pytest.fixture(autouse=True)
def _invariants(request):
    yield
    if "tier" in request.fixturenames:
        request.getfixturevalue("tier").check_integrity()


@st.composite
def requests(draw):
    """N-grams and a selection of the small V4.1 spec, and shuffled places with gaps."""
    spec = small_v41()
    columns = draw(st.lists(st.integers(0, 23), min_size=1, unique=True, max_size=24))
    layers = draw(st.permutations(spec.layer_ids)).copy()
    if draw(st.booleans()):
        layers = layers[:1]
    selection = Selection.of(spec, layers, columns)
    orders = draw(st.lists(st.sampled_from([2, 3, 4]), max_size=30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    windows = rng.integers(0, spec.canonical_vocab_size, (len(orders), 4), dtype=np.int32)
    for window, order in zip(windows, orders, strict=True):
        window[order:] = -1
    ngrams = Ngrams(windows, np.array(orders, np.int32))
    room = ngrams.row_count(selection) + 5
    places = rng.permutation(room)[: ngrams.row_count(selection)].astype(np.int64)
    return ngrams, selection, room, places


@given(requests())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_exact_and_where_they_belong(tier, v41_table, asked):
    ngrams, selection, room, places = asked
    found, expected = (_filled(room, tier.row_format) for _ in range(2))
    tier.read(ngrams, selection, found, places)
    _model(v41_table).read(ngrams, selection, expected, places)
    assert np.array_equal(found.values, expected.values)
    assert np.array_equal(found.scales, expected.scales)


@given(st.lists(st.integers(0, 7000), unique=True, max_size=50), st.integers(0, 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_single_rows_are_exact(tier, v41_table, ids, layer):
    row_ids = np.array(ids, np.int64)
    places = np.random.default_rng(0).permutation(len(ids) + 3)[: len(ids)].astype(np.int64)
    found, expected = (_filled(len(ids) + 3, tier.row_format) for _ in range(2))
    tier.read_rows(layer, row_ids, found, places)
    _model(v41_table).read_rows(layer, row_ids, expected, places)
    assert np.array_equal(found.packed(), expected.packed())


def _filled(room, row_format):
    rows = Rows.empty((room,), row_format)
    rows.values[:] = 0xEE
    rows.scales[:] = 0xEE
    return rows


def test_many_threads_at_once(tier, v41_table):
    table, model = Table(tier), Table(_model(v41_table))
    tokens = np.random.default_rng(3).integers(0, 600, (8, 40))
    expected = [model.lookup(row).packed() for row in tokens]
    wrong = []

    def work(index):
        for _ in range(5):
            if not np.array_equal(table.lookup(tokens[index]).packed(), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_prefetch_changes_nothing_and_returns(tier, v41_table):
    table = Table(tier)
    tokens = np.arange(100)
    table.prefetch(tokens)
    assert np.array_equal(
        table.lookup(tokens).packed(), Table(_model(v41_table)).lookup(tokens).packed()
    )


def test_stats_are_plain(tier):
    for name, value in tier.stats().items():
        assert isinstance(name, str)
        assert isinstance(value, int | str)


@st.composite
def lookups(draw):
    """Arguments of a lookup on the small V4.1 spec, ragged with history and dead positions."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    few = draw(st.sampled_from([3, 600]))
    total = sum(lengths)
    arguments = {
        "tokens": rng.integers(0, few, total, dtype=np.int32),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    }
    if draw(st.booleans()):
        arguments["history"] = rng.integers(-1, few, (len(lengths), 3), dtype=np.int32)
    if draw(st.booleans()):
        arguments["dead"] = rng.random(total) < 0.3
    if draw(st.booleans()):
        arguments["columns"] = draw(
            st.lists(st.integers(0, 23), min_size=1, unique=True, max_size=24)
        )
    if draw(st.booleans()):
        arguments["layers"] = draw(st.sampled_from([[1], [14], [14, 1]]))
    return arguments


@given(lookups())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lookup_gives_the_rows_of_row_ids(tier, v41_table, arguments):
    table = Table(tier)
    manifest, _ = read_manifest(v41_table)
    rows = table.lookup(**arguments)
    layers = list(arguments.pop("layers", table.layers))
    columns = list(arguments.pop("columns", table.columns))
    ids = table.spec.row_ids(**arguments)
    packed = rows.packed()
    assert packed.shape[:-1] == rows.shape == (len(ids), len(layers), len(columns))
    from engram.store.synth import synthetic_rows

    for i, layer in enumerate(layers):
        wanted = np.ascontiguousarray(ids[:, table.layers.index(layer)][:, columns])
        expected = synthetic_rows(manifest.table_seed, table.row_format, layer, wanted.reshape(-1))
        assert np.array_equal(packed[:, i].reshape(expected.shape), expected)


def test_shapes_follow_the_tokens(tier):
    table = Table(tier)
    one, two = np.arange(6), np.arange(6).reshape(2, 3)
    width = (2, 24, 64)
    assert table.lookup(one).values.shape == (6, *width)
    assert table.lookup(two).values.shape == (2, 3, *width)
    assert table.lookup(two).scales.shape == (2, 3, 2, 24, 2)
    assert table.lookup(np.zeros((0,), np.int32)).values.shape == (0, *width)
    ids = np.arange(12).reshape(3, 4) % 5
    rows = table.lookup_rows(14, ids)
    assert rows.packed().shape == (3, 4, 66)
    assert np.array_equal(rows.values[1, 1], rows.values[0, 0])
    assert table.lookup_rows(1, 3).values.shape == (64,)


def test_a_buffer_of_the_callers_is_filled(tier):
    table = Table(tier)
    out = Rows.empty((5, 2, 24), table.row_format)
    assert table.lookup(np.arange(5), out=out) is out
    assert np.array_equal(out.packed(), table.lookup(np.arange(5)).packed())


@pytest.mark.parametrize(
    ("error", "word", "arguments"),
    [
        (TokenError, "-1", {"tokens": [-1]}),
        (TokenError, "600", {"tokens": [5, 600]}),
        (TokenError, "starts", {"tokens": [1, 2, 3], "starts": [0, 2, 1, 3]}),
        (TokenError, "history", {"tokens": [[1, 2]], "history": [[1, 2]]}),
        (SelectionError, "column 24", {"tokens": [1], "columns": [24]}),
        (SelectionError, "layer 2", {"tokens": [1], "layers": [2]}),
        (SelectionError, "each once", {"tokens": [1], "columns": [3, 3]}),
        (SelectionError, "each once", {"tokens": [1], "layers": []}),
        (SelectionError, "integers", {"tokens": [1], "columns": [1.9, 2.2]}),
        (SelectionError, "integers", {"tokens": [1], "layers": ["1"]}),
        (SelectionError, "integers", {"tokens": [1], "layers": 1}),
    ],
)
def test_bad_lookups_get_one_line(tier, error, word, arguments):
    with pytest.raises(error, match=word) as caught:
        Table(tier).lookup(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[-1], [10**9], [0.5], ["a"]])
def test_bad_row_ids_get_one_line(tier, ids):
    with pytest.raises(SelectionError):
        Table(tier).lookup_rows(1, ids)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: Rows(rows.values[:-1], rows.scales),
        lambda rows: Rows(rows.values, None),
        lambda rows: Rows(rows.values.astype(np.int8), rows.scales),
        lambda rows: Rows(rows.values[:, ::-1], rows.scales),
        lambda rows: Rows(
            rows.values, rows.values.reshape(-1)[: rows.scales.size].reshape(rows.scales.shape)
        ),
    ],
)
def test_bad_buffers_are_refused(tier, spoil):
    table = Table(tier)
    with pytest.raises(SelectionError, match="out"):
        table.lookup(np.arange(5), out=spoil(Rows.empty((5, 2, 24), table.row_format)))


def test_repeats_of_intact_rows_survive_a_damaged_one(v41_table):
    """A failed row names itself; tokens that repeat other n-grams still get theirs."""
    model = _model(v41_table)
    tokens = np.array([7, 8, 9, 7, 8, 9])
    ids = model.spec.row_ids(tokens)
    model.damaged = {(1, int(ids[2, 0, 0]))}
    table = Table(model)
    out = Rows.empty((6, 2, 24), table.row_format)
    with pytest.raises(RowIntegrityError) as caught:
        table.lookup(tokens, out=out)
    assert caught.value.failures == {1: (int(ids[2, 0, 0]),)}
    model.damaged = set()
    sound = table.lookup(tokens)
    intact = ids[:, 0] != ids[2, 0, 0]
    assert np.array_equal(out.values[:, 0][intact], sound.values[:, 0][intact])
    assert np.array_equal(out.values[:, 1], sound.values[:, 1])


def test_table_counts(v41_table):
    with engram.open(v41_table) as table:
        table.lookup([5, 6, 5, 6, 5, 6])
        stats = table.stats()
    assert stats["lookups"] == 1
    assert stats["tokens"] == 6
    ram, ssd = stats["tiers"]
    assert ram["misses"] == 18
    assert ram["ngrams_read"] == 3 + 4 + 5
    assert ssd["rows_read"] == ram["ngrams_read"] * 16


@pytest.mark.parametrize("kind", TIERS)
def test_a_closed_tier_refuses_everything_alike(kind, request, v41_table):
    closed = _made(kind, request, v41_table)
    selection = Selection.of(closed.spec)
    ngrams = Ngrams(np.zeros((1, 4), np.int32), np.full(1, 4, np.int32))
    rows = ngrams.row_count(selection)
    out, places = _filled(rows, closed.row_format), np.arange(rows)
    closed.read(ngrams, selection, out, places)
    closed.close()
    closed.close()
    said = set()
    for call in (
        lambda: closed.read(ngrams, selection, out, places),
        lambda: closed.read_rows(0, places, out, places),
        lambda: closed.prefetch(ngrams),
    ):
        with pytest.raises((StoreError, ServiceError), match="closed") as caught:
            call()
        said.add((type(caught.value), str(caught.value)))
    assert len(said) == 1


def test_repeated_row_ids_survive_a_damaged_one(v41_table):
    model = _model(v41_table)
    ids = np.array([5, 6, 5, 7, 6, 7, 5])
    sound = Table(model).lookup_rows(1, ids).packed()
    model.damaged = {(1, 6)}
    out = _filled(len(ids), model.row_format)
    with pytest.raises(RowIntegrityError) as caught:
        Table(model).lookup_rows(1, ids, out=out)
    assert caught.value.failures == {1: (6,)}
    assert np.array_equal(out.packed()[ids != 6], sound[ids != 6])


def test_a_table_that_contradicts_its_spec_is_refused(tmp_path):
    spec = small_qwen()
    true = schema_of(spec, RowFormat("bf16", spec.dim))
    (first, rows), *others = true.layers
    for name, layers in (("rows", ((first, rows + 1), *others)), ("layers", tuple(others))):
        schema = dataclasses.replace(true, layers=layers)
        build_table(tmp_path / name, schema, SyntheticSource(schema), extent_blocks=16)
        with pytest.raises(SpecMismatchError, match="its spec needs") as caught:
            SsdTier(tmp_path / name)
        assert caught.value.field == "layers"
