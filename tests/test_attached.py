"""Clients attached to a sidecar: hits from its memory, misses fetched, leases given back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
from attaching import TOKENS, same, stats_of, until, until_there
from sidecars import Sidecar, environment, model_tier

import engram
from engram.errors import (
    ConfigError,
    RowIntegrityError,
    UnavailableError,
)
from engram.ram.attached import AttachedTier
from engram.ram.tier import ram_tiers
from engram.remote import RemoteTier
from engram.service.attach import AttachServer
from engram.service.server import Server
from engram.service.sockets import parse_address
from engram.ssd import SsdTier
from engram.table import Table
from engram.torture.held import HeldSlots


@pytest.fixture(scope="module")
def exact(v41_table):
    with engram.open(v41_table, ram=0) as table:
        yield table


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


def test_a_prefetch_turns_misses_into_hits(mortal, exact):
    with engram.connect(mortal.address) as table:
        assert not table.prefetch(TOKENS).cancelled
        until_there(table, table.spec.windows(TOKENS))
        assert same(table, exact)
        stats = stats_of(table)
        assert stats["fetches"] == 0
        assert stats["prefetches_dropped"] == 0
        # What is there is not asked for again.
        table.prefetch(TOKENS)
        assert stats_of(table)["prefetches"] == stats["prefetches"]
        mortal.kill()
        table.prefetch(TOKENS + 100)
        until(lambda: stats_of(table)["prefetches_dropped"] == 1)


def test_drafts_of_one_context_are_prefetched_in_one_call(sidecar, exact):
    drafts = np.random.default_rng(8).integers(0, 600, (6, 5))
    context = [7, 8, 9]
    with engram.connect(sidecar.address) as table:
        table.prefetch(drafts, history=context)
        windows = table.spec.windows(drafts, history=context).reshape(-1, 4)
        until_there(table, windows)
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
    until(lambda: attach.stats()["leases"] == 0)
    assert attach.stats()["ended_closed"] == 1
    assert len(tier.cache._readers) == readers
    until(lambda: not server.servicer._streams)


def test_a_table_that_is_forgotten_gives_its_lease_back(own_server):
    server, attach, _, address = own_server
    table = engram.connect(address)
    table.lookup(TOKENS)
    assert attach.stats()["leases"] == 1
    del table
    gc.collect()
    until(lambda: attach.stats()["leases"] == 0)
    until(lambda: not server.servicer._streams)


def test_a_lease_that_the_sidecar_ends_is_replaced(own_server, exact):
    _, attach, _, address = own_server
    with engram.connect(address) as table:
        assert same(table, exact)
        (descriptor,) = attach._held
        attach._poll.unregister(descriptor)
        attach._end(descriptor, "ended_protocol")
        for shift in range(5):
            assert same(table, exact, TOKENS + 10 * shift)
        until(lambda: stats_of(table)["reattached"] == 1)
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
        until(lambda: len(handles) == 3)
        second.cancel()
        second.cancel()
        until(lambda: handles[1].cancelled)
        assert [handle.cancelled for handle in handles] == [False, True, False]
        assert second.cancelled
        assert not first.cancelled
    # The rest goes with the connection.
    until(lambda: all(handle.cancelled for handle in handles))
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
            until(lambda: stats_of(table)["reattached"] == 1)
            assert np.array_equal(tier.probe(windows), before)
        assert (tier.probe(windows) < 0).all()


def test_an_end_of_the_attachment_waits_for_the_epochs_that_are_held(own_server, exact):
    """A stream that breaks, a fetch that fails and `close` leave held slots alone."""
    _, attach, _, address = own_server
    with engram.connect(address) as table, engram.connect(address) as other:
        tier, windows = table._tier, table.spec.windows(TOKENS)
        endings = (
            lambda held: held.connection.stream.close(),
            lambda held: held.end(),
            lambda held: table.close(),
        )
        for turn, end in enumerate(endings):
            assert same(table, exact)
            with tier.holding():
                slots = HeldSlots(tier, windows)
                before, after = (engram.Rows.empty(slots.shape, table.row_format) for _ in range(2))
                slots.read(before)
                end(tier._attachment())
                if turn < 2:
                    until(lambda turn=turn: stats_of(table)["reattached"] == turn + 1)
                for seed in range(8):
                    other.lookup(np.random.default_rng(seed).integers(0, 600, 512))
                slots.read(after)
                held = before.packed()[slots.columns.any(axis=1)]
                assert len(held)
                assert np.array_equal(held, after.packed()[slots.columns.any(axis=1)])
                assert attach.stats()["leases"] == 2 + (turn < 2)
            until(lambda turn=turn: attach.stats()["leases"] == 2 - (turn == 2))


def test_a_lease_that_a_living_sidecar_ends_is_said_when_leaving(own_server, exact):
    _, attach, _, address = own_server
    with engram.connect(address) as table:
        assert same(table, exact)
        holding = table._tier.holding()
        holding.__enter__()
        (descriptor,) = attach._held
        attach._poll.unregister(descriptor)
        attach._end(descriptor, "ended_protocol")
        with pytest.raises(UnavailableError, match="may have changed"):
            holding.__exit__(None, None, None)
        with pytest.raises(KeyError), table._tier.holding():
            raise KeyError


def mapped():
    """How often memory of a sidecar or its clients is mapped into this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:engram" in line for line in maps)


def test_close_gives_the_memory_back(sidecar, exact):
    gc.collect()
    gc.disable()
    try:
        before, threads = mapped(), threading.active_count()
        table = engram.connect(sidecar.address)
        assert same(table, exact)
        counted = stats_of(table)
        assert mapped() > before
        table.close()
        until(lambda: mapped() <= before)
        until(lambda: threading.active_count() <= threads)
        assert stats_of(table) == counted | {"attached": 0}
        with engram.connect(sidecar.address) as another:
            assert same(another, exact)
        del another
        until(lambda: mapped() <= before)
    finally:
        gc.enable()


def test_a_prefetch_without_a_thread_is_dropped(sidecar, monkeypatch):
    start = threading.Thread.start

    def none(thread):
        if thread.name == "engram-stream":
            raise RuntimeError("can't start new thread")
        start(thread)

    with engram.connect(sidecar.address) as table:
        monkeypatch.setattr(threading.Thread, "start", none)
        table.prefetch(TOKENS + 300)
        assert stats_of(table)["prefetches_dropped"] == 1
        monkeypatch.undo()
        table.prefetch(TOKENS + 300)
        until_there(table, table.spec.windows(TOKENS + 300))
