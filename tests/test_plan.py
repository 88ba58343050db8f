"""`engram trace` and `engram plan` as their users meet them, and the plan's numbers."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import build_synthetic, small_qwen, small_v41
from test_cli import engram
from test_tidy import ROOT

from engram.errors import ConfigError, TraceError
from engram.rows import RowFormat
from engram.sizing.drive import reads_per_second
from engram.sizing.geometry import Geometry
from engram.sizing.picture import draw
from engram.sizing.plan import PLAN_VERSION, Drive, PageCache, make_plan
from engram.sizing.record import Recorder, record_documents
from engram.sizing.replay import replay
from engram.sizing.trace import write_trace
from engram.store.manifest import DATA_FILE

sys.path.append(str(ROOT / "benchmarks" / "policies"))
pages, traces = map(import_module, ("pages", "traces"))

DRIVE = Drive(1000.0, "as given")
TARGET_FIELDS = {
    *("hits", "of_most", "ram_bytes", "load", "page_cache_bytes", "page_cache_worst_bytes")
}
CHOICE_FIELDS = {"name", "ram_bytes", "hbm_bytes", "hits", "hbm_hits", "load"}
STEP_FIELDS = {"ram_bytes", "hits", "error", "page_cache_hits"}


def tokens(count=12_000, seed=0):
    return (np.random.default_rng(seed).zipf(1.5, count) % 500).astype(np.int32)


def traced(table, ids, lookup_tokens=100, **options):
    from engram.ssd import SsdTier

    tier = SsdTier(table)
    recorder = Recorder(tier.spec, tier.fingerprint, **options)
    record_documents(recorder, tier.spec, [ids], lookup_tokens)
    tier.close()
    return recorder.finish()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Room for more pages than the trace touches."""
    spec = small_v41(engram_vocab_size=20_000)
    path = tmp_path_factory.mktemp("planned") / "v41"
    return build_synthetic(path, spec, RowFormat("fp8-ue8m0", spec.dim), extent_blocks=7168)


