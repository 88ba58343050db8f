"""Attached clients whose sidecar is killed, stopped, restarted or replaced, and who are forked."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

import numpy as np
import pytest
from attaching import SECONDS_MAX, TOKENS, same, stats_of, until
from conftest import build_synthetic, small_v41
from python_process import run_python
from sidecars import Sidecar

import engram
from engram.errors import (
    SpecMismatchError,
    UnavailableError,
)
from engram.ram import attached, attachment
from engram.remote import RemoteTier
from engram.rows import RowFormat


@pytest.fixture(scope="module")
def exact(v41_table):
    with engram.open(v41_table, ram=0) as table:
        yield table


@pytest.fixture(scope="module")
def other_table(tmp_path_factory):
    """Rows of the same spec, but another seed."""
    spec = small_v41()
    path = tmp_path_factory.mktemp("tables") / "other"
    return build_synthetic(path, spec, RowFormat("fp8-ue8m0", spec.dim), seed=5)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory, v41_table):
    """One that stays."""
    place = tmp_path_factory.mktemp("run") / "s.sock"
    with Sidecar(place, {"v41": v41_table}, listen=["tcp:127.0.0.1:0"]) as running:
        yield running


@pytest.fixture
def mortal(tmp_path, v41_table):
    """One to be killed; with it, how to connect."""
    with Sidecar(tmp_path / "s.sock", {"v41": v41_table}) as running:
        yield running


def test_direct_goes_on_without_the_sidecar_and_attaches_to_the_next(mortal, exact):
    with engram.connect(mortal.address) as table:
        assert same(table, exact)
        before = stats_of(table)
        mortal.kill()
        assert same(table, exact)
        assert stats_of(table)["read_directly"] == 0
        more = np.random.default_rng(1).integers(0, 600, 700)
        assert same(table, exact, more)
        assert same(table, exact, more, columns=[5, 20])
        ids = np.arange(50)
        found, wanted = (each.lookup_rows(exact.layers[1], ids) for each in (table, exact))
        assert np.array_equal(found.packed(), wanted.packed())
        stats = stats_of(table)
        assert stats["read_directly"] > 0
        assert stats["attached"] == 0
        assert stats["boot_id"] == before["boot_id"]
        mortal.start()
        until(lambda: stats_of(table)["attached"])
        after = stats_of(table)
        assert after["reattached"] == 1
        assert after["boot_id"] != before["boot_id"]
        assert after["lookups"] == stats["lookups"]
        fetches = after["fetches"]
        assert same(table, exact, more)
        assert stats_of(table)["fetches"] > fetches
        found = table.lookup_rows(exact.layers[1], ids)
        assert np.array_equal(found.packed(), wanted.packed())


def test_fail_raises_for_misses_and_serves_hits(mortal, exact):
    with engram.connect(mortal.address, on_unavailable="fail") as table:
        assert same(table, exact)
        mortal.kill()
        assert same(table, exact)
        for _ in range(2):
            with pytest.raises(UnavailableError) as caught:
                table.lookup(TOKENS + 100)
            assert "\n" not in str(caught.value)
        with pytest.raises(UnavailableError):
            table.lookup_rows(exact.layers[0], [1])
        mortal.start()
        until(lambda: stats_of(table)["attached"])
        assert same(table, exact, TOKENS + 100)


def test_wait_waits_for_the_next_sidecar(mortal, exact):
    with engram.connect(mortal.address, on_unavailable="wait", timeout_s=SECONDS_MAX) as table:
        assert same(table, exact)
        mortal.kill()
        right = []
        thread = threading.Thread(target=lambda: right.append(same(table, exact, TOKENS + 100)))
        thread.start()
        until(lambda: stats_of(table)["waits"])
        assert thread.is_alive()
        mortal.start()
        thread.join()
        assert right == [True]
        assert stats_of(table)["read_directly"] == 0


def test_wait_ends_with_the_time_limit(mortal):
    with engram.connect(mortal.address, on_unavailable="wait", timeout_s=0.4) as table:
        mortal.kill()
        for ask in (lambda: table.lookup(TOKENS), lambda: table.lookup_rows(table.layers[0], [1])):
            with pytest.raises(UnavailableError):
                ask()


def test_waiting_over_tcp(tmp_path, v41_table, exact):
    """A port that stays the same over restarts is chosen by the first."""
    with Sidecar(tmp_path / "s.sock", {"v41": v41_table}, listen=["tcp:127.0.0.1:0"]) as running:
        port = int(running.lines[-1].rpartition("tcp:127.0.0.1:")[2].partition(";")[0])
        running.told["listen"][1] = f"tcp:127.0.0.1:{port}"
        options = {"on_unavailable": "wait", "timeout_s": SECONDS_MAX}
        with engram.connect(f"127.0.0.1:{port}", **options) as table:
            assert same(table, exact)
            running.kill()
            right = []
            thread = threading.Thread(target=lambda: right.append(same(table, exact)))
            thread.start()
            running.start()
            thread.join()
            assert right == [True]


def test_another_table_under_the_name_is_never_read(mortal, exact, other_table, v41_table):
    with engram.connect(mortal.address) as table:
        assert same(table, exact)
        mortal.kill()
        mortal.told["tables"]["v41"] = other_table
        mortal.start()
        until(lambda: table._tier._attachments.other_table is not None)
        for tokens in (TOKENS, TOKENS + 100):
            with pytest.raises(SpecMismatchError, match="another table") as caught:
                table.lookup(tokens)
            assert caught.value.field == "fingerprint"
        with pytest.raises(SpecMismatchError):
            table.lookup_rows(table.layers[0], [1])
        mortal.kill()
        mortal.told["tables"]["v41"] = v41_table
        mortal.start()
        until(lambda: stats_of(table)["attached"])
        assert same(table, exact)


def test_a_stopped_sidecar_is_passed_by_and_used_again(mortal, exact):
    with engram.connect(mortal.address, timeout_s=0.5) as table:
        assert same(table, exact)
        mortal.process.send_signal(signal.SIGSTOP)
        try:
            for shift in (100, 200, 300):
                assert same(table, exact, TOKENS + shift)
            assert stats_of(table)["read_directly"] == 3
        finally:
            mortal.process.send_signal(signal.SIGCONT)
        until(lambda: not table._tier._attachments.now.stalled)
        assert same(table, exact, TOKENS + 400)
        stats = stats_of(table)
        assert stats["read_directly"] == 3
        assert stats["reattached"] == 0


def test_a_sidecar_that_stops_in_order_is_left_without_an_error(mortal, exact):
    tables = [engram.connect(mortal.address, on_unavailable=how) for how in ("direct", "wait")]
    counts, over = Counter(), threading.Event()

    def work(table):
        rng = np.random.default_rng(2)
        while not over.is_set():
            try:
                counts[same(table, exact, rng.integers(0, 600, 30))] += 1
            except Exception as error:
                counts[repr(error)] += 1

    threads = [threading.Thread(target=work, args=(table,)) for table in tables]
    for thread in threads:
        thread.start()
    for turn in range(2):
        enough = counts[True] + 10
        until(lambda enough=enough: counts[True] > enough)
        assert mortal.stop() == 0
        mortal.start()
        until(lambda turn=turn: all(stats_of(t)["reattached"] == turn + 1 for t in tables))
    over.set()
    for thread in threads:
        thread.join()
    assert set(counts) == {True}
    assert stats_of(tables[1])["read_directly"] == 0
    for table in tables:
        table.close()


def test_a_table_without_a_file_fails_when_its_sidecar_is_gone(tmp_path):
    with (
        Sidecar(tmp_path / "s.sock", {"model": {}}) as running,
        engram.connect(running.address) as table,
    ):
        running.kill()
        with pytest.raises(UnavailableError) as caught:
            table.lookup(TOKENS)
        assert "\n" not in str(caught.value)


FORK = """
import os, sys, threading
import engram
from engram.errors import UnavailableError

