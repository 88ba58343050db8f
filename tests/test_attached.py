"""Clients attached to real sidecars, which are killed, stopped, restarted and replaced."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from conftest import build_synthetic, small_v41
from python_process import run_python
from sidecars import Sidecar, environment, model_tier

import engram
from engram.errors import (
    ConfigError,
    RowIntegrityError,
    SpecMismatchError,
    UnavailableError,
)
from engram.ram.attached import AttachedTier
from engram.ram.tier import ram_tiers
from engram.remote import RemoteTier
from engram.rows import RowFormat
from engram.service.attach import AttachServer
from engram.service.server import Server
from engram.service.sockets import parse_address
from engram.ssd import SsdTier
from engram.table import Table

TOKENS = np.arange(40)
SECONDS_MAX = 30


def _until(condition):
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _until_there(table, windows):
    _until(lambda: table._tier.probe(windows).min() >= 0)


def stats_of(table):
    return table.stats()["tiers"][0]


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


def same(table, exact, tokens=TOKENS, **selection):
    found, wanted = (each.lookup(tokens, **selection) for each in (table, exact))
    return np.array_equal(found.packed(), wanted.packed())


def test_hits_come_from_shared_memory(sidecar, exact):
    with engram.connect(sidecar.address) as table:
        assert isinstance(table._tier, AttachedTier)
        assert same(table, exact)
        fetches = stats_of(table)["fetches"]
        for _ in range(5):
            assert same(table, exact)
        stats = stats_of(table)
        assert stats["fetches"] == fetches
        assert stats["hits"] >= 5 * 3 * len(TOKENS)
        assert stats["tier"] == "attached"
        assert stats["attached"] == 1
        table._tier.check_integrity()


@pytest.mark.parametrize("columns", [[3], [23, 0, 9], None])
@pytest.mark.parametrize("layers", [None, [-1]])
def test_any_selection_of_misses_and_hits(sidecar, exact, columns, layers):
    layers = layers and [exact.layers[-1]]
    with engram.connect(sidecar.address) as table:
        tokens = np.random.default_rng(3).integers(0, 600, (3, 150))
        for _ in range(2):
            assert same(table, exact, tokens, columns=columns, layers=layers)


def test_a_lookup_larger_than_all_staging(sidecar, exact):
    tokens = np.random.default_rng(4).integers(0, 600, 20_000)
    with engram.connect(sidecar.address) as table:
        room = table._tier._attachments.now.lease
        assert 2 * len(tokens) > room.chunks * room.entries_per_chunk
        assert same(table, exact, tokens, columns=[0, 9])


def test_single_rows_by_id(sidecar, exact):
    with engram.connect(sidecar.address) as table:
        ids = np.arange(300).reshape(3, 100)
        found, wanted = (each.lookup_rows(exact.layers[0], ids) for each in (table, exact))
        assert np.array_equal(found.packed(), wanted.packed())


def test_tcp_is_not_attached_and_cannot_read_directly(sidecar, exact):
    port = int(sidecar.lines[-1].rpartition("tcp:127.0.0.1:")[2].partition(";")[0])
    for how in (None, "wait", "fail"):
        with engram.connect(f"127.0.0.1:{port}", on_unavailable=how) as table:
            assert isinstance(table._tier, RemoteTier)
            assert same(table, exact)
    with pytest.raises(ConfigError, match="cannot be read from here"):
        engram.connect(f"127.0.0.1:{port}", on_unavailable="direct")


def test_an_unknown_on_unavailable_is_refused(sidecar):
    with pytest.raises(ConfigError, match="use 'direct', 'wait' or 'fail'"):
        engram.connect(sidecar.address, on_unavailable="zeros")


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
        _until(lambda: stats_of(table)["attached"])
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
        _until(lambda: stats_of(table)["attached"])
        assert same(table, exact, TOKENS + 100)


def test_wait_waits_for_the_next_sidecar(mortal, exact):
    with engram.connect(mortal.address, on_unavailable="wait", timeout_s=SECONDS_MAX) as table:
        assert same(table, exact)
        mortal.kill()
        right = []
        thread = threading.Thread(target=lambda: right.append(same(table, exact, TOKENS + 100)))
        thread.start()
        _until(lambda: stats_of(table)["waits"])
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
        _until(lambda: table._tier._attachments.other_table is not None)
        for tokens in (TOKENS, TOKENS + 100):
            with pytest.raises(SpecMismatchError, match="another table") as caught:
                table.lookup(tokens)
            assert caught.value.field == "fingerprint"
        with pytest.raises(SpecMismatchError):
            table.lookup_rows(table.layers[0], [1])
        mortal.kill()
        mortal.told["tables"]["v41"] = v41_table
        mortal.start()
        _until(lambda: stats_of(table)["attached"])
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
        _until(lambda: not table._tier._attachments.now.stalled)
        assert same(table, exact, TOKENS + 400)
        stats = stats_of(table)
        assert stats["read_directly"] == 3
        assert stats["reattached"] == 0


def test_without_ram_everything_is_fetched(tmp_path, v41_table, exact):
    with (
        Sidecar(tmp_path / "s.sock", {"v41": v41_table}, ram="0") as running,
        engram.connect(running.address) as table,
    ):
        for _ in range(2):
            assert same(table, exact)
        stats = stats_of(table)
        assert stats["hits"] == 0
        assert stats["fetches"] >= 2
        running.kill()
        assert same(table, exact)


def test_damaged_rows_are_named_and_all_others_valid(tmp_path):
    plain = Table(model_tier())
    ids = plain.spec.row_ids(TOKENS)
    layer, row = plain.layers[1], int(ids[7, 1, 4])
    with Sidecar(tmp_path / "s.sock", {"model": {"damaged": [[layer, row]]}}) as running:
        table = engram.connect(running.address)
        for _ in range(2):
            out = engram.Rows.empty((*ids.shape,), table.row_format)
            with pytest.raises(RowIntegrityError, match="by design") as caught:
                table.lookup(TOKENS, out=out)
            assert caught.value.failures == {layer: (row,)}
            valid = ids[:, 1] != row
            assert np.array_equal(out.values[:, 0], plain.lookup(TOKENS).values[:, 0])
            assert np.array_equal(out.values[:, 1][valid], plain.lookup(TOKENS).values[:, 1][valid])
        columns = [column for column in range(ids.shape[2]) if (ids[:, 1, column] != row).all()]
        assert same(table, plain, columns=columns)
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


def test_a_prefetch_turns_misses_into_hits(mortal, exact):
    with engram.connect(mortal.address) as table:
        assert not table.prefetch(TOKENS).cancelled
        _until_there(table, table.spec.windows(TOKENS))
        assert same(table, exact)
        stats = stats_of(table)
        assert stats["fetches"] == 0
        assert stats["prefetches_dropped"] == 0
        # What is there is not asked for again.
        table.prefetch(TOKENS)
        assert stats_of(table)["prefetches"] == stats["prefetches"]
        mortal.kill()
        table.prefetch(TOKENS + 100)
        _until(lambda: stats_of(table)["prefetches_dropped"] == 1)


def test_drafts_of_one_context_are_prefetched_in_one_call(sidecar, exact):
    drafts = np.random.default_rng(8).integers(0, 600, (6, 5))
    context = [7, 8, 9]
    with engram.connect(sidecar.address) as table:
        table.prefetch(drafts, history=context)
        windows = table.spec.windows(drafts, history=context).reshape(-1, 4)
        _until_there(table, windows)
        assert same(table, exact, drafts, history=context)
        assert stats_of(table)["fetches"] == 0


def test_a_closed_table_refuses(sidecar):
    table = engram.connect(sidecar.address)
    table.close()
    table.close()
    asks = (table.lookup, table.prefetch, lambda ids: table.lookup_rows(table.layers[0], ids))
    for ask in asks:
        with pytest.raises(UnavailableError, match="the table is closed; connect again"):
            ask([1, 2])


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


@pytest.fixture
def own_server(tmp_path, v41_table):
    """A server in this process, to look inside; with its attach server and RAM tier."""
    ssd = SsdTier(v41_table)
    tiers = ram_tiers({"v41": ssd}, 1 << 20, shared=True)
    attach = AttachServer([tmp_path / "s.sock"], tiers, {"v41": ssd.files})
    address = parse_address(f"unix:{tmp_path}/s.sock")
    boot_id = tiers["v41"].cache.boot_id.hex()
    server = Server(tiers, (address,), leases=attach.lease, boot_id=boot_id)
    server.start()
    attach.start()
    yield server, attach, tiers["v41"], str(address)
    attach.stop()
    server.stop()
    tiers["v41"].check_integrity()
    tiers["v41"].close()


CLIENT = """
import sys, time
import engram
table = engram.connect(sys.argv[1])
while True:
    table.lookup(range(100))
    print("looked up", flush=True)
