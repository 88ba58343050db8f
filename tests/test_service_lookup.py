"""Lookups through a real sidecar: exact bytes, whatever the size, the client or the damage."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from sidecars import Sidecar, environment, model_tier, remote_table

import engram
from engram.errors import RowIntegrityError, UnavailableError, UnknownTableError
from engram.remote import RemoteTier
from engram.rows import Rows
from engram.service._requests import prefetch_of
from engram.service.config import Limits
from engram.service.server import Server
from engram.service.sockets import parse_address
from engram.table import Table

DAMAGED_LAYER = 2


@pytest.fixture(scope="module")
def damaged_rows():
    """A few rows of layer 2 that the tokens below hit, and all rows of one head of layer 0."""
    spec = model_tier().spec
    ids = spec.row_ids(np.arange(100))
    rows = [(DAMAGED_LAYER, int(ids[at, 1, column])) for at, column in ((3, 0), (50, 9), (99, 15))]
    return rows + [(0, row) for row in range(7000, 7100)]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory, v41_table, qwen_table, damaged_rows):
    socket = tmp_path_factory.mktemp("run") / "s.sock"
    tables = {"v41": v41_table, "qwen": qwen_table, "damaged": {"damaged": damaged_rows}}
    with Sidecar(socket, tables) as running:
        yield running


@pytest.fixture(scope="module")
def small_limits(tmp_path_factory, v41_table):
    socket = tmp_path_factory.mktemp("run") / "s.sock"
    with Sidecar(socket, {"v41": v41_table}, request_rows=1024) as running:
        yield running


# 48 rows a token; a reply holds 15,887 rows, a request 16,384.
@pytest.mark.parametrize("tokens", [0, 1, 330, 331, 341, 342, 700, 3000])
def test_any_number_of_tokens_is_exact(sidecar, v41_table, tokens):
    ids = np.random.default_rng(tokens).integers(0, 600, tokens)
    with remote_table(sidecar.address, "v41") as remote, engram.open(v41_table) as embedded:
        assert np.array_equal(remote.lookup(ids).packed(), embedded.lookup(ids).packed())


@pytest.mark.parametrize("name", ["v41", "qwen"])
def test_every_row_by_its_id(sidecar, request, name):
    path = request.getfixturevalue(f"{name}_table")
    with remote_table(sidecar.address, name) as remote, engram.open(path) as embedded:
        for layer in remote.spec.layers:
            ids = np.random.default_rng(0).permutation(layer.rows)
            found = remote.lookup_rows(layer.layer, ids)
            assert np.array_equal(found.packed(), embedded.lookup_rows(layer.layer, ids).packed())


def test_a_connected_table_is_the_table(sidecar, qwen_table):
    with remote_table(sidecar.address, "qwen") as remote, engram.open(qwen_table) as embedded:
        assert remote.spec == embedded.spec
        assert remote.row_format == embedded.row_format
        assert remote.fingerprint == embedded.fingerprint
        assert remote.name == "qwen"


def test_lookups_beyond_the_limits_are_split(small_limits, v41_table):
    ids = np.random.default_rng(1).integers(0, 600, 400)
    rows = np.random.default_rng(1).integers(0, 7000, 5000)
    with remote_table(small_limits.address) as remote, engram.open(v41_table) as embedded:
        assert np.array_equal(remote.lookup(ids).packed(), embedded.lookup(ids).packed())
        sent = remote.stats()["tiers"][0]["requests"]
        assert sent >= len(ids) * 48 // 1024
        assert np.array_equal(
            remote.lookup_rows(14, rows).packed(), embedded.lookup_rows(14, rows).packed()
        )
        assert remote.stats()["tiers"][0]["requests"] >= sent + np.unique(rows).size // 1024


def test_damaged_rows_cross_the_wire_by_name(sidecar, damaged_rows):
    sound = Table(model_tier())
    tokens = np.arange(100)
    ids = sound.spec.row_ids(tokens)
    bad = np.zeros(ids.shape, bool)
    for layer, row in damaged_rows:
        position = sound.layers.index(layer)
        bad[:, position] |= ids[:, position] == row
    with remote_table(sidecar.address, "damaged") as remote:
        out = Rows.empty(ids.shape, remote.row_format)
        with pytest.raises(RowIntegrityError) as caught:
            remote.lookup(tokens, out=out)
        expected = {
            layer: set(ids[:, position][bad[:, position]].tolist())
            for position, layer in enumerate(remote.layers)
            if bad[:, position].any()
        }
        assert {layer: set(rows) for layer, rows in caught.value.failures.items()} == expected
        assert "by design" in str(caught.value)
        assert "on the sidecar's host" in str(caught.value)
        assert "directory served as damaged" in str(caught.value)
        assert np.array_equal(out.values[~bad], sound.lookup(tokens).values[~bad])
        # The stream is none the worse for it.
        tokens = tokens[: np.flatnonzero(bad.any(axis=(1, 2)))[0]]
        assert np.array_equal(remote.lookup(tokens).values, sound.lookup(tokens).values)
        assert remote.stats()["tiers"][0]["rows_failed"] == sum(map(len, expected.values()))


def test_damage_under_a_running_sidecar_fails_only_what_it_touches(tmp_path, qwen_table):
    copy = tmp_path / "qwen"
    shutil.copytree(qwen_table, copy)
    with engram.open(qwen_table) as embedded:
        layer = embedded.spec.layers[1]
        everything = np.arange(layer.rows)
        sound = embedded.lookup_rows(layer.layer, everything).values
    data = copy / "data.mdb"
    content = data.read_bytes()
    with Sidecar(tmp_path / "s.sock", {"qwen": copy}) as running:
        with remote_table(running.address) as remote:
            with data.open("r+b") as file:
                for row in (3, 500):
                    file.seek(content.index(sound[row].tobytes()) + 7)
                    file.write(bytes([sound[row][7] ^ 1]))
            out = Rows.empty(everything.shape, remote.row_format)
            with pytest.raises(RowIntegrityError, match="damaged bytes") as caught:
                remote.lookup_rows(layer.layer, everything, out=out)
            assert caught.value.failures == {layer.layer: (3, 500)}
            intact = ~np.isin(everything, (3, 500))
            assert np.array_equal(out.values[intact], sound[intact])
            # Cut off the second half of the file, in which the end of this layer lies.
            os.truncate(data, len(content) // 2)
            with pytest.raises(RowIntegrityError) as caught:
                remote.lookup_rows(layer.layer, everything[-10:])
            assert caught.value.failures == {layer.layer: tuple(everything[-10:])}
            assert remote.lookup_rows(embedded.layers[0], [0, 1]).shape == (2,)
        assert running.stop() == 0


def test_all_failed_rows_are_named(sidecar):
    with remote_table(sidecar.address, "damaged") as remote:
        with pytest.raises(RowIntegrityError) as caught:
            remote.lookup_rows(0, np.arange(6900, 7100))
        assert caught.value.failures == {0: tuple(range(7000, 7100))}


def test_threads_share_one_stream(sidecar, v41_table):
    tokens = np.random.default_rng(5).integers(0, 600, (12, 200))
    with engram.open(v41_table) as embedded:
        expected = [embedded.lookup(row).packed() for row in tokens]
    right = []
    with remote_table(sidecar.address, "v41") as remote:

        def work(index):
            for _ in range(3):
                right.append(np.array_equal(remote.lookup(tokens[index]).packed(), expected[index]))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 36


_CLIENT = """
import json, sys, numpy as np, engram
from engram.bench import checksum
told = json.loads(sys.argv[1])
with engram.connect(told["address"], told["name"]) as table:
    rows = [table.lookup(np.random.default_rng(s).integers(0, 512, 300)) for s in range(10)]