table = engram.connect(sys.argv[1])
expected = table.lookup([1, 2, 3]).packed().tobytes()
table.lookup_rows(table.layers[0], [1])
child = os.fork()
if not child:
    status = 0
    asks = (table.lookup, table.prefetch, lambda ids: table.lookup_rows(table.layers[0], ids))
    for ask in asks:
        try:
            ask([1, 2, 3])
            status = 1
        except UnavailableError as error:
            status |= 2 * ("only after forking" not in str(error))
    table.stats()
    table.close()
    del table
    os._exit(status)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert table.lookup([1, 2, 3]).packed().tobytes() == expected
table.lookup([70, 80, 90])
stats = table.stats()["tiers"][0]
assert stats["attached"] == 1 and stats["reattached"] == 0, stats
print("survived")
"""


def test_a_forked_child_is_refused_and_its_parent_keeps_the_lease(sidecar):
    assert run_python(FORK, sidecar.address) == "survived\n"


def test_kills_amid_lookups_never_give_wrong_rows_or_errors(mortal, exact):
    """With less room than is asked for, so that hits, misses and evictions all go on."""
    rng = np.random.default_rng(9)
    batches = [rng.integers(0, 600, 60) for _ in range(60)]
    wanted = [exact.lookup(batch).packed() for batch in batches]
    tables = [engram.connect(mortal.address) for _ in range(2)]
    files = len(os.listdir("/proc/self/fd"))
    counts, over = Counter(), threading.Event()

    def work(seed):
        turn = seed
        while not over.is_set():
            which = turn % len(batches)
            turn += 7
            try:
                right = np.array_equal(
                    tables[seed % 2].lookup(batches[which]).packed(), wanted[which]
                )
                counts["right" if right else "wrong"] += 1
            except Exception as error:
                counts[repr(error)] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(2):
        enough = counts["right"] + 30
        until(lambda enough=enough: counts["right"] > enough)
        mortal.kill()
        mortal.start()
        until(lambda turn=turn: all(stats_of(t)["reattached"] == turn + 1 for t in tables))
    over.set()
    for thread in threads:
        thread.join()
    assert set(counts) == {"right"}
    until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    for table in tables:
        table.close()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("no thread")])
def test_attaching_again_is_tried_until_it_succeeds(mortal, exact, monkeypatch, error):
    failed, real = [], attachment.Connection

    def fails(*arguments):
        if len(failed) < 3:
            failed.append(arguments)
            raise error
        return real(*arguments)

    with engram.connect(mortal.address) as table:
        monkeypatch.setattr(attachment, "Connection", fails)
        mortal.kill()
        mortal.start()
        until(lambda: stats_of(table)["attached"])
        assert len(failed) == 3
        assert same(table, exact)
        until(lambda: not table._tier._attachments._renewing)


FORK_AMID = """
import os, signal, sys, threading
import engram

