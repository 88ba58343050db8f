"""Attaching: what a lease is, who gets one, who is refused, and what it leaves behind."""

from __future__ import annotations

import os
import socket
import stat
import threading

import pytest
from attach_hosts import HANG_S, descriptors, host_of, until
from python_process import run_python

from engram.errors import (
    ConfigError,
    OverloadError,
    RequestError,
    ServiceError,
    SpecMismatchError,
    UnavailableError,
    UnknownTableError,
)
from engram.ram import _handshake, _terms
from engram.ram.layout import ABI, WORD_EPOCH, ArenaLayout, unpack_view
from engram.service import attach as server_module
from engram.service.attach import AttachServer


@pytest.fixture
def host(tmp_path, v41_table, qwen_table):
    tables = {"v41": v41_table, "qwen": qwen_table}
    with host_of(tmp_path / "s", tables, leases_max=8) as host:
        assert all(tier.cache.layout.slabs > 1 for tier in host.tiers.values())
        yield host


@pytest.mark.parametrize("table", ["v41", "qwen", "model"])
def test_a_lease_is_the_memory_of_the_table(host, table):
    tier = host.tiers[table]
    lease = host.attach(table)
    served = host.server.lease(lease.token)
    assert (served.tier, served.table, served.closed) == (tier, table, False)
    assert (served.pid, served.uid) == (os.getpid(), os.geteuid())
    assert (served.chunks, served.entries_per_chunk) == (lease.chunks, lease.entries_per_chunk)
    assert lease.alive
    assert lease.boot_id == bytes(range(16)).hex()
    assert (lease.layout, lease.bundle) == (tier.cache.layout, tier.bundle)
    assert (lease.table_number, lease.seed) == (tier.number, tier.cache.seed)
    assert lease.staging.size == lease.chunks * lease.entries_per_chunk * tier.bundle.staged_bytes
    # The same memory at other addresses.
    pairs = [
        (lease.directory, tier.cache.directories[tier.number]),
        (lease.staging, served.staging),
        *zip(lease.slabs, tier.cache.slabs, strict=True),
    ]
    for number, (theirs, ours) in enumerate(pairs):
        assert (theirs.size, theirs.address != ours.address) == (ours.size, True)
        ours.bytes()[-8:] = number
        assert theirs.bytes()[-8:].tolist() == 8 * [number]
        assert not theirs.bytes().flags.writeable
        ours.bytes()[-8:] = 0
    lease.reader.words(WORD_EPOCH + 1)[WORD_EPOCH] = 7
    assert served.reader.words(WORD_EPOCH + 1)[WORD_EPOCH] == 7
    lease.reader.words(WORD_EPOCH + 1)[WORD_EPOCH] = 0
    view, own = unpack_view(lease.view), unpack_view(tier.cache.views[tier.number])
    differing = {f for f in view._fields if getattr(view, f) != getattr(own, f)}
    assert differing == {"directory", "slabs", "touched", "counters"}
    lease.close()


def test_leases_are_each_others_strangers(host):
    first, second = host.attach(), host.attach()
    assert first.token != second.token
    assert len(first.token) == 16
    host.server.lease(first.token).staging.bytes()[0] = 1
    assert second.staging.bytes()[0] == 0
    first.close()
    until(lambda: host.server.lease(first.token) is None)
    assert second.alive
    assert host.server.lease(second.token) is not None
    assert host.server.lease(bytes(16)) is None
    second.close()


def test_a_closed_lease_is_gone_at_once_and_leaves_no_descriptor(host):
    host.attach().close()
    before = descriptors()
    for _ in range(5):
        lease = host.attach()
        served = host.server.lease(lease.token)
        lease.direct()
        lease.close()
        lease.close()
        assert not lease.alive
        until(lambda served=served: served.closed)
        assert host.server.lease(lease.token) is None
        assert served.reader not in served.tier.cache._readers
        lease.staging.bytes()[:64].sum()  # what it mapped stays as long as it does
        del lease
    until(lambda: descriptors() <= before)
    counts = host.server.stats()
    assert (counts["leases"], counts["attached"], counts["ended_closed"]) == (0, 6, 6)


def test_a_lease_that_nobody_holds_ends(host):
    token = host.attach().token
    until(lambda: host.server.lease(token) is None)


def test_a_lease_without_slots(tmp_path, v41_table):
    with host_of(tmp_path / "s", {"v41": v41_table}, 0) as host:
        lease = host.attach()
        assert (lease.layout.slots, lease.slabs) == (0, ())
        assert lease.view is not None
        lease.close()