@pytest.fixture(scope="module")
def trace(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "v41.trace"
    write_trace(path, traced(table, tokens()))
    return path


def test_geometry_is_the_tables(table):
    geometry, spec = Geometry.of(table), small_v41(engram_vocab_size=20_000)
    assert geometry.rows == len(spec.layers) * spec.heads
    assert geometry.pages * geometry.rows_per_page >= sum(each.rows for each in spec.layers)
    slots = geometry.ram_slots(1 << 20)
    assert geometry.ram_bytes(slots) <= 1 << 20 < geometry.ram_bytes(slots + 1)
    assert geometry.pages_bytes_worst(3) == 3 * geometry.rows * 4096
    assert geometry.pages_of(1) == pytest.approx(geometry.rows, rel=0.01)
    assert geometry.pages_of(1e9) == pytest.approx(geometry.pages)
    assert geometry.pages_bytes_worst(1e9) == geometry.pages * 4096


def test_what_memory_buys(table):
    geometry = Geometry.of(table)
    plan = make_plan(traced(table, tokens()), geometry, DRIVE, ram=256 << 10, hbm=128 << 10)
    now, twice, hbm = plan.choices
    assert [each.name for each in plan.choices] == ["now", "twice the RAM", "with HBM"]
    assert now.hits < twice.hits <= plan.most_hits
    assert now.hits < hbm.hits
    assert 0 < hbm.hbm_hits < hbm.hits
    for each in plan.choices:
        rows = each.load.reads_per_token
        assert each.load.tokens_per_second == pytest.approx(DRIVE.reads_per_second / rows)
        assert rows <= (1 - each.hits) * geometry.rows * plan.accesses / plan.tokens
    reached = [target for target in plan.targets if target.ram_bytes is not None]
    assert reached
    assert [target.ram_bytes for target in reached if target.of_most is None] == sorted(
        target.ram_bytes for target in reached if target.of_most is None
    )
    for target in reached:
        assert target.ram_bytes < target.page_cache_bytes <= target.page_cache_worst_bytes
    assert plan.steps[0].hits > plan.steps[0].page_cache_hits
    for one, more in pairwise(plan.steps):
        assert 0 <= one.page_cache_hits <= more.page_cache_hits <= 1
        assert one.hits <= more.hits


def test_page_caches_hit_what_is_said(table):
    spec, geometry, text = small_v41(engram_vocab_size=20_000), Geometry.of(table), tokens(6000)
    recency = replay(traced(table, text, lookup_tokens=1), recency=True)
    said = PageCache(recency, geometry)
    run = traces.trace("text", spec, [text], traces.one_stream([len(text)], 1))
    row_bytes = RowFormat("fp8-ue8m0", spec.dim).row_bytes
    found, count = pages.pages_of(run, spec, row_bytes)
    assert count == geometry.pages
    late = len(run.keys) // 2
    for size in (1 << 20, 4 << 20, 16 << 20, 32 << 20):
        missed = pages.rows_missed(run, found, count, size)[late:]
        assert said.hits(size) == pytest.approx(1 - missed.mean() / geometry.rows, abs=0.03)


def test_new_text_has_a_ceiling(table):
    fresh = np.random.default_rng(1).integers(0, 600, 4000, dtype=np.int32)
    plan = make_plan(traced(table, fresh), Geometry.of(table), DRIVE, ram=1 << 20)
    assert plan.most_hits < 0.8
    assert [target.ram_bytes for target in plan.targets[:3]] == [None] * 3
    assert [target.of_most for target in plan.targets[3:]] == [0.8, 0.9, 0.95]
    assert all(target.ram_bytes is not None for target in plan.targets[3:])


def test_a_plan_needs_numbers(table, qwen_table):
    trace, geometry = traced(table, tokens(4000)), Geometry.of(table)
    for options, word in (
        ({"drive": Drive(0, "")}, "--iops"),
        ({"ram": 100}, "--ram"),
        ({"hbm": 100}, "--hbm"),
    ):
        with pytest.raises(ConfigError, match=word):
            make_plan(trace, **({"geometry": geometry, "drive": DRIVE, "ram": 1 << 20} | options))
    with pytest.raises(TraceError, match="record a trace of this table"):
        make_plan(trace, Geometry.of(qwen_table), DRIVE, ram=1 << 20)
    with pytest.raises(TraceError, match="says nothing"):
        make_plan(traced(table, tokens(90)), geometry, DRIVE, ram=1 << 20)


def test_the_picture_is_sound_whatever_the_table_is_called(table):
    plan = make_plan(traced(table, tokens(5000)), Geometry.of(table), DRIVE, ram=1 << 20)
    from dataclasses import replace

    picture = ElementTree.fromstring(draw(replace(plan, table="<a & b>")))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "Hits by memory: <a & b>" in texts
    assert any(text.startswith("now: 1MiB") for text in texts)
    for line in picture.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 720
            assert 0 <= y <= 440


def test_a_drive_is_measured(table, tmp_path):
    assert reads_per_second(table / DATA_FILE, 0.05) > 10
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="--iops"):
        reads_per_second(tmp_path / "empty", 0.01)


