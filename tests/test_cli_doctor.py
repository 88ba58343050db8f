"""`engram doctor`: what is wrong is said, with its figures, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from attaching import until
from scraping import key, samples_at
from sidecars import Sidecar
from test_cli import engram

from engram.cli._checks import CHECKS, REJECTED, findings
from engram.cli._facts import (
    Facts,
    TableFacts,
    cached_bytes,
    facts_of,
    huge_pages,
    process_at,
    table_facts,
    tables_of,
)
from engram.cli._readings import Reading
from engram.errors import RowIntegrityError
from engram.remote import connect
from engram.service._families import FAMILIES
from engram.service._traffic import REASONS

GIB = 1 << 30


def _reading(**figures):
    """Of table `t`: names without prefix, then the value of the label that is not the table."""
    samples = {("engram_table_info", (("fingerprint", "f"), ("table", "t"))): 1.0}
    for name, value in figures.items():
        metric, _, label = name.partition("__")
        family = next((f for f in FAMILIES if f"engram_{metric}".startswith(f.name)), None)
        labels = {"table": "t"} if family and "table" in family.labels else {}
        if label:
            free = [each for each, values in family.labels.items() if label in values]
            labels[free[0]] = label
        if "tier" in (family.labels if family else {}):
            labels.setdefault("tier", "ram")
        full = metric if metric.startswith("process_") else f"engram_{metric}"
        samples[full, tuple(sorted(labels.items()))] = float(value)
    return Reading(0.0, samples)


def _facts(figures=None, **others):
    return Facts(reading=_reading(**(figures or {})), **others)


HELD = {"tier_capacity_bytes__ram": 100 * GIB, "tier_used_bytes__ram": 98 * GIB}
FULL = {
    **HELD,
    "ngrams_served_total__ram": 80_000,
    "ngrams_served_total__ssd": 20_000,
    "evictions_total": 700,
}
PREFETCHED = {f"prefetch_ngrams_total__{name}": 10_000 for name in ("useful", "late", "wasted")}
ARENA = {"shm_segment_bytes__slab": 4 * GIB}
READS = {"ssd_read_duration_seconds_count": 2000, "ssd_read_duration_seconds_sum": 50}


def _on(kind, rotates=False, cached=None):
    return (TableFacts(Path("/srv/t"), kind, rotates, 10 * GIB, cached),)


# By check: facts of something wrong, words of what is said, and facts that are much like it.
CASES = {
    "damage": (
        _facts({"integrity_errors_total__damaged": 3}),
        ("3 rows of t", "engram verify"),
        _facts({"integrity_errors_total__damaged": 0}),
    ),
    "failed_rows": (
        _facts({"rows_failed_total__deadline": 48}),
        ("48 rows of t", "deadline", "--ram"),
        _facts({"rows_failed_total__check": 48}),
    ),
    "rejected": (
        _facts({"requests_rejected_total__overloaded": 9}),
        ("9 requests", "limits.streams"),
        _facts({"requests_rejected_total__overloaded": 0}),
    ),
    "leases_at_limit": (
        _facts({"leases": 64, "leases_max": 64}),
        ("64", "limits.leases"),
        _facts({"leases": 63, "leases_max": 64}),
    ),
    "ram_too_small": (
        _facts(FULL),
        ("98GiB of 100GiB", "700", "20%", "100,000", "--ram"),
        _facts(FULL | {"tier_used_bytes__ram": 50 * GIB}),
        _facts(FULL | {"evictions_total": 0}),
        _facts(FULL | {"ngrams_served_total__ssd": 5_000}),
        _facts(FULL | {"ngrams_served_total__ram": 80, "ngrams_served_total__ssd": 20}),
    ),
    "prefetches": (
        _facts(PREFETCHED),
        ("33% of 30,000", "before they were read", "evicted unused"),
        _facts(PREFETCHED | {"prefetch_ngrams_total__useful": 200_000}),
        _facts({"prefetch_ngrams_total__late": 100}),
    ),
    "no_room": (
        _facts({"promotions_total__kept": 6_000, "promotions_total__refused": 4_000}),
        ("40% of 10,000", "--ram"),
        _facts({"promotions_total__kept": 9_000, "promotions_total__refused": 1_000}),
        _facts({"promotions_total__kept": 0, "promotions_total__refused": 10_000}),
    ),
    "held_memory": (
        _facts({"tier_pinned_bytes__ram": GIB, "oldest_epoch_age_seconds": 60}),
        ("60 s", "1GiB"),
        _facts({"tier_pinned_bytes__ram": GIB, "oldest_epoch_age_seconds": 1}),
    ),
    "memory_limit": (
        _facts(HELD, allowed_bytes=100 * GIB + (100 << 20)),
        ("100.1GiB", "100GiB", "cgroup", "--ram"),
        _facts(HELD, allowed_bytes=101 * GIB),
        _facts(HELD),
    ),
    "swap": (
        _facts(swap_used_bytes=GIB),
        ("1GiB of swap", "swapoff"),
        _facts(swap_used_bytes=1 << 20),
    ),
    "cached_twice": (
        _facts(HELD, tables=_on("ext4", cached=60 * GIB), memory_bytes=200 * GIB, free_bytes=GIB),
        ("60GiB", "98GiB", "1GiB are free"),
        _facts(HELD, tables=_on("ext4", cached=GIB), memory_bytes=200 * GIB, free_bytes=GIB),
        _facts(HELD, tables=_on("ext4", cached=60 * GIB), memory_bytes=200, free_bytes=100),
    ),
    "slow_files": (
        _facts(tables=_on("nfs4")),
        ("/srv/t", "nfs4", "local SSD"),
        _facts(tables=_on("ext4")),
        _facts(tables=_on("xfs", rotates=None)),
    ),
    "slow_reads": (
        _facts(READS),
        ("25.0 ms", "2,000", "SSD"),
        _facts(READS | {"ssd_read_duration_seconds_sum": 1}),
        _facts(READS | {"ssd_read_duration_seconds_count": 2}),
    ),
    "small_pages": (
        _facts(ARENA, huge_pages="never"),
        ("4GiB", "never", "advise"),
        _facts(ARENA, huge_pages="advise"),
        _facts({"shm_segment_bytes__slab": 1 << 20}, huge_pages="never"),
    ),
    "numa": (
        _facts(numa_nodes=2, arena_policy="default"),
        ("2 NUMA nodes", "numactl"),
        _facts(numa_nodes=2, arena_policy="interleave:0-1"),
        _facts(numa_nodes=1, arena_policy="default"),
    ),
    "open_files": (
        _facts({"process_open_fds": 900, "process_max_fds": 1024}),
        ("900", "1,024", "LimitNOFILE="),
        _facts({"process_open_fds": 90, "process_max_fds": 1024}),
    ),
    "locked_memory": (
        _facts(ARENA, memlock_bytes=8 << 20, gpus=True),
        ("8MiB", "4GiB", "LimitMEMLOCK="),
        _facts(ARENA, memlock_bytes=8 << 20),
        _facts(ARENA, gpus=True),
    ),
}


def test_every_check_has_a_case():
    assert [check.__name__ for check in CHECKS] == sorted(
        CASES, key=[check.__name__ for check in CHECKS].index
    )
    assert set(REJECTED) == set(REASONS)


@pytest.mark.parametrize("check", CASES)
def test_a_check_finds_what_is_wrong_and_nothing_else(check):
    wrong, words, *right = CASES[check]
    found = findings(wrong)
    assert {each.check for each in found} == {check}
    said = "\n".join(each.says for each in found)
    assert all(word in said for word in words), said
    assert all(each.figures for each in found)
    assert [findings(facts) for facts in right] == [[]] * len(right)


def test_other_slow_places():
    assert "fuse.x" in findings(_facts(tables=_on("fuse.x")))[0].says
    assert "rotates" in findings(_facts(tables=_on("ext4", rotates=True)))[0].says
    used = {**ARENA, "gpu_ngrams_total__staging": 5}
    assert findings(_facts(used, memlock_bytes=1))[0].check == "locked_memory"


def test_nothing_known_is_nothing_wrong():
    assert findings(Facts()) == []
    assert findings(_facts()) == []


def test_huge_pages_as_the_kernel_says_it(tmp_path):
    place = tmp_path / "kernel/mm/transparent_hugepage"
    assert huge_pages(tmp_path) == ""
    place.mkdir(parents=True)
    (place / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
    assert huge_pages(tmp_path) == "never"


def test_what_is_in_the_page_cache(tmp_path, v41_table):
    file = tmp_path / "f"
    file.write_bytes(bytes(20 * 4096))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert cached_bytes(file) < 20 * 4096
        opened.read()
    assert cached_bytes(file) == 20 * 4096
    facts = table_facts(v41_table)
    assert facts.file_bytes == (v41_table / "data.mdb").stat().st_size
    assert facts.file_system


# Whatever else this machine suffers from, these are of the sidecar alone.
ITS_OWN = {"leases_at_limit", "rejected", "damage", "failed_rows", "ram_too_small"}


def _diagnosis(*arguments):
    done = engram("doctor", *arguments, "--json")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert done.returncode == (1 if said["findings"] else 0)
    return {each["check"]: each for each in said["findings"]}, said["unseen"]


def test_a_sidecar_without_and_with_troubles(tmp_path, v41_table):
    with Sidecar(tmp_path / "s.sock", {"v": v41_table}, http="127.0.0.1:0", leases=1) as running:
        found, unseen = _diagnosis(running.http)
        assert (found.keys() & ITS_OWN, unseen) == (set(), [])
        port = int(running.http.rpartition(":")[2])
        life = samples_at(running.http)[key("process_start_time_seconds")]
        assert process_at(port, life) == running.process.pid
        assert process_at(port, 0.0) is None, "of another life"
        assert tables_of(running.process.pid) == [v41_table]
        with connect(running.address, "v"):
            found, _ = _diagnosis(running.http)
            assert found.keys() & ITS_OWN == {"leases_at_limit"}
            assert found["leases_at_limit"]["figures"] == {"leases": 1, "leases_max": 1}
            shown = engram("doctor", running.http)
            assert shown.returncode == 1
            assert "raise limits.leases" in shown.stdout
        until(lambda: not _diagnosis(running.http)[0].keys() & ITS_OWN)


def test_damage_is_told(tmp_path, qwen_table):
    shutil.copytree(qwen_table, tmp_path / "t")
    with (tmp_path / "t" / "data.mdb").open("r+b") as file:
        file.seek(40 * 4096 + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    served = Sidecar(tmp_path / "s.sock", {"t": tmp_path / "t"}, http="127.0.0.1:0")
    with served as running, connect(running.address) as table:
        for layer in table.spec.layers:
            with suppress(RowIntegrityError):
                table.lookup_rows(layer.layer, np.arange(layer.rows))
        found, _ = _diagnosis(running.http)
        assert found["damage"]["figures"]["rows"] == 1
        assert "import it again" in found["damage"]["says"]


def test_a_table_alone(tmp_path, v41_table):
    done = engram("doctor", "--path", v41_table)
    assert done.stderr == ""
    assert done.returncode in (0, 1), "this machine may swap, or have a slow disk"
    assert "sidecar's" not in done.stdout
    empty = engram("doctor", "--path", tmp_path)
    assert (empty.returncode, empty.stderr.count("\n")) == (1, 1)


def test_of_another_host_only_the_figures_are_looked_at(v41_table):
    facts = facts_of(_reading(leases=1, leases_max=1), "far.example:9471", v41_table)
    assert next(each.check for each in findings(facts)) == "leases_at_limit"
    assert "far.example:9471" in facts.unseen[0]
    assert [table.path for table in facts.tables] == [v41_table]


def test_nobody_to_look_at():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        done = engram("doctor", f"127.0.0.1:{silent.getsockname()[1]}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert engram("doctor", "nowhere").returncode == 2
