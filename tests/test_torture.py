"""`engram torture`, short: nothing wrong comes out, and what is wrong is noticed."""

from __future__ import annotations

import ctypes
import json
import os
import signal

import numpy as np
import pytest
import torch
from array_source import SCHEMA, array_source
from conftest import small_v41
from python_process import run_python
from test_cli import engram

from engram.errors import ConfigError
from engram.gpu.gather import Gather
from engram.rows import ROW_FORMATS
from engram.store.writer import build_table
from engram.torture import leaks
from engram.torture.checker import Checker
from engram.torture.client import Client, Told
from engram.torture.gpu_client import GpuClient
from engram.torture.plan import Agenda, Plan, moments
from engram.torture.reports import Reporter, resources
from engram.torture.table import TortureTable
from engram.torture.tally import Tally
from engram.torture.traffic import Traffic

SLOW_MACHINE_S = 60.0


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A small table with seed 5."""
    path = tmp_path_factory.mktemp("torture") / "table"
    return TortureTable.make(path, 12 << 20, 5)


def test_nobody_minds_being_killed(table):
    done = engram(
        *("torture", "--minutes", 0.12, "--clients", 3, "--kill-sidecar-every", 3),
        *("--stop-client-every", 2, "--table", table.path, "--recovery-max", SLOW_MACHINE_S),
        "--json",
    )
    facts = json.loads(done.stdout)
    assert done.returncode == 0, facts
    assert facts["sound"] is True
    assert facts["rows_wrong"] == 0
    assert facts["lookups_failed"] == {}
    assert facts["rows_checked"] > 10_000
    assert facts["faults"]["sidecar killed"] >= 1
    assert facts["faults"]["client killed"] >= 3
    assert facts["counts"]["hits"] > 0
    assert facts["counts"]["fetches"] > 0
    assert facts["counts"]["read_directly"] > 0


def test_nobody_minds_being_killed_on_the_gpu_tier(table):
    done = engram(
        *("torture", "--minutes", 0.12, "--clients", 2, "--gpu-clients", 1, "--gpu-device", "cpu"),
        *("--kill-sidecar-every", 3, "--kill-client-every", 2.5, "--stop-client-every", 3),
        *("--table", table.path, "--recovery-max", SLOW_MACHINE_S, "--json"),
    )
    facts = json.loads(done.stdout)
    assert done.returncode == 0, facts
    assert facts["rows_wrong"] == 0
    assert facts["lookups_failed"] == {}
    assert facts["faults"]["sidecar killed"] >= 1
    gpu = facts["gpu"]
    assert gpu["devices"] == ["cpu"]
    assert 10_000 < gpu["rows_checked"] < facts["rows_checked"]
    assert 0 < gpu["lookups"] < facts["lookups"]
    assert gpu["ngrams_on_device"] > 0
    assert gpu["ngrams_in_place"] > 0
    assert gpu["ngrams_staged"] > 0


def test_torch_is_imported_for_clients_of_the_gpu_tier_only():
    run_python(
        "import sys, engram.torture.supervisor, engram.torture.nursery\n"
        "assert 'torch' not in sys.modules"
    )


def _told(table_seed):
    return Told(0, "", "", table_seed, 1, 2, "direct", False, "cpu", rehearses=True)


def _works(opened, table_seed, worker=Client):
    return worker(opened, _told(table_seed)).works.each


def test_every_kind_of_work_finds_right_rows_right_and_wrong_rows_wrong(table):
    import engram as package

    with package.open(table.path, ram="1MiB") as opened:
        _works(opened, table.seed)[0]()  # else nothing could be read in place
        for work in _works(opened, table.seed):
            checked, wrong = work()
            assert wrong == 0, work.__name__
            assert checked > 0 or work.__name__ == "cancelled"
        for work in _works(opened, table.seed ^ 1):
            checked, wrong = work()
            assert wrong == checked, work.__name__


def test_every_kind_of_step_finds_right_rows_right_and_wrong_rows_wrong(table):
    import engram as package

    with package.open(table.path, ram="1MiB") as opened:
        for work in _works(opened, table.seed, GpuClient):
            checked, wrong = work()
            assert wrong == 0, work.__name__
            assert checked > 0 or work.__name__ in ("gpu_cancelled", "gpu_empty")
        for work in _works(opened, table.seed ^ 1, GpuClient):
            checked, wrong = work()
            assert wrong == checked, work.__name__


@pytest.mark.parametrize("where", ["embeddings", "device memory"])
def test_one_wrong_bit_of_a_step_is_found(table, where, monkeypatch):
    import engram as package

    gather = Gather.__call__

    def false_gather(self, addresses, out, *arguments, kept):
        gather(self, addresses, out, *arguments, kept=kept)
        if where == "embeddings" and out is not None and out.numel():
            out[0].view(torch.uint8).view(-1)[77] ^= 0x10
        elif where == "device memory" and kept:
            slots = addresses[1][addresses[1] > 0]
            ctypes.c_uint8.from_address(int(slots[0])).value ^= 0x10

    with package.open(table.path, ram="1MiB") as opened:
        client = GpuClient(opened, _told(table.seed))
        monkeypatch.setattr(Gather, "__call__", false_gather)
        checked, wrong = client.gpu_everywhere()  # every step comes twice
        assert 0 < wrong < checked / 10


@pytest.mark.parametrize("part", ["values", "scales"])
def test_the_checker_finds_one_bit(table, part):
    import engram as package

    with package.open(table.path, ram=0) as opened:
        batch = Traffic(opened.spec, np.random.default_rng(0), 1).decode()
        rows = opened.lookup(batch.tokens, batch.starts, batch.history)
        ids = batch.row_ids(opened.spec)
        checker = Checker(table.seed, opened.row_format)
        assert checker.wrong_rows(opened.layers, ids, rows) == 0
        getattr(rows, part)[0, 1, 7, 3] ^= 0x10
        assert checker.wrong_rows(opened.layers, ids, rows) == 1
        looked_at = np.ones((len(batch.tokens), len(opened.columns)), np.bool_)
        assert checker.wrong_rows(opened.layers, ids, rows, looked_at) == 1
        looked_at[0, 7] = False
        assert checker.wrong_rows(opened.layers, ids, rows, looked_at) == 0


def test_traffic_repeats_itself_for_a_seed_and_shares_what_is_frequent(table):
    spec = small_v41()

    def tokens(seed):
        traffic = Traffic(spec, np.random.default_rng(seed), 9)
        batches = [traffic.prefill() for _ in range(20)] + [traffic.decode() for _ in range(20)]
        return np.concatenate([batch.tokens for batch in batches]), batches

    one, batches = tokens(1)
    assert np.array_equal(one, tokens(1)[0])
    other, _ = tokens(2)
    pairs = [set(zip(text[:-1].tolist(), text[1:].tolist(), strict=True)) for text in (one, other)]
    assert len(pairs[0] & pairs[1]) > len(pairs[0]) / 10
    for batch in batches:
        assert batch.row_ids(spec).shape == (len(batch.tokens), 2, spec.num_columns)
    assert {len(batch.starts) - 1 for batch in batches[:20]} <= {1, 2, 3, 4}
    assert any(batch.dead is not None for batch in batches)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_tables_of_any_row_format(row_format, tmp_path):
    import engram as package

    table = TortureTable.make(tmp_path / "t", 12 << 20, 3, row_format)
    assert 12 << 20 < table.row_bytes < 24 << 20
    with package.open(table.path, ram="1MiB") as opened:
        assert opened.row_format.name == row_format
        assert Client(opened, _told(table.seed)).decode()[1] == 0
        checked, wrong = GpuClient(opened, _told(table.seed)).gpu_everywhere()
        assert wrong == 0 < checked
        assert GpuClient(opened, _told(table.seed ^ 1)).gpu_everywhere() == (checked, checked)


def test_only_synthetic_tables_can_be_checked(table, tmp_path):
    with pytest.raises(ConfigError, match="10MiB"):
        TortureTable.make(tmp_path / "t", 1000, 0)
    build_table(tmp_path / "other", SCHEMA, array_source())
    with pytest.raises(ConfigError, match="no synthetic table"):
        TortureTable.at(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--on-unavailable", "never"), "use direct, wait or fail"),
        (("--row-format", "int4"), "use one of bf16"),
        (("--clients", 2, "--gpu-clients", 3), "only 2 clients"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments, said):
    done = engram("torture", *arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_faults_come_when_the_plan_says():
    rng = np.random.default_rng(4)
    kills = list(moments(rng, 8.0, 600.0))
    assert 70 <= len(kills) <= 80
    assert all(6.4 <= gap <= 9.6 for gap in np.diff(kills))
    assert kills == list(moments(np.random.default_rng(4), 8.0, 600.0))
    assert list(moments(rng, 0.0, 600.0)) == []
    done = []
    agenda = Agenda()
    for number, when in enumerate((3.0, 1.0, 2.0, 1e12)):
        agenda.at(when, done.append, number)
    agenda.run_due()
    assert done == [1, 2, 0]
    assert agenda.wait_s(5.0) == 5.0


def _worked(**facts):
    told = {"client": 1, "what": "decode", "rows": 10, "wrong": 0, "seconds": 0.1}
    counts = dict.fromkeys(("hits", "misses", "fetches", "read_directly", "dropped"), 1)
    return {**told, **counts, **facts}


@pytest.mark.parametrize(
    ("on_unavailable", "facts", "problem"),
    [
        ("direct", {}, None),
        ("direct", {"wrong": 2}, "2 rows were wrong"),
        ("direct", {"rows": 0}, "no row was checked"),
        ("direct", {"failed": "UnavailableError: gone"}, "failed with UnavailableError"),
        ("wait", {"failed": "OverloadError: full"}, "failed with OverloadError"),
        ("fail", {"failed": "StreamLostError: gone"}, None),
        ("fail", {"failed": "RowIntegrityError: layer 1"}, "failed with RowIntegrityError"),
    ],
)
def test_what_is_wrong_is_named(on_unavailable, facts, problem):
    tally = Tally()
    tally.worked(_worked(**facts))
    tally.judge(Plan(on_unavailable=on_unavailable))
    assert len(tally.problems) == (problem is not None)
    assert problem is None or problem in tally.problems[0]
    assert tally.facts(Plan())["sound"] == (problem is None)


def test_late_recoveries_and_growth_are_named():
    tally = Tally()
    tally.worked(_worked())
    tally.recoveries_s = [0.2, 1.4]
    tally.sidecar_before = {"descriptors": 40, "private_bytes": 100 << 20}
    tally.sidecar_after = {"descriptors": 50, "private_bytes": 120 << 20}
    tally.gathered = [{"descriptors": 9, "private_bytes": n << 22} for n in range(60)]
    tally.judge(Plan())
    late, descriptors, memory = tally.problems
    assert "1.40 s" in late
    assert "a sidecar gathered descriptors: 40 at first, 50 in the end" in descriptors
    assert "a client gathered private bytes" in memory


def test_shared_memory_is_traced_to_its_holders():
    from engram.ram.memory import SEALS_OF_WRITER, Memory

    memory = Memory.shared("engram-test", 4096, SEALS_OF_WRITER)
    mine = leaks.shared_memory_of(os.getpid())
    assert os.fstat(memory.descriptor).st_ino in mine
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        assert child in leaks.mappers_of(mine)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert leaks.mappers_of(mine) == []


def test_reports_are_whole_lines():
    reading, writing = os.pipe()
    Reporter(3, writing).say("worked", rows=2)
    told = json.loads(os.read(reading, 1 << 16))
    assert (told["client"], told["event"], told["rows"]) == (3, "worked", 2)
    assert told["at"] > 0
    before = resources()["descriptors"]
    os.close(reading)
    assert resources()["descriptors"] == before - 1
    os.close(writing)
    with pytest.raises(FileNotFoundError):
        resources(2**22 + 1)
