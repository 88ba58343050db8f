"""The sidecar's side of Fetch and Prefetch over plain gRPC: what it writes, what it refuses."""

from __future__ import annotations

import logging
from queue import SimpleQueue
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from attaching import until
from conftest import small_v41
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engram
from engram._wire import pack_ngrams
from engram.errors import OverloadError
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramStub
from engram.ram.attach import Lease
from engram.ram.direct import lay_out_twin
from engram.ram.layout import BundleLayout
from engram.ram.staged import Staged
from engram.ram.tier import ram_tiers
from engram.rows import Rows
from engram.service import _prefetch
from engram.service._prefetch import Prefetches
from engram.service._traffic import Traffic
from engram.service.attach import AttachServer
from engram.service.config import Limits
from engram.service.server import Server
from engram.service.sockets import parse_address
from engram.ssd import SsdTier
from engram.tiers import Ngrams, Prefetch, Selection

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory, v41_table):
    """A server in this process, to look inside."""
    path = tmp_path_factory.mktemp("run") / "s.sock"
    ssd = SsdTier(v41_table)
    tiers = ram_tiers({"v41": ssd}, 200_000, shared=True)
    attach = AttachServer([path], tiers, {"v41": ssd.files})
    boot_id = tiers["v41"].cache.boot_id.hex()
    address = parse_address(f"unix:{path}")
    server = Server(tiers, (address,), Limits(streams=2), leases=attach.lease, boot_id=boot_id)
    server.start()
    attach.start()
    yield SimpleNamespace(
        path=path, address=str(address), tier=tiers["v41"], server=server, ssd=ssd
    )
    attach.stop()
    server.stop()
    tiers["v41"].check_integrity()
    tiers["v41"].close()


@pytest.fixture
def lease(served):
    bundle = BundleLayout.of(served.tier.spec, served.tier.row_format)
    held = Lease.open(served.path, "v41", served.tier.fingerprint, bundle, 2, TIMEOUT_S)
    yield held
    held.close()


@pytest.fixture
def stub(served):
    with grpc.insecure_channel(served.address) as channel:
        yield EngramStub(channel)


def some_ngrams(count, seed=0):
    rng = np.random.default_rng(seed)
    orders = rng.integers(2, 5, count).astype(np.int32)
    windows = rng.integers(0, 450, (count, 4), dtype=np.int32)
    windows[:, 0] = np.arange(count) % 450
    windows[np.arange(4) >= orders[:, None]] = -1
    return Ngrams(windows, orders)


def request_of(lease, asked=None, **changes):
    told = {
        "request_id": 7,
        "token": lease.token,
        "chunk": 1,
        "ngrams": pack_ngrams(some_ngrams(5) if asked is None else asked),
        "timeout_ms": 1000 * TIMEOUT_S,
    }
    return pb.FetchRequest(**(told | changes))


@pytest.mark.parametrize("count", [0, 1, 100])
def test_bundles_are_written_where_they_were_asked_for(served, stub, lease, count):
    ngrams = some_ngrams(count, seed=count)
    for chunk in (0, lease.chunks - 1):
        asked = request_of(lease, ngrams, chunk=chunk, request_id=chunk + 1)
        (reply,) = stub.Fetch(iter([asked]), timeout=TIMEOUT_S)
        assert reply.request_id == chunk + 1
        assert reply.boot_id == lease.boot_id
        assert not reply.HasField("error")
        assert not reply.failed
        stride = lease.bundle.staged_bytes
        address = lease.staging.address + chunk * lease.entries_per_chunk * stride
        staged = Staged(ngrams, lease.table_number, lease.bundle, address, chunk + 1)
        assert staged.whole()
        offsets = staged.bundles - lease.staging.address
        found = [lease.staging.bytes()[at:][: lease.bundle.slot_bytes] for at in offsets]
        selection = Selection.of(served.tier.spec)
        rows = Rows.empty((ngrams.row_count(selection),), served.tier.row_format)
        served.ssd.read(ngrams, selection, rows, np.arange(len(rows.values), dtype=np.int64))
        wanted = lay_out_twin(lease.bundle, selection, ngrams, rows)
        assert np.array_equal(np.array(found, np.uint8).reshape(wanted.shape), wanted)