def test_record_info_replay_plan(table, tmp_path):
    np.save(tmp_path / "ids.npy", tokens())
    out = tmp_path / "t.trace"
    source = ("--table", table, "--tokens", tmp_path / "ids.npy")
    made = engram("trace", "record", out, *source, "--rate", "1/2", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    facts = json.loads(made.stdout)
    assert facts == json.loads(engram("trace", "info", out, "--json").stdout)
    assert (facts["tokens"], facts["sampled_one_in"]) == (12_000, 2)
    assert facts["fingerprint"] in engram("trace", "info", out).stdout
    points = json.loads(engram("trace", "replay", out, "--json").stdout)
    assert points[0]["slots"] == 32
    assert "n-grams" in engram("trace", "replay", out).stdout
    again = engram("trace", "record", out, *source)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    asked = ("plan", out, "--table", table, "--ram", "1MiB", "--iops", "5000")
    picture = tmp_path / "p.svg"
    plan = engram(*asked, "--hbm", "1MiB", "--json", "--plot", picture)
    assert (plan.returncode, plan.stderr) == (0, "")
    require_schema(json.loads(plan.stdout))
    assert "now: 1MiB" in picture.read_text()
    shown = engram(*asked)
    assert shown.returncode == 0
    assert "twice the RAM" in " ".join(shown.stdout.split())


def require_schema(plan):
    assert plan["plan_version"] == PLAN_VERSION
    assert set(plan) == {
        *(
            "plan_version",
            "table",
            "table_bytes",
            "fingerprint",
            "tokens",
            "accesses",
            "samples",
            "level",
        ),
        *("most_hits", "drive", "targets", "choices", "steps"),
    }
    assert plan["drive"] == {"reads_per_second": 5000.0, "source": "as given"}
    assert [choice["name"] for choice in plan["choices"]] == ["now", "twice the RAM", "with HBM"]
    for part, fields in (
        ("targets", TARGET_FIELDS),
        ("choices", CHOICE_FIELDS),
        ("steps", STEP_FIELDS),
    ):
        assert plan[part]
        assert all(set(each) == fields for each in plan[part])
    loads = [each["load"] for each in plan["choices"]]
    assert all(set(load) == {"reads_per_token", "tokens_per_second"} for load in loads)


def test_text_with_the_tables_tokenizer(table, deepseek_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 50)
    text = ("--text", tmp_path / "a.txt", "--tokenizer", deepseek_tokenizer)
    other = engram("trace", "record", tmp_path / "t", "--table", table, *text)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "not the one that the table was made with" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["trace", "info", "{empty}/none"], 1, "No such"),
        (["trace", "info", "{empty}"], 1, "regular"),
        (["trace", "replay", "{table}/table.json"], 1, "no trace"),
        (["trace", "record", "{empty}/t", "--table", "{table}"], 2, "--demo"),
        (["trace", "record", "{empty}/t", "--table", "{empty}", "--demo"], 1, "not a table"),
        (["trace", "record", "{empty}/t", "--table", "{table}", "--text", "x"], 2, "--tokenizer"),
        (
            [
                "trace",
                "record",
                "{empty}/t",
                "--table",
                "{table}",
                "--tokens",
                "{table}/table.json",
            ],
            2,
            "no .npy",
        ),
        (
            ["trace", "record", "{empty}/t", "--table", "{table}", "--demo", "--rate", "1/3"],
            2,
            "1/N",
        ),
        (["plan", "{trace}", "--table", "{other}", "--ram", "1GiB"], 1, "record a trace of this"),
        (["plan", "{trace}", "--table", "{empty}", "--ram", "1GiB"], 1, "not a table"),
        (["plan", "{trace}", "--table", "{table}", "--ram", "8"], 2, "like 8GiB"),
        (["plan", "{trace}", "--table", "{table}", "--ram", "8GB"], 2, "8GiB"),
        (["plan", "{trace}", "--table", "{table}", "--hbm", "2"], 2, "like 2GiB"),
        (["plan", "{trace}", "--table", "{table}", "--ram", "1GiB", "--iops", "0"], 2, "--iops"),
        (["plan", "{trace}", "--table", "{table}", "--plot", "{empty}/a.png"], 2, ".svg"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, table, trace, qwen_table, arguments, status, word):
    places = {"empty": tmp_path, "table": table, "trace": trace, "other": qwen_table}
    done = engram(*(argument.format(**places) for argument in arguments))
    assert word in done.stderr
    assert done.returncode == status
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["record", "info", "replay"])
def test_every_part_of_trace_has_help_with_an_example(command):
    done = engram("trace", command, "--help")
    assert done.returncode == 0
    assert f"Example: engram trace {command}" in done.stdout


def test_specs_of_other_families_can_be_planned(qwen_table):
    plan = make_plan(
        traced(qwen_table, tokens() % small_qwen().vocab_size),
        Geometry.of(qwen_table),
        DRIVE,
        ram=1 << 20,
    )
    assert plan.most_hits > 0.5
