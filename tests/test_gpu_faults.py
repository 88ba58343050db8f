"""The GPU tier when things go wrong: never a wrong vector, and none that was ever in doubt."""

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_synthetic, small_qwen
from devices import DEVICES, all_layers, expected, random_ids, same

import engram
from engram.demo.sidecar import sidecar
from engram.errors import ConfigError, RowIntegrityError, StoreError, UnavailableError
from engram.nn import EngramLookup
from engram.rows import RowFormat


@pytest.mark.parametrize("device", DEVICES)
def test_an_arena_that_others_churn(v41_table, device, tmp_path):
    """Slots are reused all the time, and none while a step that was queued still reads it."""
    with (
        sidecar(tmp_path / "s.sock", {"v41": v41_table}, "300KiB") as target,
        engram.connect(target) as table,
        engram.connect(target) as other,
        engram.open(v41_table, ram="8MiB") as truth,
    ):
        lookup = EngramLookup(table, torch.float32, device=device, hbm="100KiB")
        ending = threading.Event()

        def churn():
            seed = 1000
            while not ending.is_set():
                seed += 1
                other.lookup(random_ids(other, 40, seed))

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for turn in range(100):
                ids = random_ids(table, 40, turn % 7)
                found = all_layers(lookup(torch.from_numpy(ids)))
                assert same(found, expected(truth, ids, torch.float32))
        finally:
            ending.set()
            thread.join()
        (tier,) = table.on_devices
        counted = tier.stats()
        assert counted["ngrams_staged"] > 0
        assert counted["ngrams_on_device"] > 0
        tier.check_integrity()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sidecar_that_dies_and_comes_back(v41_table, device, tmp_path):
    """Steps go on, from the dead one's arena and its file, and then from the new one's arena."""
    path = tmp_path / "s.sock"
    with engram.open(v41_table, ram="8MiB") as truth:

        def check(table, lookup, seed):
            ids = random_ids(table, 30, seed)
            assert same(
                all_layers(lookup(torch.from_numpy(ids))), expected(truth, ids, lookup.dtype)
            )

        with ExitStack() as connected:
            with sidecar(path, {"v41": v41_table}, "4MiB") as target:
                table = connected.enter_context(engram.connect(target))
                lookup = EngramLookup(table, torch.float32, device=device, hbm="64KiB")
                check(table, lookup, 1)
                first = table.on_devices[0]._in_place
            for seed in range(3):
                check(table, lookup, seed)
            with sidecar(path, {"v41": v41_table}, "4MiB"):
                for seed in range(200):
                    check(table, lookup, seed % 5)
                    if table.on_devices[0]._in_place is not first:
                        break
                    time.sleep(0.05)
                assert table.on_devices[0]._in_place is not first


@pytest.mark.parametrize("device", DEVICES)
def test_a_launch_that_fails_leaves_no_promise(v41_table, device, monkeypatch):
    """The directory must not speak of rows that were never put on the device."""
    with engram.open(v41_table, ram="8MiB") as table:
        lookup = EngramLookup(table, torch.float32, device=device, hbm="1MiB")
        ids = random_ids(table, 40, 1)
        lookup(torch.from_numpy(ids[:1]))
        (tier,) = table.on_devices
        gather = tier._gather
        for turn in range(3):
            with monkeypatch.context() as broken:
                broken.setattr(tier, "_gather", no_room)
                with pytest.raises(RuntimeError, match="out of memory"):
                    lookup(torch.from_numpy(ids[: 20 * (1 + turn % 2)]))
            assert tier._gather is gather
            found = all_layers(lookup(torch.from_numpy(ids)))
            assert same(found, expected(table, ids, torch.float32))
        assert tier.stats()["slots_used"] > 0
        tier.check_integrity()


def no_room(*args, **keywords):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_read_without_protection_is_never_handed_out(v41_table, device, monkeypatch):
    """Neither by the step that read it, nor later from the device, where it was kept."""
    lost = []

    def require_protection():
        if lost:
            raise UnavailableError("the lease ended")

    with engram.open(v41_table, ram="8MiB") as table:
        arena = replace(table._tier.in_place(), require_protection=require_protection)
        monkeypatch.setattr(table._tier, "in_place", lambda: arena)
        lookup = EngramLookup(table, torch.float32, device=device, hbm="1MiB")
        ids = random_ids(table, 40, 1)
        tokens = torch.from_numpy(ids)
        lookup(tokens[:1])
        (tier,) = table.on_devices
        gather = tier._gather

        def torn(*args, **keywords):
            gather(*args, **keywords)
            if device == "cuda":
                torch.cuda.synchronize()
            tier._hbm.memory.random_()
            lost.append(True)

        with monkeypatch.context() as changed:
            changed.setattr(tier, "_gather", torn)
            guilty = lookup.prepare(tokens)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                guilty.wait()
            with pytest.raises(UnavailableError):
                guilty[table.layers[0]]
        lost.clear()
        for _ in range(2):
            assert same(all_layers(lookup(tokens)), expected(table, ids, torch.float32))
        with pytest.raises(UnavailableError):
            guilty.wait()
        tier.check_integrity()


def test_a_forked_child_is_told_to_open_its_own(v41_table):
    with engram.open(v41_table, ram="1MiB") as table:
        lookup = EngramLookup(table, device="cpu", hbm="1MiB")
        tokens = torch.zeros(3, dtype=torch.int64)
        lookup(tokens)
        table.on_devices[0]._lock.acquire()  # as a thread would that the child lacks
        child = os.fork()
        if not child:
            try:
                lookup(tokens)
            except StoreError as error:
                table.close()
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        table.on_devices[0]._lock.release()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        lookup(tokens)


def test_rows_that_fail_are_named_and_never_kept(tmp_path):
    path = build_synthetic(tmp_path / "t", small_qwen(), RowFormat("bf16", small_qwen().dim))
    damage(path)
    with engram.open(path, ram="8MiB") as table:
        lookup = EngramLookup(table, torch.bfloat16, device="cpu", hbm="8MiB")
        failed = 0
        for seed in range(12):
            ids = random_ids(table, 8, seed)
            try:
                wanted = expected(table, ids, torch.bfloat16)
            except RowIntegrityError:
                failed += 1
                with pytest.raises(RowIntegrityError):
                    lookup(torch.from_numpy(ids))
            else:
                assert same(all_layers(lookup(torch.from_numpy(ids))), wanted)
        assert 0 < failed < 12


def damage(path):
    """Flip bytes here and there in the rows of a table."""
    file = path / "data.mdb"
    content = bytearray(file.read_bytes())
    for at in np.random.default_rng(1).integers(len(content) // 8, len(content), 40):
        content[at] ^= 0xFF
    file.write_bytes(content)


def test_device_memory_for_less_than_one_n_gram(v41_table):
    with engram.open(v41_table, ram="1MiB") as table:
        lookup = EngramLookup(table, device="cpu", hbm=64)
        with pytest.raises(ConfigError, match="less than one n-gram"):
            lookup(torch.zeros(1, dtype=torch.int64))