REFUSED = {
    "no id": ({"request_id": 0}, "no request_id or no timeout"),
    "no timeout": ({"timeout_ms": 0}, "no request_id or no timeout"),
    "chunk": ({"chunk": 16}, "staging chunk 16 does not exist; the lease has 4"),
    "far chunk": ({"chunk": 2**32 - 1}, "staging chunk 4294967295 does not exist"),
    "order": ({"ngrams": pb.Ngrams(orders=b"\x05", ids=bytes(20))}, "orders must be 2 to 4"),
    "id": ({"ngrams": pb.Ngrams(orders=b"\x02", ids=b"\xff" * 8)}, "canonical ids, 0 to 449"),
    "ids": ({"ngrams": pb.Ngrams(orders=b"\x02", ids=bytes(12))}, "need 8 bytes of ids, not 12"),
    "many": ({"ngrams": pb.Ngrams(orders=b"\x02" * 600, ids=bytes(4800))}, "do not fit a chunk"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_lease_is_refused_before_anything_is_written(stub, lease, name):
    changes, message = REFUSED[name]
    before = lease.staging.bytes().copy()
    good = request_of(lease, some_ngrams(0))
    refused, taken = stub.Fetch(iter([request_of(lease, **changes), good]), timeout=TIMEOUT_S)
    if refused.request_id == good.request_id:
        refused, taken = sorted((refused, taken), key=lambda reply: not reply.HasField("error"))
    assert refused.error.code == pb.ERROR_CODE_BAD_REQUEST
    assert message in refused.error.message
    assert "\n" not in refused.error.message
    assert not taken.HasField("error")
    assert np.array_equal(lease.staging.bytes(), before)


def test_an_ngram_named_twice_does_no_harm(served, stub, lease):
    twice = some_ngrams(6, seed=99).take(np.array([0, 1, 0, 5, 5, 5, 1]))
    for _ in range(3):
        (reply,) = stub.Fetch(iter([request_of(lease, twice)]), timeout=TIMEOUT_S)
        assert not reply.HasField("error")
        served.tier.check_integrity()
    told = {"request_id": 1, "table": "v41", "fingerprint": served.tier.fingerprint}
    asked = pb.PrefetchRequest(ngrams=pack_ngrams(some_ngrams(9, seed=98).take(np.arange(18) // 2)))
    asked.MergeFrom(pb.PrefetchRequest(**told))
    (reply,) = stub.Prefetch(iter([asked]), timeout=TIMEOUT_S)
    assert not reply.HasField("error")
    until(lambda: served.tier.misses.counters.read()["prefetched_read"])
    served.tier.cache.check_integrity()


def test_without_a_lease_nothing_is_fetched(stub, lease):
    for token in (b"", b"x" * 16, lease.token[:-1], lease.token * 2):
        (reply,) = stub.Fetch(iter([request_of(lease, token=token)]), timeout=TIMEOUT_S)
        assert reply.error.code == pb.ERROR_CODE_UNAVAILABLE
        assert "attach again" in reply.error.message
    lease.close()

    def ended():
        (reply,) = stub.Fetch(iter([request_of(lease)]), timeout=TIMEOUT_S)
        return reply.error.code == pb.ERROR_CODE_UNAVAILABLE

    until(ended)


@given(data=st.data())
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutated_fetches_get_one_reply_each_or_end_the_call(stub, lease, data):
    whole = bytearray(request_of(lease).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    raw = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        request = pb.FetchRequest.FromString(raw)
    except Exception:
        return
    (reply,) = stub.Fetch(iter([request]), timeout=TIMEOUT_S)
    assert reply.request_id == request.request_id


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OverloadError("the device cannot keep up"), pb.ERROR_CODE_OVERLOADED, "cannot keep up"),
        (KeyError("secret"), pb.ERROR_CODE_INTERNAL, "its log says more"),
    ],
)
def test_failures_of_the_miss_path_are_told(
    served, stub, lease, monkeypatch, caplog, error, code, message
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(served.tier.misses, "read", fail)
    with caplog.at_level(logging.ERROR):
        (reply,) = stub.Fetch(iter([request_of(lease)]), timeout=TIMEOUT_S)
    assert reply.error.code == code
    assert message in reply.error.message
    assert "secret" not in reply.error.message
    assert bool(caplog.records) == isinstance(error, KeyError)


def test_damaged_rows_are_told_and_the_bundles_written(served, stub, lease, monkeypatch):
    def read(ngrams, target, *, request_id, timeout_s):
        failures = real(ngrams, target, request_id=request_id, timeout_s=timeout_s)
        failures.add({14: [3, 4]}, "by design")
        return failures

    real = served.tier.misses.read
    monkeypatch.setattr(served.tier.misses, "read", read)
    (reply,) = stub.Fetch(iter([request_of(lease)]), timeout=TIMEOUT_S)
    (failed,) = reply.failed
    assert (failed.layer, list(failed.row_ids), failed.cause) == (14, [3, 4], "by design")


def test_streams_of_each_kind_are_bounded(stub):
    for call in (stub.Fetch, stub.Prefetch, stub.Lookup):
        silent: SimpleQueue = SimpleQueue()
        held = [call(iter(silent.get, None)) for _ in range(2)]
        for each in held:
            each.initial_metadata()
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(()), timeout=TIMEOUT_S))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for each in held:
            each.cancel()
            silent.put(None)


def test_a_draining_server_says_so_on_every_stream(tmp_path, v41_table):
    tiers = ram_tiers({"v41": SsdTier(v41_table)}, 0, shared=True)
    address = parse_address(f"unix:{tmp_path}/s.sock")
    server = Server(tiers, (address,), leases=lambda token: None)
    server.start()
    with grpc.insecure_channel(str(address)) as channel:
        stub = EngramStub(channel)
        silent: SimpleQueue = SimpleQueue()
        calls = [each(iter(silent.get, None)) for each in (stub.Fetch, stub.Prefetch, stub.Lookup)]
        for call in calls:
            call.initial_metadata()
        server.servicer.drain()
        assert [next(call).draining for call in calls] == [True] * 3
        for _ in calls:
            silent.put(None)
        assert [list(call) for call in calls] == [[]] * 3
    server.stop()
    tiers["v41"].close()


def test_without_attach_server_nobody_can_attach(tmp_path, v41_table):
    ssd = SsdTier(v41_table)
    address = parse_address(f"unix:{tmp_path}/s.sock")
    server = Server({"v41": ssd}, (address,))
    server.start()
    with engram.connect(str(address)) as table:
        assert table.stats()["tiers"][0]["tier"] == "remote"
        assert table.lookup([1, 2]).shape == (2, 2, 24)
    server.stop()
    ssd.close()


class HandleTier:
    """Keeps the handles of its prefetches."""

    def __init__(self):
        self.spec = small_v41()
        self.handles = []

    def prefetch(self, ngrams):
        self.handles.append(Prefetch())
        return self.handles[-1]


@pytest.fixture
def prefetches():
    tier = HandleTier()
    return Prefetches("boot", lambda name, fingerprint: tier, 10**6, Traffic([""])), tier.handles


def _ask(prefetches, request_id, **what):
    if not what:
        what = {"ngrams": pack_ngrams(some_ngrams(2))}
    (reply,) = prefetches.answer(pb.PrefetchRequest(request_id=request_id, **what))
    assert reply.request_id == request_id
    return reply


def test_a_prefetch_is_cancelled_by_its_id(prefetches):
    prefetches, handles = prefetches
    for request_id in (1, 2, 3):
        assert not _ask(prefetches, request_id).HasField("error")
    for request_id, cancel in ((4, 2), (5, 2), (6, 77)):
        assert not _ask(prefetches, request_id, cancel=cancel).HasField("error")
    assert [handle.cancelled for handle in handles] == [False, True, False]


def test_prefetches_end_with_their_stream(prefetches):
    prefetches, handles = prefetches
    _ask(prefetches, 1)
    _ask(prefetches, 2)
    prefetches.cancel_all()
    assert [handle.cancelled for handle in handles] == [True, True]
    assert _ask(prefetches, 3).error.code == pb.ERROR_CODE_UNAVAILABLE
    assert handles[2].cancelled


def test_only_so_many_prefetches_are_remembered(prefetches, monkeypatch):
    monkeypatch.setattr(_prefetch, "HANDLES_MAX", 3)
    prefetches, handles = prefetches
    for request_id in range(1, 6):
        _ask(prefetches, request_id)
    for request_id in range(1, 6):
        _ask(prefetches, 10 + request_id, cancel=request_id)
    assert [handle.cancelled for handle in handles] == [False, False, True, True, True]
