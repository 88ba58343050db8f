"""Files made to mislead: refused by one line of ours, never believed, never waited for."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from conftest import small_qwen, small_v41
from small_checkpoints import QWEN, import_rows, qwen_checkpoint
from table_files import save_tensors

from engram.checkpoint import open_checkpoint
from engram.errors import CheckpointError, CorruptTableError, SpecError, StoreError, TokenError
from engram.rows import RowFormat
from engram.spec.families import Config, family_of_model
from engram.store.checks import digest
from engram.store.journal import JOURNAL_FILE, Journal
from engram.store.manifest import MANIFEST_FILE, Schema, read_manifest
from engram.store.safetensors import INDEX_FILE, find_tensors, read_header, read_tensor
from engram.store.synth import SyntheticSource
from engram.store.tree import Meta, placed_values
from engram.store.writer import build_table

DEEP = "[" * 100_000 + "]" * 100_000


def one_line(caught):
    return "\n" not in str(caught.value) and str(caught.value).isprintable()


def entry(begin, end, shape=None, dtype="U8"):
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def tensor_file(path, header, data=b"12345678"):
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


HEADERS = {
    "overlap": {"a": entry(0, 4), "b": entry(3, 8)},
    "same bytes": {"a": entry(0, 8), "b": entry(0, 8)},
    "within": {"a": entry(0, 8), "b": entry(4, 8)},
    "hole": {"a": entry(0, 3), "b": entry(4, 8)},
    "late": {"a": entry(1, 8)},
    "short": {"a": entry(0, 7)},
    "empty inside another": {"a": entry(0, 8), "b": entry(4, 4)},
    "none": {},
    "real offset": {"a": entry(0, 8) | {"data_offsets": [0.9, 8]}},
    "text offset": {"a": entry(0, 8) | {"data_offsets": ["0", 8]}},
    "bool offset": {"a": entry(0, 8) | {"data_offsets": [False, 8]}},
    "three offsets": {"a": entry(0, 8) | {"data_offsets": [0, 8, 8]}},
    "real size": {"a": entry(0, 8, [8.5])},
    "bool size": {"a": entry(0, 8, [8, True])},
    "text shape": {"a": entry(0, 8, "8")},
    "huge sizes": {"a": entry(0, 8, [10**4000] * 2)},
    "huge offset": {"a": entry(0, 8) | {"data_offsets": [0, 10**4299]}},
    "high rank": {"a": entry(0, 8, [8] + [1] * 100)},
    "dtype": {"a": entry(0, 8, dtype=["U8"])},
    "line in a dtype": {"a": entry(0, 8, dtype="a\nb")},
    "line in a name": {"a\nb": entry(0, 8)},
    "NUL in a name": {"a\0b": entry(0, 8)},
    "surrogate in a name": {"a\ud800": entry(0, 8)},
    "infinite": '{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 8]}}',
    "twice": f'{{"a": {json.dumps(entry(0, 4))}, "a": {json.dumps(entry(0, 8))}}}',
    "field twice": '{"a": {"dtype": "U8", "shape": [8], "shape": [8], "data_offsets": [0, 8]}}',
    "deep": DEEP,
    "pairs": [["a", entry(0, 8)]],
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_the_format_forbids(tmp_path, case):
    path = tensor_file(tmp_path / "model.safetensors", HEADERS[case])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert one_line(caught)


def test_headers_that_the_format_allows(tmp_path):
    header = {"b": entry(4, 8), "none": entry(4, 4), "a": entry(0, 4), "__metadata__": {"x": "y"}}
    path = tensor_file(tmp_path / "model.safetensors", header)
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    out = np.empty(4, np.uint8)
    read_tensor(tensors["b"], 0, out)
    assert out.tobytes() == b"5678"
    assert tensors["none"].count == 0


def test_a_shard_that_points_at_another_is_refused(tmp_path):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    path = tmp_path / "model-0.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first, second = sorted(header, key=lambda name: header[name]["data_offsets"])[:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    tensor_file(path, header, whole[8 + length :])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, spec)


@pytest.mark.parametrize("text", [DEEP, '{"weight_map": 1e999}', '{"weight_map": {"a": 1}}'])
def test_indexes_that_are_none(tmp_path, text):
    tensor_file(tmp_path / "m.safetensors", {"a": entry(0, 8)})
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        find_tensors(tmp_path)
    assert one_line(caught)


@pytest.mark.parametrize("name", ["m\0.safetensors", "m\ud800.safetensors", "m\n.safetensors", ""])
def test_file_names_in_an_index(tmp_path, name):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as caught:
        find_tensors(tmp_path)
    assert one_line(caught)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX_FILE])
def test_pipes_in_a_checkpoint(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError):
        find_tensors(tmp_path)


def test_pipes_in_tables_and_imports(tmp_path):
    os.mkfifo(tmp_path / MANIFEST_FILE)
    with pytest.raises(StoreError, match="not a regular file"):
        read_manifest(tmp_path)
    os.mkfifo(tmp_path / JOURNAL_FILE)
    assert Journal.read(tmp_path) is None


@pytest.mark.parametrize("number", ["99999999", "999999999999", "9" * 5000])
def test_shard_numbers_are_not_believed(tmp_path, number):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    name = f"{QWEN.format(layer=spec.layer_ids[0])}.ngram_embedding.shard_{number}.weight"
    save_tensors(tmp_path / "more.safetensors", {name: ("BF16", np.zeros((1, 32), np.uint16))})
    with pytest.raises(CheckpointError, match=r"shard 13 of .* is missing|shard number of"):
        open_checkpoint(tmp_path, spec)


def test_shards_beside_a_whole_embedding(tmp_path):
    spec = small_qwen()
    qwen_checkpoint(tmp_path, spec)
    name = f"{QWEN.format(layer=spec.layer_ids[0])}.ngram_embedding.weight"
    rows = spec.layers[0].rows
    save_tensors(tmp_path / "more.safetensors", {name: ("BF16", np.zeros((rows, 32), np.uint16))})
    with pytest.raises(CheckpointError, match=r"both .* could be"):
        import_rows(tmp_path, spec, tmp_path / "table")


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """What stands in the `table.json` of a small table, without its digest."""
    path = tmp_path_factory.mktemp("table") / "t"
    schema = Schema("{}", RowFormat("bf16", 64), ((1, 900),), np.arange(3000, dtype=np.int32))
    build_table(path, schema, SyntheticSource(schema), extent_blocks=16)
    fields = json.loads((path / MANIFEST_FILE).read_text())
    del fields["digest"]
    return fields


def save(directory, body):
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    (directory / MANIFEST_FILE).write_text(json.dumps({"digest": digest(text.encode()), **body}))


ABSENT = ...
WRONG = [
    *(
        (("manifest", name), value)
        for name, values in {
            "spec": [None, 5, "\ud800"],
            "row_format": [None, [], {"name": "bf16"}],
            "layers": [None, [], [[1]], [[1, 2**61]], [[1, 2**62]], [[1, 9.0]], [[2**40, 900]]],
            "token_map_digest": [7, "x", []],
            "table_seed": [-1, 2**64, 2**70, 1.0, True, "1"],
            "extent_blocks": [0, -1, 2**40, None, True],
            "extents": [None, {}, [], [None], [[1, 0, 900]]],
            "source": [None, [], 5],
            "format_version": [None, True, "1", ABSENT],
            "fingerprint": [None, ABSENT],
            "more": [1],
        }.items()
        for value in values
    ),
    (("manifest",), None),
    (("manifest",), ABSENT),
    (("manifest", "row_format", "dim"), 64.0),
    (("manifest", "row_format", "dim"), 2**70),
    (("manifest", "row_format", "name"), []),
    (("manifest", "row_format", "global_scale"), "1"),
    (("manifest", "extents", 0, 3), None),
    (("manifest", "extents", 0, 2), True),
    (("physical",), None),
    (("physical",), ABSENT),
    *(
        (("physical", name), value)
        for name, values in {
            "file_bytes": [None, -1, 2**80, 1.0],
            "extent_pages": [None, 5, ["1"], [2.0], [2**60]],
            "token_map_page": [-1, 2**60, "1"],
            "token_map_bytes": [-1, 2**62, None, 1.0],
            "tree_digest": [None, 5, "x"],
            "more": [1],
        }.items()
        for value in [*values, ABSENT]
        if (name, value) != ("more", ABSENT)
    ),
]


@pytest.mark.parametrize(("place", "value"), WRONG, ids=str)
def test_table_json_with_a_fresh_digest(tmp_path, body, place, value):
    changed = json.loads(json.dumps(body))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    save(tmp_path, changed)
    with pytest.raises(CorruptTableError) as caught:
        read_manifest(tmp_path)
    assert one_line(caught)


def test_table_json_that_is_deep(tmp_path, body):
    (tmp_path / MANIFEST_FILE).write_text(DEEP)
    with pytest.raises(CorruptTableError):
        read_manifest(tmp_path)
    source = {}
    for _ in range(200):
        source = {"a": source}
    save(tmp_path, {**body, "manifest": {**body["manifest"], "source": source}})
    with pytest.raises(CorruptTableError, match="nested too deep"):
        read_manifest(tmp_path)


def test_a_journal_must_match_its_digest(tmp_path):
    journal = Journal({"a": 1}, "boot", ("0" * 32, "1" * 32))
    journal.write(tmp_path)
    assert Journal.read(tmp_path) == journal
    path = tmp_path / JOURNAL_FILE
    text = path.read_text()
    for wrong in (
        text.replace("1" * 32, "1" * 31 + "2"),
        text.replace('"boot": "boot"', '"boot": "boat"'),
        text.replace('"a": 1', '"a": Infinity'),
        DEEP,
        "[]",
        '{"digest": 1}',
    ):
        assert wrong != text
        path.write_text(wrong)
        assert Journal.read(tmp_path) is None


@pytest.mark.parametrize("beyond", [2**63, 2**64 - 1])
def test_uint64_is_refused_by_its_true_value(beyond):
    spec = small_qwen()
    past = np.full(spec.max_order - 1, beyond, np.uint64)
    with pytest.raises(TokenError, match=rf"history\[0\] = {beyond} "):
        spec.windows([1, 2], history=past)
    with pytest.raises(TokenError, match=rf"history\[0, 0\] = {beyond} "):
        spec.windows([[1, 2]], history=past[None])
    with pytest.raises(TokenError, match=rf"tokens\[1\] = {beyond} "):
        spec.windows(np.array([1, beyond], np.uint64))
    with pytest.raises(TokenError, match=rf"not {beyond}"):
        spec.windows([1, 2], starts=np.array([0, beyond], np.uint64))


def test_ragged_dead():
    with pytest.raises(TokenError, match="dead cannot be read"):
        small_v41().windows([[1, 2]], dead=[[True], [True, False]])


@pytest.mark.parametrize("kind", [[], ["qwen4_exp"], {}, 5])
def test_model_types_that_are_no_text(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(SpecError, match="has no n-gram memory"):
        family_of_model(Config.read(tmp_path / "config.json"))


def test_layers_beyond_int32():
    with pytest.raises(SpecError, match=f"layer {2**31} is not in"):
        small_qwen(ple_layer_ids=(1, 2**31 + 1))


def test_a_branch_page_that_names_itself_is_refused(tmp_path):
    path = tmp_path / "data.mdb"
    header = struct.pack("<QHHHH", 2, 0, 0x01, 16 + 2 * 200, 4096)
    node = struct.pack("<HHHH", 2, 0, 0, 0)
    page = header + struct.pack("<200H", *[2000] * 200)
    page = page.ljust(2000, b"\0") + node
    path.write_bytes(bytes(2 * 4096) + page.ljust(4096, b"\0"))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(CorruptTableError, match="page 2 is not part"):
            list(placed_values(descriptor, Meta(2, 2)))
    finally:
        os.close(descriptor)


def test_a_pipe_or_endless_nesting_as_config_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep").write_text("[" * 100_000)
    for name in ("pipe", "deep"):
        with pytest.raises(SpecError, match=name):
            Config.read(tmp_path / name)
