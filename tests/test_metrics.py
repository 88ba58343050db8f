"""Metrics: there from the start, valid, and exact whatever clients do and however they die."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
from attaching import stats_of, until
from prometheus_client.parser import text_string_to_metric_families
from scraping import ask, families_at, key, samples_at
from sidecars import Sidecar, environment, remote_table
from test_tidy import ROOT

import engram
from engram.errors import RowIntegrityError, UnknownTableError
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramStub
from engram.service._families import FAMILIES

TABLES = ("v41", "qwen")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, v41_table, qwen_table):
    """A sidecar that nobody has asked for anything."""
    tables = {"v41": v41_table, "qwen": qwen_table}
    place = tmp_path_factory.mktemp("run") / "s.sock"
    with Sidecar(place, tables, http="127.0.0.1:0") as running:
        yield running


@pytest.fixture
def sidecar(tmp_path, v41_table, qwen_table):
    tables = {"v41": v41_table, "qwen": qwen_table}
    with Sidecar(tmp_path / "s.sock", tables, http="127.0.0.1:0", ram="1MiB") as running:
        yield running


def _sample_names(family):
    if family.kind == "histogram":
        return [f"{family.name}_count", f"{family.name}_sum"]
    return [family.name]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_everything_is_there_before_any_traffic(fresh, family):
    found = samples_at(fresh.http)
    fixed = {name: values for name, values in family.labels.items() if values}
    free = [name for name in family.labels if name not in fixed]
    for values in itertools.product(TABLES if "table" in free else (None,), *fixed.values()):
        labels = dict(zip(fixed, values[1:], strict=True))
        if "table" in free:
            labels["table"] = values[0]
        for name in _sample_names(family):
            mine = [
                value
                for (other, pairs), value in found.items()
                if other == name and labels.items() <= dict(pairs).items()
            ]
            assert len(mine) == 1, (name, labels)
            if family.kind in ("counter", "histogram"):
                assert mine == [0], (name, labels)
            assert mine[0] >= 0


def test_gauges_of_a_fresh_sidecar(fresh, v41_table):
    found = samples_at(fresh.http)
    assert found[key("engram_tier_capacity_bytes", tier="ram")] > 3 << 20
    size = (v41_table / "data.mdb").stat().st_size
    assert found[key("engram_tier_used_bytes", table="v41", tier="ssd")] == size
    assert found[key("engram_store_free_bytes", table="qwen")] > 0
    assert found[key("engram_table_state", table="v41", state="serving")] == 1
    assert found[key("engram_shm_segment_bytes", purpose="manifest")] > 0
    assert found[key("engram_clients")] == found[key("engram_leases")] == 0
    assert found[key("process_open_fds")] > 0


def test_names_units_and_kinds_follow_the_rules(fresh):
    for name, family in families_at(fresh.http).items():
        assert name.startswith(("engram_", "process_")), name
        assert family.documentation, name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), name
    kinds = {
        family.name.removesuffix("_total").removesuffix("_info"): family.kind for family in FAMILIES
    }
    found = {n: f.type for n, f in families_at(fresh.http).items() if n.startswith("engram_")}
    assert found == kinds


def test_the_older_text_format_for_those_who_ask_for_nothing(fresh):
    status, body, kind = ask(fresh.http, "/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    names = {family.name for family in text_string_to_metric_families(body)}
    assert "engram_ngrams_served" in names


def test_the_documentation_lists_every_metric():
    text = (ROOT / "docs" / "operations.md").read_text()
    listed = [line for line in text.splitlines() if line.startswith("| `engram_")]
    expected = []
    for family in FAMILIES:
        labels = ", ".join(
            f"{name} ({', '.join(values)})" if values else name
            for name, values in family.labels.items()
        )
        expected.append(f"| `{family.name}` | {family.kind} | {labels} | {family.meaning} |")
    assert listed == expected


_CLIENT = """
import json, os, signal, sys, numpy as np, engram
address, name, seed, end = sys.argv[1:]
rng = np.random.default_rng(int(seed))
asked = 0
with engram.connect(address, name) as table:
    for _ in range(int(rng.integers(5, 40))):
        tokens = rng.integers(0, 400, int(rng.integers(1, 300)))
        table.lookup(tokens)
        asked += len(tokens) * table.spec.num_orders
    stats = table.stats()["tiers"][0]
    told = {"table": name, "asked": asked, "hits": stats["hits"], "misses": stats["misses"]}
    print(json.dumps(told), flush=True)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "stays":
        sys.stdin.read()