print(checksum(*(part for each in rows for part in (each.values, each.scales))))
"""


def test_processes_at_once(sidecar, v41_table, qwen_table):
    from engram.bench import checksum

    clients = [
        (
            name,
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _CLIENT,
                    json.dumps({"address": sidecar.address, "name": name}),
                ],
                stdout=subprocess.PIPE,
                text=True,
                env=environment(),
            ),
        )
        for name in ("v41", "qwen", "v41")
    ]
    expected = {}
    for name, path in (("v41", v41_table), ("qwen", qwen_table)):
        with engram.open(path) as table:
            rows = [table.lookup(np.random.default_rng(s).integers(0, 512, 300)) for s in range(10)]
        expected[name] = checksum(*(part for r in rows for part in (r.values, r.scales)))
    for name, client in clients:
        assert client.communicate(timeout=60)[0].strip() == expected[name]


def test_the_only_table_needs_no_name(sidecar, small_limits):
    with engram.connect(small_limits.address) as table:
        assert table.name == "v41"
    with pytest.raises(UnknownTableError, match=r"serves 3 tables.*v41, qwen, damaged"):
        engram.connect(sidecar.address)


def test_an_unknown_table_is_named(sidecar):
    with pytest.raises(UnknownTableError, match=r"no table 'other'.*v41, qwen, damaged"):
        engram.connect(sidecar.address, "other")


def test_a_closed_table_says_so(sidecar):
    table = engram.connect(sidecar.address, "qwen")
    table.close()
    table.close()
    with pytest.raises(UnavailableError, match="closed"):
        table.lookup([1, 2])
    with pytest.raises(UnavailableError, match="closed"):
        table.lookup_rows(2, [1])


def _in_child(table, address, answers):
    found = []
    for call in (
        lambda: table.lookup([1, 2]),
        lambda: table.prefetch([1, 2]),
        lambda: engram.connect(address, "qwen"),
    ):
        try:
            call()
        except UnavailableError as error:
            found.append(str(error))
    answers.put(found)


def test_a_forked_child_gets_an_error_and_the_parent_goes_on(sidecar):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with engram.connect(sidecar.address, "qwen") as table:
        expected = table.lookup([1, 2]).values
        child = context.Process(target=_in_child, args=(table, sidecar.address, answers))
        child.start()
        found = answers.get(timeout=30)
        child.join(30)
        assert child.exitcode == 0
        assert [("spawn" in message) for message in found] == [True] * 3
        assert np.array_equal(table.lookup([1, 2]).values, expected)


@pytest.fixture
def own_server(tmp_path):
    """A server in this process, to look inside."""
    tier = model_tier()
    address = parse_address(f"unix:{tmp_path}/s.sock")
    server = Server({"model": tier}, (address,))
    server.start()
    yield server, tier, str(address)
    server.stop()


def test_prefetch_brings_the_ngrams_to_the_sidecar(own_server):
    _, tier, address = own_server
    with engram.connect(address) as table:
        table.prefetch(np.arange(50))
        _until(lambda: tier.prefetched)
        (ngrams,) = tier.prefetched
        assert sorted(ngrams.orders.tolist()) == [2] * 50 + [3] * 50
        windows = table.spec.windows(np.arange(50))
        asked = {(*window[:2], -1) for window in windows.tolist()}
        asked |= {tuple(window) for window in windows.tolist()}
        assert {tuple(window) for window in ngrams.windows.tolist()} == asked
        table._tier.check_integrity()


def test_prefetches_are_cut_to_what_the_sidecar_takes(tmp_path):
    """With more layers than orders, an n-gram has more rows than the spec has columns."""
    tier = model_tier(ple_layer_ids=[1, 2, 3])
    address = parse_address(f"unix:{tmp_path}/s.sock")
    server = Server({"model": tier}, (address,), Limits(request_rows=2000))
    server.start()
    with engram.connect(str(address)) as table:
        table.prefetch(np.arange(300))
        _until(lambda: sum(map(len, tier.prefetched)) == 600)
        assert table.stats()["tiers"][0]["prefetches_dropped"] == 0
    server.stop()


def test_prefetch_never_fails_for_a_sidecar_that_is_gone(tmp_path, qwen_table):
    with Sidecar(tmp_path / "s.sock", {"qwen": qwen_table}) as running:
        table = engram.connect(running.address)
        running.kill()
        for _ in range(3):
            table.prefetch([1, 2, 3])
        _until(lambda: table.stats()["tiers"][0]["prefetches_dropped"] == 3)


def test_a_forgotten_table_leaves_its_stream(own_server):
    server, _, address = own_server
    tier = RemoteTier(address)
    assert len(server.servicer._streams) == 1
    del tier
    gc.collect()
    _until(lambda: not server.servicer._streams)


def test_threads_of_streams_end_with_them(own_server):
    _, _, address = own_server

    def working():
        return sum(thread.name == "engram-stream" for thread in threading.enumerate())

    before = working()
    for _ in range(5):
        with engram.connect(address) as table:
            table.lookup([1, 2, 3])
    _until(lambda: working() <= before)


def test_packed_ngrams_mean_the_same_on_both_sides(own_server):
    from engram._wire import pack_ngrams

    _, tier, address = own_server
    with engram.connect(address) as table:
        windows = table.spec.windows(np.arange(20))
    from engram.tiers import Ngrams

    orders = np.tile(np.array([2, 3], np.int32), 10)
    windows[orders == 2, 2] = -1
    unpacked = prefetch_of(pack_ngrams(Ngrams(windows, orders)), tier, 1000)
    assert np.array_equal(unpacked.windows, windows)
    assert np.array_equal(unpacked.orders, orders)


def _until(holds, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


def test_importing_the_service_needs_no_torch():
    code = "import sys, engram.service.server, engram.remote; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