table = engram.connect(sys.argv[1])
attachments = table._tier._attachments
holds, done = threading.Event(), threading.Event()

def hold():
    with attachments._changed, attachments._closing._cond:
        holds.set()
        done.wait()

threading.Thread(target=hold).start()
holds.wait()
child = os.fork()
if not child:
    signal.alarm(10)
    table.close()
    os._exit(0)
done.set()
_, status = os.waitpid(child, 0)
assert status == 0, status
print("closed")
"""


def test_a_forked_child_closes_without_locks(sidecar):
    assert run_python(FORK_AMID, sidecar.address) == "closed\n"


@pytest.mark.parametrize("connected", [False, True])
def test_single_rows_pass_a_stopped_sidecar_by(mortal, exact, connected):
    ids, layer = np.arange(20), exact.layers[0]
    expected = exact.lookup_rows(layer, ids).packed()
    with engram.connect(mortal.address, timeout_s=0.5) as table:
        tier, asked = table._tier, []
        if connected:
            table.lookup_rows(layer, ids)
        ask = tier._rows

        def counted(attachment):
            asked.append(attachment)
            return ask(attachment)

        tier._rows = counted
        mortal.process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                assert np.array_equal(table.lookup_rows(layer, ids).packed(), expected)
            assert len(asked) == 1
        finally:
            mortal.process.send_signal(signal.SIGCONT)
        until(lambda: not tier._attachments.now.stalled)
        assert np.array_equal(table.lookup_rows(layer, ids).packed(), expected)
        assert len(asked) == 2
        assert stats_of(table)["read_directly"] == 3
        assert stats_of(table)["reattached"] == 0


def test_a_tier_for_single_rows_is_closed_with_the_table(sidecar, exact, monkeypatch):
    """Also where it is made while the table is closed."""
    made, table = [], engram.connect(sidecar.address)

    def amid(*arguments, **options):
        made.append(RemoteTier(*arguments, **options))
        table.close()
        return made[0]

    monkeypatch.setattr(attached, "RemoteTier", amid)
    with pytest.raises(UnavailableError, match="the table is closed"):
        table.lookup_rows(exact.layers[0], [1])
    assert made[0]._link._closed
