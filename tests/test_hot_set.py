"""Restart without forgetting: lists of the n-grams in memory, written and read back."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from conftest import build_synthetic, small_qwen
from devices import random_ids
from test_cli import engram as command

import engram
from engram._ngrams import distinct_ngrams
from engram.demo.sidecar import sidecar
from engram.errors import ConfigError, UnavailableError
from engram.ram.keys import keys_of
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat
from engram.service.config import HotSetConfig, load_config
from engram.service.hot_set import SUFFIX, HotSets, ngrams_of, prefetch_slowly, trace_of
from engram.sizing.trace import read_trace, write_trace
from engram.ssd import SsdTier
from engram.tiers import Prefetch, Selection


def as_set(ngrams):
    return {
        tuple(window[:order])
        for window, order in zip(ngrams.windows.tolist(), ngrams.orders.tolist(), strict=True)
    }


def asked_of(table, ids):
    windows = table.spec.windows(ids).reshape(-1, table.spec.max_order)
    return distinct_ngrams(windows, table.spec.min_order, Selection.of(table.spec))[0]


@pytest.fixture
def two_tiers(v41_table, tmp_path):
    """Two tables of bundles of one size, so that they share slots."""
    tables = {"a": SsdTier(v41_table), "b": SsdTier(v41_table)}
    tiers = ram_tiers(tables, 8 << 20, shared=False)
    yield tiers
    for tier in tiers.values():
        tier.close()


def test_keys_are_what_is_there(two_tiers):
    tables = {name: engram.Table(tier) for name, tier in two_tiers.items()}
    wanted = {}
    for seed, (name, table) in enumerate(tables.items()):
        ids = random_ids(table, 200, seed)
        table.lookup(ids)
        wanted[name] = asked_of(table, ids)
    for name, tier in two_tiers.items():
        slots = tier.cache.layout.slots
        keys = keys_of(tier.cache, tier.number, slots)
        assert len(keys) == len(wanted[name])
        assert as_set(keys) == as_set(wanted[name])
        assert (keys.windows[np.arange(4) >= keys.orders[:, None]] == -1).all()
        few = keys_of(tier.cache, tier.number, 10)
        assert len(few) == 10
        assert as_set(few) <= as_set(keys)
        tier.check_integrity()


def test_those_that_came_again_come_first(v41_table):
    with engram.open(v41_table, ram="1MiB") as table:
        hot = random_ids(table, 40, 1)
        for seed in range(2, 40):
            table.lookup(hot)
            table.lookup(random_ids(table, 40, seed))
        tier = table._tier
        assert tier.cache.stats()["evicted"] > 0
        keys = keys_of(tier.cache, 0, tier.cache.layout.slots)
        first = keys.take(slice(0, len(keys) // 4))
        share = len(as_set(first) & as_set(asked_of(table, hot))) / len(first)
        everywhere = len(as_set(keys) & as_set(asked_of(table, hot))) / len(keys)
        assert share > everywhere


def test_written_and_read_back(v41_table, tmp_path):
    with engram.open(v41_table, ram="4MiB") as table:
        table.lookup(random_ids(table, 100, 1))
        keys = keys_of(table._tier.cache, 0, 10_000)
        for _ in range(2):
            write_trace(tmp_path / "t", trace_of(table._tier, keys), replace=True)
        back = ngrams_of(read_trace(tmp_path / "t"))
    assert np.array_equal(back.windows, keys.windows)
    assert np.array_equal(back.orders, keys.orders)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o600


def misses_of(target, ids):
    with engram.connect(target) as table:
        table.lookup(ids)
        return sum(tier.get("misses", 0) for tier in table.stats()["tiers"])


def warmed(target, ids):
    """Whether lookups find all of it, some time."""
    with engram.connect(target) as table:
        for _ in range(200):
            slots = table._tier.probe(table.spec.windows(ids).reshape(-1, 4))
            misses = table.stats()["tiers"][0]["misses"]
            if (slots >= 0).all():
                table.lookup(ids)
                return table.stats()["tiers"][0]["misses"] == misses
            time.sleep(0.1)
    return False


def test_a_sidecar_begins_with_what_it_had(v41_table, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_HOTSET_DIRECTORY", str(tmp_path))
    tables, path = {"v41": v41_table}, tmp_path / "s.sock"
    ids = np.random.default_rng(5).integers(0, 600, 300).astype(np.int32)
    with sidecar(path, tables, "8MiB") as target:
        assert misses_of(target, ids) > 0
    assert len(ngrams_of(read_trace(tmp_path / f"v41{SUFFIX}"))) > 0
    with sidecar(path, tables, "8MiB") as target:
        assert warmed(target, ids)
    # Cut short, or of another table: it begins with nothing, and says so.
    file = tmp_path / f"v41{SUFFIX}"
    file.write_bytes(file.read_bytes()[:-7])
    with sidecar(path, tables, "8MiB") as target:
        assert misses_of(target, ids) > 0
    assert "begins with an empty memory" in path.with_suffix(".log").read_text()


def test_killed_it_leaves_its_last_list(v41_table, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_HOTSET_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("ENGRAM_HOTSET_EVERY_SECONDS", "1")
    tables, path = {"v41": v41_table}, tmp_path / "s.sock"
    ids = np.random.default_rng(6).integers(0, 600, 200).astype(np.int32)
    file = tmp_path / f"v41{SUFFIX}"

    def killed():
        with sidecar(path, tables, "8MiB") as target, engram.connect(target) as table:
            table.lookup(ids)
            wanted = as_set(asked_of(table, ids))
            while not file.exists() or not wanted <= as_set(ngrams_of(read_trace(file))):
                time.sleep(0.05)
            with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as children:
                for child in map(int, children.read().split()):
                    with open(f"/proc/{child}/cmdline") as line:
                        if str(path) in line.read():
                            os.kill(child, signal.SIGKILL)

    with pytest.raises(UnavailableError, match="-9"):
        killed()
    with sidecar(path, tables, "8MiB") as target:
        assert warmed(target, ids)


def test_no_directory_is_said_before_anything_is_served(v41_table, tmp_path):
    with engram.open(v41_table, ram="1MiB") as table:
        with pytest.raises(ConfigError, match=r"hotset\.directory: .* is no directory"):
            HotSets({"v41": table._tier}, HotSetConfig(directory=tmp_path / "none"))
        never = HotSets({"v41": table._tier}, HotSetConfig(directory=tmp_path))
        never.stop()
        assert not list(tmp_path.iterdir())


def test_the_configuration_shows_it(tmp_path):
    told = {"ENGRAM_HOTSET_DIRECTORY": str(tmp_path), "ENGRAM_HOTSET_EVERY_SECONDS": "7"}
    arguments = ("config", "show", "--table", "a=/srv/a", "--listen", "unix:/run/s.sock")
    shown = command(*arguments, env=told)
    assert shown.returncode == 0, shown.stderr
    (tmp_path / "c.toml").write_text(shown.stdout)
    loaded = load_config(tmp_path / "c.toml", environment={}).hotset
    assert loaded == HotSetConfig(directory=tmp_path, every_seconds=7)


def test_no_faster_than_it_may(v41_table):
    asked, waits = [], []

    class Tier:
        def prefetch(self, ngrams):
            asked.append(len(ngrams))
            return Prefetch()

    def wait(seconds):
        waits.append(seconds)
        return len(waits) == 3

    with engram.open(v41_table, ram="1MiB") as table:
        ngrams = asked_of(table, random_ids(table, 6000, 1))
    done = prefetch_slowly(Tier(), ngrams, 1000.0, wait)
    assert done == sum(asked) < len(ngrams)
    assert waits == [count / 1000.0 for count in asked]


def test_the_command_warms_a_sidecar(v41_table, tmp_path):
    ids = np.random.default_rng(7).integers(0, 600, 300).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    trace = tmp_path / "t.trace"
    recorded = command(
        *("trace", "record", trace, "--table", v41_table, "--tokens", tmp_path / "ids.npy"),
        env=None,
    )
    assert recorded.returncode == 0, recorded.stderr
    with sidecar(tmp_path / "s.sock", {"v41": v41_table}, "8MiB") as target:
        done = command("warm", target, trace, "--json", env=None)
        assert done.returncode == 0, done.stderr
        assert '"ngrams"' in done.stdout
        assert warmed(target, ids)
    other = build_synthetic(tmp_path / "other", small_qwen(), RowFormat("bf16", 32))
    with sidecar(tmp_path / "s.sock", {"other": other}, "8MiB") as target:
        refused = command("warm", target, trace, env=None)
    assert refused.returncode == 1
    assert "fingerprint" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