"""


def test_a_killed_client_leaves_nothing_at_the_sidecar(own_server):
    server, attach, tier, address = own_server
    readers = len(tier.cache._readers)
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, address], stdout=subprocess.PIPE, env=environment()
    )
    assert client.stdout.readline()
    assert attach.stats()["leases"] == 1
    client.kill()
    client.wait()
    client.stdout.close()
    _until(lambda: attach.stats()["leases"] == 0)
    assert attach.stats()["ended_closed"] == 1
    assert len(tier.cache._readers) == readers
    _until(lambda: not server.servicer._streams)


def test_a_table_that_is_forgotten_gives_its_lease_back(own_server):
    server, attach, _, address = own_server
    table = engram.connect(address)
    table.lookup(TOKENS)
    assert attach.stats()["leases"] == 1
    del table
    gc.collect()
    _until(lambda: attach.stats()["leases"] == 0)
    _until(lambda: not server.servicer._streams)


def test_a_lease_that_the_sidecar_ends_is_replaced(own_server, exact):
    _, attach, _, address = own_server
    with engram.connect(address) as table:
        assert same(table, exact)
        (descriptor,) = attach._held
        attach._poll.unregister(descriptor)
        attach._end(descriptor, "ended_protocol")
        for shift in range(5):
            assert same(table, exact, TOKENS + 10 * shift)
        _until(lambda: stats_of(table)["reattached"] == 1)
        assert same(table, exact, TOKENS + 200)
        assert attach.stats()["leases"] == 1


def test_a_cancelled_prefetch_is_cancelled_at_the_sidecar(own_server, monkeypatch):
    _, _, tier, address = own_server
    handles = []
    real = tier.misses.prefetch

    def keep(ngrams):
        handles.append(real(ngrams))
        return handles[-1]

    monkeypatch.setattr(tier.misses, "prefetch", keep)
    with engram.connect(address) as table:
        first, second, third = (table.prefetch(TOKENS + shift) for shift in (0, 100, 200))
        _until(lambda: len(handles) == 3)
        second.cancel()
        second.cancel()
        _until(lambda: handles[1].cancelled)
        assert [handle.cancelled for handle in handles] == [False, True, False]
        assert second.cancelled
        assert not first.cancelled
    # The rest goes with the connection.
    _until(lambda: all(handle.cancelled for handle in handles))
    third.cancel()


def test_an_epoch_is_held_where_its_slots_were_found(mortal, exact):
    with engram.connect(mortal.address) as table:
        assert same(table, exact)
        tier, windows = table._tier, table.spec.windows(TOKENS)
        with tier.holding():
            before = tier.probe(windows)
            assert (before >= 0).all()
            mortal.kill()
            mortal.start()
            _until(lambda: stats_of(table)["reattached"] == 1)
            assert np.array_equal(tier.probe(windows), before)
        assert (tier.probe(windows) < 0).all()


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
        _until(lambda enough=enough: counts["right"] > enough)
        mortal.kill()
        mortal.start()
        _until(lambda turn=turn: all(stats_of(t)["reattached"] == turn + 1 for t in tables))
    over.set()
    for thread in threads:
        thread.join()
    assert set(counts) == {"right"}
    _until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    for table in tables:
        table.close()
