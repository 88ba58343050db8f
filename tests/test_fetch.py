"""Misses fetched into staging memory: nothing that is not the answer is ever handed out."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
from attaching import until
from conftest import small_v41
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import BUNDLE, TABLE, FakeSidecar, bundle_byte, lease_of, write_entry

from engram._stream import RequestStream, StreamLostError
from engram.errors import OverloadError, ServiceError, StoreError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb
from engram.ram.direct import fetch_directly, lay_out, lay_out_twin
from engram.ram.fetch import Fetcher
from engram.ram.layout import STAGED_HEAD_BYTES, BundleLayout
from engram.ram.staged import Staged, check_entries_twin
from engram.rows import RowFormat, Rows
from engram.ssd import SsdTier
from engram.store.reader import StoreReader
from engram.tiers import Ngrams, Selection

SECONDS_MAX = 20


def some_ngrams(count, seed=0):
    """Distinct n-grams of orders 2 to 4."""
    rng = np.random.default_rng(seed)
    orders = rng.integers(2, 5, count).astype(np.int32)
    windows = rng.integers(0, 1000, (count, 4), dtype=np.int32)
    windows[:, 0] = np.arange(count)
    windows[np.arange(4) >= orders[:, None]] = -1
    return Ngrams(windows, orders)


def bytes_at(address, count):
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(int(address)))


class Delivered:
    """Collects what is delivered, as the byte that stands in each bundle."""

    def __init__(self, count):
        self.found = [None] * count

    def __call__(self, first, addresses):
        for n, address in enumerate(addresses):
            assert self.found[first + n] is None
            bundle = bytes_at(address, BUNDLE.slot_bytes)
            assert (bundle == bundle[0]).all()
            self.found[first + n] = int(bundle[0])


def expected_of(ngrams):
    return [bundle_byte(w, int(o)) for w, o in zip(ngrams.windows, ngrams.orders, strict=True)]


@pytest.fixture
def lease():
    return lease_of()


@pytest.fixture
def sidecar(lease):
    return FakeSidecar(lease)


@pytest.fixture
def fetcher(lease, sidecar):
    stream = RequestStream(sidecar, "fake", SECONDS_MAX, lambda: None)
    yield Fetcher(lease, stream)
    stream.close()


def free_chunks(fetcher):
    return fetcher._free.qsize()


@pytest.mark.parametrize("count", [1, 4, 5, 12, 13, 60])
def test_every_ngram_is_delivered_once_from_its_own_entry(fetcher, sidecar, lease, count):
    ngrams, delivered = some_ngrams(count), Delivered(count)
    failures = fetcher.fetch(ngrams, delivered, SECONDS_MAX)
    assert not failures
    assert delivered.found == expected_of(ngrams)
    assert len(sidecar.asked) == -(-count // 4)
    assert {request.token for request in sidecar.asked} == {lease.token}
    assert all(0 < request.timeout_ms <= 1000 * SECONDS_MAX for request in sidecar.asked)
    assert free_chunks(fetcher) == lease.chunks


def test_threads_share_the_chunks(fetcher, lease):
    wrong = []

    def work(seed):
        for turn in range(10):
            ngrams = some_ngrams(1 + 7 * seed % 20, seed=100 * seed + turn)
            delivered = Delivered(len(ngrams))
            fetcher.fetch(ngrams, delivered, SECONDS_MAX)
            if delivered.found != expected_of(ngrams):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert free_chunks(fetcher) == lease.chunks


def _other_request(entry, request, index):
    entry[:8].view(np.uint64)[0] += 1


def _odd(entry, request, index):
    entry[STAGED_HEAD_BYTES:][:8].view(np.uint64)[0] += 1


def _other_table(entry, request, index):
    entry[STAGED_HEAD_BYTES + 8] += 1


def _other_order(entry, request, index):
    entry[STAGED_HEAD_BYTES + 12] ^= 1


def _other_id(entry, request, index):
    entry[STAGED_HEAD_BYTES + 16 + 4] ^= 0x80


@pytest.mark.parametrize("spoil", [_other_request, _odd, _other_table, _other_order, _other_id])
@pytest.mark.parametrize("index", [0, 3])
def test_an_entry_that_is_no_answer_is_never_handed_out(fetcher, sidecar, lease, spoil, index):
    def spoil_one(entry, request, n):
        if n == index:
            spoil(entry, request, n)

    sidecar.spoil = spoil_one
    delivered = Delivered(4)
    with pytest.raises(ServiceError, match="other n-grams than it was asked for"):
        fetcher.fetch(some_ngrams(4), delivered, SECONDS_MAX)
    assert delivered.found == [None] * 4
    assert free_chunks(fetcher) == lease.chunks


@pytest.mark.parametrize("word", [0, STAGED_HEAD_BYTES // 8])
def test_an_entry_written_while_it_is_copied_is_an_error(fetcher, lease, word):
    def deliver(first, addresses):
        lease.staging.bytes().view(np.uint64)[word] += 2

    with pytest.raises(ServiceError, match="other n-grams"):
        fetcher.fetch(some_ngrams(3), deliver, SECONDS_MAX)


def test_a_chunk_is_not_used_again_before_its_late_reply(fetcher, sidecar, lease):
    held = []
    sidecar.reply_of = held.append
    with pytest.raises(UnavailableError, match="did not answer in time"):
        fetcher.fetch(some_ngrams(3), Delivered(3), 0.05)
    assert fetcher.stalled
    assert free_chunks(fetcher) == lease.chunks - 1
    late = held[0]
    sidecar.reply_of = lambda request: pb.FetchResponse(request_id=request.request_id)
    for turn in range(4):
        ngrams = some_ngrams(9, seed=turn)
        delivered = Delivered(9)
        fetcher.fetch(ngrams, delivered, SECONDS_MAX)
        assert delivered.found == expected_of(ngrams)
    assert late.chunk not in {request.chunk for request in sidecar.asked[1:]}
    sidecar.replies.put(pb.FetchResponse(request_id=late.request_id))
    until(lambda: not fetcher.stalled)
    assert free_chunks(fetcher) == lease.chunks


def test_with_all_chunks_waiting_for_late_replies_a_fetch_is_refused(fetcher, sidecar):
    sidecar.reply_of = lambda request: None
    with pytest.raises(UnavailableError):
        fetcher.fetch(some_ngrams(12), Delivered(12), 0.05)
    # What it answers late, others may have to serve: this is no overload.
    with pytest.raises(UnavailableError, match="holds all staging memory of this client"):
        fetcher.fetch(some_ngrams(1), Delivered(1), 0.05)


def test_a_refusal_is_raised_and_frees_the_chunk(fetcher, sidecar, lease):
    def refuse(request):
        error = pb.Error(code=pb.ERROR_CODE_OVERLOADED, message="too much waits; try again")
        return pb.FetchResponse(request_id=request.request_id, error=error)

    sidecar.reply_of = refuse
    with pytest.raises(OverloadError, match="too much waits"):
        fetcher.fetch(some_ngrams(9), Delivered(9), SECONDS_MAX)
    until(lambda: free_chunks(fetcher) == lease.chunks)
    assert not fetcher.stalled


def test_failed_rows_are_told_and_the_rest_delivered(fetcher, sidecar):
    def failing(request):
        failed = pb.FailedRows(layer=7, row_ids=[request.request_id], cause="by design")
        return pb.FetchResponse(request_id=request.request_id, failed=[failed])

    sidecar.reply_of = failing
    ngrams, delivered = some_ngrams(9), Delivered(9)
    failures = fetcher.fetch(ngrams, delivered, SECONDS_MAX)
    assert failures.rows == {7: [1, 2, 3]}
    assert failures.cause == "by design"
    assert delivered.found == expected_of(ngrams)


def test_a_stream_that_ends_ends_the_fetch(fetcher, sidecar):
    def end(request):
        sidecar.replies.put(None)

    sidecar.reply_of = end
    with pytest.raises(StreamLostError):
        fetcher.fetch(some_ngrams(9), Delivered(9), SECONDS_MAX)


def test_an_error_of_the_receiver_frees_the_chunks(fetcher, lease):
    def deliver(first, addresses):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        fetcher.fetch(some_ngrams(40), deliver, SECONDS_MAX)
    until(lambda: free_chunks(fetcher) == lease.chunks)


MUTATIONS = {
    "none": {},
    "id": {"request_id": 6},
    "odd": {"sequence": 3},
    "table": {"table": 4},
}


@given(
    st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(0, BUNDLE.staged_bytes - 1),
    st.integers(0, 255),
)
@settings(deadline=None)
def test_entries_are_judged_like_the_twin(kinds, at, byte, value):
    ngrams = some_ngrams(len(kinds))
    lease = lease_of(1, len(kinds))
    memory = lease.staging.bytes()
    for n, kind in enumerate(kinds):
        entry = memory[n * BUNDLE.staged_bytes :][: BUNDLE.staged_bytes]
        told = {"request_id": 5} | MUTATIONS[kind]
        write_entry(entry, told.pop("request_id"), ngrams.windows[n], int(ngrams.orders[n]), **told)
    memory[at % len(kinds) * BUNDLE.staged_bytes + byte] = value
    staged = Staged(ngrams, TABLE, BUNDLE, lease.staging.address, 5)
    entries = memory[: len(kinds) * BUNDLE.staged_bytes]
    first_bad = check_entries_twin(ngrams, TABLE, entries, BUNDLE.staged_bytes, 5)
    assert staged.whole() == (first_bad < 0)
    if first_bad < 0:
        assert staged.unchanged()


@st.composite
def laid_out(draw):
    spec = small_v41()
    columns = draw(st.lists(st.integers(0, 23), min_size=1, unique=True, max_size=24))
    layers = draw(st.permutations(spec.layer_ids))[: draw(st.integers(1, 2))]
    return Selection.of(spec, layers, columns), some_ngrams(draw(st.integers(0, 9)))


@given(laid_out(), st.sampled_from(["bf16", "fp8-ue8m0"]))
@settings(deadline=None)
def test_rows_are_laid_out_like_the_twin(asked, name):
    selection, ngrams = asked
    spec = small_v41()
    row_format = RowFormat(name, spec.dim)
    bundle = BundleLayout.of(spec, row_format)
    rows = Rows.empty((ngrams.row_count(selection),), row_format)
    rng = np.random.default_rng(0)
    rows.values[:] = rng.integers(1, 256, rows.values.shape)
    scales = np.empty((0, 0), np.uint8)
    if rows.scales is not None:
        rows.scales[:] = rng.integers(1, 256, rows.scales.shape)
        scales = rows.scales
    found = np.zeros((len(ngrams), bundle.slot_bytes), np.uint8)
    lay_out(
        ngrams.orders - np.int32(selection.min_order),
        selection.layer_array,
        selection.column_array % selection.heads,
        selection.ordered,
        selection.order_bounds,
        rows.values,
        scales,
        bundle.heads,
        bundle.layer_bytes,
        bundle.value_bytes,
        bundle.scale_bytes,
        found.ctypes.data,
        bundle.slot_bytes,
    )
    assert np.array_equal(found, lay_out_twin(bundle, selection, ngrams, rows))


def test_direct_bundles_are_the_tables(v41_table):
    spec = small_v41()
    ngrams = some_ngrams(600)
    ngrams.windows[:] = np.where(ngrams.windows < 0, -1, ngrams.windows % 450)
    selection = Selection.of(spec)
    ssd = SsdTier(v41_table)
    rows = Rows.empty((ngrams.row_count(selection),), ssd.row_format)
    ssd.read(ngrams, selection, rows, np.arange(len(rows.values), dtype=np.int64))
    bundle = BundleLayout.of(spec, ssd.row_format)
    expected = lay_out_twin(bundle, selection, ngrams, rows)
    found = np.zeros_like(expected)

    def deliver(first, addresses):
        for n, address in enumerate(addresses):
            found[first + n] = bytes_at(address, bundle.slot_bytes)

    reader = StoreReader(v41_table, guard=False)
    assert not fetch_directly(reader, spec, bundle, ngrams, selection, deliver)
    assert np.array_equal(found, expected)
    reader.close()
    with pytest.raises(StoreError):
        fetch_directly(reader, spec, bundle, ngrams, selection, deliver)
    ssd.close()