"""


def _clients(address, ends, seed):
    return [
        subprocess.Popen(
            [sys.executable, "-c", _CLIENT, address, TABLES[n % 2], str(seed + n), end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for n, end in enumerate(ends)
    ]


def _served(found, name):
    return {
        tier: found[key("engram_ngrams_served_total", table=name, tier=tier)]
        for tier in ("gpu", "ram", "ssd")
    }


def test_hits_of_clients_are_counted_exactly_whoever_dies(sidecar):
    seen, over = [], threading.Event()

    def scrape():
        while not over.wait(0.02):
            found = samples_at(sidecar.http)
            seen.append([found[k] for k in sorted(found) if k[0] == "engram_ngrams_served_total"])

    watcher = threading.Thread(target=scrape)
    watcher.start()
    told, living = [], []
    for seed in (0, 100):
        ends = ("killed", "stays", "killed", "leaves", "stays", "killed")
        clients = _clients(sidecar.address, ends, seed)
        told += [json.loads(client.stdout.readline()) for client in clients]
        for end, client in zip(ends, clients, strict=True):
            if end != "stays":
                status = client.wait(30)
                assert status == (-signal.SIGKILL if end == "killed" else 0)
        living += [client for client in clients if client.poll() is None]
    until(lambda: samples_at(sidecar.http)[key("engram_leases")] == len(living) == 4)
    over.set()
    watcher.join()
    for gone in (False, True):
        found = samples_at(sidecar.http)
        for name in TABLES:
            mine = [each for each in told if each["table"] == name]
            hits, misses = (sum(each[what] for each in mine) for what in ("hits", "misses"))
            assert _served(found, name) == {"gpu": 0, "ram": hits, "ssd": misses}
            assert hits + misses == sum(each["asked"] for each in mine)
            raw, unique = (
                found[key("engram_ngrams_requested_total", table=name, stage=stage)]
                for stage in ("raw", "unique")
            )
            assert raw == misses > unique
            assert unique == found[key("engram_request_ngrams_sum", table=name, method="fetch")]
        if not gone:
            for client in living:
                client.kill()
                client.wait()
            until(lambda: samples_at(sidecar.http)[key("engram_leases")] == 0)
    assert found[key("engram_lease_ends_total", reason="closed")] == 12
    columns = list(zip(*seen, strict=True))
    assert all(list(column) == sorted(column) for column in columns), "a counter fell"
    assert len(seen) > 3


def test_what_the_tiers_do_is_counted_by_table(sidecar):
    tokens = np.arange(300)
    with engram.connect(sidecar.address, "qwen") as table:
        table.lookup(tokens)
        table.lookup(tokens)
        stats = stats_of(table)
        found = samples_at(sidecar.http)
        assert _served(found, "qwen") == {"gpu": 0, "ram": stats["hits"], "ssd": stats["misses"]}
        assert found[key("engram_leases")] == found[key("engram_clients")] == 1
        assert found[key("engram_shm_segment_bytes", purpose="staging")] > 0
    kept = found[key("engram_promotions_total", table="qwen", to="ram", result="kept")]
    evicted = sum(
        found[key("engram_evictions_total", table="qwen", tier="ram", reason=reason)]
        for reason in ("unused", "once", "cold")
    )
    used = found[key("engram_tier_used_bytes", table="qwen", tier="ram")]
    assert kept > evicted
    assert used > 0
    rows = found[key("engram_ssd_read_bytes_total", table="qwen")]
    reads = found[key("engram_ssd_read_duration_seconds_count", table="qwen")]
    assert rows > 0
    assert reads > 0
    for name in ("engram_promotions_total", "engram_ssd_read_bytes_total"):
        others = [v for (n, pairs), v in found.items() if n == name and ("table", "v41") in pairs]
        assert others
        assert not any(others)


def test_lookups_over_tcp_and_prefetches_are_counted(sidecar):
    tokens = np.arange(20)
    with remote_table(sidecar.address, "qwen") as table:
        table.prefetch(tokens)
        kept = key("engram_promotions_total", table="qwen", to="ram", result="kept")
        until(lambda: samples_at(sidecar.http)[kept] == 40)
        table.lookup(tokens)
        table.prefetch(tokens)
        hit = key("engram_prefetch_ngrams_total", table="qwen", result="hit")
        until(lambda: samples_at(sidecar.http)[hit] == 40)
    found = samples_at(sidecar.http)
    assert _served(found, "qwen") == {"gpu": 0, "ram": 40, "ssd": 0}
    result = {
        name: found[key("engram_prefetch_ngrams_total", table="qwen", result=name)]
        for name in ("hit", "useful", "late", "wasted")
    }
    assert result == {"hit": 40, "useful": 40, "late": 0, "wasted": 0}
    assert found[key("engram_request_ngrams_count", table="qwen", method="prefetch")] == 2
    assert found[key("engram_request_ngrams_sum", table="qwen", method="lookup")] == 40


def test_damaged_rows_are_counted_by_kind(tmp_path, qwen_table):
    shutil.copytree(qwen_table, tmp_path / "t")
    with (tmp_path / "t" / "data.mdb").open("r+b") as file:
        file.seek(40 * 4096 + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with Sidecar(tmp_path / "s", {"t": tmp_path / "t"}, http="127.0.0.1:0") as running:
        failed = 0
        with engram.connect(running.address) as table:
            for layer in table.spec.layers:
                for _ in range(2):
                    try:
                        table.lookup_rows(layer.layer, np.arange(layer.rows))
                    except RowIntegrityError as error:
                        failed += sum(map(len, error.failures.values()))
        found = samples_at(running.http)
    assert failed == 2
    assert found[key("engram_rows_failed_total", table="t", reason="check")] == 2
    assert found[key("engram_integrity_errors_total", table="t", kind="damaged")] == 2


def test_rejections_are_counted_by_reason(sidecar):
    def count(reason):
        return samples_at(sidecar.http)[key("engram_requests_rejected_total", reason=reason)]

    with pytest.raises(UnknownTableError):
        engram.connect(sidecar.address, "other")
    assert count("unknown_table") == 1
    with grpc.insecure_channel(sidecar.address) as channel:
        for kind, method in ((pb.LookupRequest, "Lookup"), (pb.PrefetchRequest, "Prefetch")):
            fingerprint = EngramStub(channel).GetTable(pb.GetTableRequest(name="qwen")).fingerprint
            request = kind(table="qwen", fingerprint=fingerprint)
            (reply,) = getattr(EngramStub(channel), method)(iter([request]))
            assert reply.HasField("error")
        (reply,) = EngramStub(channel).Fetch(iter([pb.FetchRequest(token=b"none")]))
        assert reply.error.code == pb.ERROR_CODE_UNAVAILABLE
    assert (count("bad_request"), count("unavailable"), count("internal")) == (2, 1, 0)
    status = ask(sidecar.http, "/readyz")[0]
    assert status == 200
