"""Leases and the lives of processes: killed, stopped, forked, and outlived by their memory."""

from __future__ import annotations

import fcntl
import json
import os
import signal

import numpy as np
import pytest
from attach_hosts import ATTACH, SERVE, TIMEOUT_S, host_of, process, until

from engram.errors import UnavailableError
from engram.ram.attach import Lease
from engram.ram.layout import BundleLayout
from engram.rows import Rows
from engram.ssd import SsdTier


@pytest.fixture
def host(tmp_path, v41_table, qwen_table):
    tables = {"v41": v41_table, "qwen": qwen_table}
    with host_of(tmp_path / "s", tables, leases_max=8) as host:
        assert all(tier.cache.layout.slabs > 1 for tier in host.tiers.values())
        yield host


def test_direct_reads_need_no_sidecar(tmp_path, v41_table):
    sidecar = process(SERVE, tmp_path / "s", json.dumps({"v41": str(v41_table)}))
    assert sidecar.stdout.readline() == "serving\n"
    tier = SsdTier(v41_table)
    bundle = BundleLayout.of(tier.spec, tier.row_format)
    lease = Lease.open(
        tmp_path / "s", "v41", tier.fingerprint, bundle, tier.spec.min_order, TIMEOUT_S
    )
    os.kill(sidecar.pid, signal.SIGKILL)
    sidecar.communicate()
    until(lambda: not lease.alive)
    assert lease.ended.wait(0)
    lease.staging.bytes().sum()
    assert lease.view is not None
    reader = lease.direct()
    assert lease.direct() is reader
    assert reader.manifest.fingerprint == tier.fingerprint
    rows, places = Rows.empty((4,), tier.row_format), np.arange(4)
    reader.gather(np.zeros(4, np.int32), places, places, rows)
    expected = Rows.empty((4,), tier.row_format)
    tier.read_rows(0, places, expected, places)
    assert np.array_equal(rows.packed(), expected.packed())
    lease.close()
    reader.gather(np.zeros(4, np.int32), places, places, rows)  # whoever reads may finish
    with pytest.raises(UnavailableError, match="the lease is closed; connect again"):
        lease.direct()
    tier.close()


def test_a_dead_servers_socket_is_taken_over(tmp_path, v41_table):
    sidecar = process(SERVE, tmp_path / "s", json.dumps({"v41": str(v41_table)}))
    assert sidecar.stdout.readline() == "serving\n"
    sidecar.kill()
    sidecar.communicate()
    assert (tmp_path / "s.attach").is_socket()
    with host_of(tmp_path / "s", {"v41": v41_table}) as host:
        host.attach().close()


def test_a_table_without_a_file_cannot_be_read_directly(host):
    lease = host.attach("model")
    with pytest.raises(UnavailableError, match="keeps model in no file"):
        lease.direct()
    lease.close()


def test_clients_cannot_change_how_the_sidecar_reads_its_file(host):
    """Flags and readahead belong to an open file description: each client has one of its own."""
    lease = host.attach()
    descriptor = lease._offered._data
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    backing = host.tiers["v41"].backing
    own = backing._reader._file.descriptor
    assert os.fstat(own).st_ino == os.fstat(descriptor).st_ino
    assert not fcntl.fcntl(own, fcntl.F_GETFL) & os.O_DIRECT
    lease.close()


def test_the_end_of_the_server_ends_leases(host):
    lease = host.attach()
    served = host.server.lease(lease.token)
    host.server.stop()
    host.server.stop()
    until(lambda: not lease.alive)
    assert served.closed
    assert host.server.stats()["ended_stopped"] == 1
    assert not os.path.lexists(f"{host.place}.attach")
    with pytest.raises(UnavailableError, match=r"nothing answers there .*; is 'engram serve'"):
        host.attach()
    lease.close()


def test_a_draining_server_keeps_its_leases_and_takes_no_more(host):
    lease = host.attach()
    host.server.drain()
    with pytest.raises(UnavailableError, match="is shutting down"):
        host.attach()
    assert lease.alive
    lease.close()


ATTACHED = (
    ATTACH
    + """
lease = attach()
print("attached", flush=True)
sys.stdin.read()
"""
)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_death_of_a_client_ends_its_lease(host, ending):
    client = process(ATTACHED, host.told())
    assert client.stdout.readline() == "attached\n"
    assert host.leases == 1
    readers = len(host.tiers["v41"].cache._readers)
    if ending is not None:
        client.send_signal(ending)
    client.communicate()
    until(lambda: host.leases == 0)
    assert len(host.tiers["v41"].cache._readers) == readers - 1
    assert host.server.stats()["ended_closed"] == 1


def test_a_stopped_client_keeps_its_lease(host):
    client = process(ATTACHED, host.told())
    assert client.stdout.readline() == "attached\n"
    client.send_signal(signal.SIGSTOP)
    other = host.attach()
    other.close()
    until(lambda: host.leases == 1)
    client.send_signal(signal.SIGCONT)
    assert host.leases == 1
    client.communicate()


FORK = (
    ATTACH
    + """
import os
from engram.errors import UnavailableError

def refused(call):
    try:
        call()
    except UnavailableError as error:
        return "does not survive a fork" in str(error)

lease = attach()
child = os.fork()
if not child:
    facts = [not lease.alive, refused(lambda: lease.view), refused(lease.direct)]
    lease.close()
    again = attach()
    facts += [again.alive, again.view is not None, again.direct() is not None]
    again.close()
    del lease, again
    # From here on the child holds nothing of its parent's.
    os.write(1, bytes(facts))
    sys.stdin.read()
    os._exit(0)
assert lease.alive and lease.view is not None
os.write(1, b"\\x02")
sys.stdin.read()
"""
)


def test_a_fork_loses_the_lease_and_the_parent_keeps_it(host):
    client = process(FORK, host.told())
    facts = b""
    while len(facts) < 7:
        facts += os.read(client.stdout.fileno(), 7) or pytest.fail("the client died")
    assert sorted(facts) == 6 * [1] + [2]
    assert host.leases == 1
    client.kill()  # the child lives on, and must not keep the lease
    client.wait()
    until(lambda: host.leases == 0)
    client.stdin.close()
    client.stdout.close()