def test_a_lease_of_more_slabs_than_fit_one_frame(tmp_path, v41_table, monkeypatch):
    def single(cls, budget, slot_bytes, head_bytes, tables):
        return ArenaLayout(slot_bytes, head_bytes, 1, 150)

    monkeypatch.setattr(ArenaLayout, "within", classmethod(single))
    with host_of(tmp_path / "s", {"v41": v41_table}) as host:
        before = descriptors()
        lease = host.attach()
        slabs = host.tiers["v41"].cache.slabs
        assert len(lease.slabs) == len(slabs) == 150
        assert descriptors() <= before + 4
        for number, (ours, theirs) in enumerate(zip(slabs, lease.slabs, strict=True)):
            ours.bytes()[-1] = number
            assert theirs.bytes()[-1] == number
        lease.close()


def test_what_does_not_match_is_refused_by_name(host):
    for changes, error, words in (
        ({"table": "none"}, UnknownTableError, "no table 'none' is served"),
        ({"fingerprint": "0" * 32}, SpecMismatchError, "v41 is another table than the client's"),
    ):
        with pytest.raises(error, match=words):
            host.attach(**changes)
    assert host.server.stats()["refused"] == 2
    assert host.leases == 0


def test_a_bundle_of_another_spec_is_refused_by_the_client(host):
    with pytest.raises(ServiceError, match=r"the sidecar offers bundles .*, needed are"):
        host.attach(bundle=host.tiers["qwen"].bundle)


def test_versions_of_the_layout_are_compared_by_both_sides(host, monkeypatch):
    monkeypatch.setattr(_terms, "ABI", 99)
    with pytest.raises(ServiceError, match=f"ABI version {ABI}, needed are 99"):
        host.attach()
    monkeypatch.setattr(_handshake, "ABI", 99)
    with pytest.raises(RequestError, match=f"as version 99, the sidecar as version {ABI};"):
        host.attach()


def test_too_many_clients_are_told_so(host):
    leases = [host.attach() for _ in range(8)]
    with pytest.raises(OverloadError, match="8 clients are attached already"):
        host.attach()
    leases.pop().close()
    until(lambda: host.leases == 7)
    leases.append(host.attach())
    for lease in leases:
        lease.close()


def test_only_known_users_may_attach(host, monkeypatch):
    monkeypatch.setattr(server_module, "peer_of", lambda connection: (1, 4711))
    with pytest.raises(RequestError, match="user 4711 may not attach, only 0"):
        host.attach()
    host.server._uids.add(4711)
    host.attach().close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_whoever_lets_it_connect(host):
    os.chmod(host.place.parent, 0o755)
    for folder in host.place.parents:
        if os.stat(folder).st_uid == 0 and not os.stat(folder).st_mode & stat.S_IXOTH:
            os.chmod(folder, 0o755)
    os.chmod(f"{host.place}.attach", 0o666)
    script = """
import os, sys
from pathlib import Path
from engram.errors import RequestError
from engram.ram.attach import Lease
from engram.ram.layout import BundleLayout
os.setuid(65534)
try:
    Lease.open(Path(sys.argv[1]), "v41", "0" * 32, BundleLayout(1, 1, 1, 1, 1), 1, 20.0)
except RequestError as error:
    print(error)
"""
    assert "user 65534 may not attach, only 0" in run_python(script, host.place)


def test_the_sockets_mode_keeps_others_out(host):
    mode = os.stat(f"{host.place}.attach").st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_one_server_has_several_sockets_and_one_limit(tmp_path, host):
    places = [tmp_path / "a", tmp_path / "b"]
    before = sorted(tmp_path.iterdir())
    server = AttachServer(places, host.tiers, {}, leases_max=2)
    server.start()
    leases = [host.attach(path=place) for place in places]
    assert all(server.lease(lease.token) for lease in leases)
    with pytest.raises(OverloadError):
        host.attach(path=places[0])
    for lease in leases:
        lease.close()
    server.stop()
    assert sorted(tmp_path.iterdir()) == before


def test_a_server_that_never_started_leaves_nothing(tmp_path, host):
    before, files = descriptors(), sorted(tmp_path.iterdir())
    server = AttachServer([tmp_path / "a"], host.tiers, {})
    server.stop()
    assert descriptors() == before
    assert sorted(tmp_path.iterdir()) == files


def test_a_socket_that_cannot_be_had_leaves_nothing(tmp_path, host):
    before, files = descriptors(), sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"cannot listen on .*/none/s\.attach"):
        AttachServer([tmp_path / "a", tmp_path / "none" / "s"], host.tiers, {})
    assert descriptors() == before
    assert sorted(tmp_path.iterdir()) == files


def test_a_silent_server_is_given_up_in_time(tmp_path, host):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "t.attach"))
        silent.listen(1)
        before = descriptors()
        with pytest.raises(UnavailableError, match="no answer on the attach socket in time"):
            host.attach(path=tmp_path / "t", timeout_s=0.1)
        assert descriptors() == before


def test_many_threads_attach_and_leave_at_once(host):
    done = []

    def churn():
        for _ in range(5):
            lease = host.attach()
            assert host.server.lease(lease.token) is not None
            lease.close()
        done.append(True)

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert len(done) == 4
    until(lambda: host.leases == 0)
    assert host.server.stats()["attached"] == 20
