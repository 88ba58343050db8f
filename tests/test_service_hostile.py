"""Malformed, oversized and forged messages: refused one by one, and nobody else notices."""

from __future__ import annotations

import socket
import struct
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sidecars import Sidecar, model_tier

import engram
from engram.errors import RequestError
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramStub
from engram.remote import RemoteTier
from engram.rows import Rows
from engram.table import Table

FINGERPRINT = f"{1:032x}"
TOKENS = np.arange(30)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "s.sock"
    with Sidecar(place, {"model": {}}, request_rows=2000, request_bytes=1 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def stub(sidecar):
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(sidecar.address, options=options) as channel:
        yield EngramStub(channel)


@pytest.fixture(autouse=True)
def _the_sidecar_still_serves(sidecar):
    yield
    assert sidecar.process.poll() is None
    with engram.connect(sidecar.address) as table:
        assert np.array_equal(
            table.lookup(TOKENS).values, Table(model_tier()).lookup(TOKENS).values
        )


def _int32(*ids):
    return struct.pack(f"<{len(ids)}i", *ids)


def _int64(*ids):
    return struct.pack(f"<{len(ids)}q", *ids)


def _ngrams(orders=(2, 3), ids=(5, 6, 7, 8, 9), layers=(0, 1), columns=(0, 8), **changes):
    lookup = pb.NgramLookup(
        ngrams=pb.Ngrams(orders=bytes(orders), ids=_int32(*ids)), layers=layers, columns=columns
    )
    return _request(ngrams=lookup, **changes)


def _rows(row_ids=b"", layer=0, **changes):
    return _request(rows=pb.RowLookup(layer=layer, row_ids=row_ids), **changes)


def _request(**changes):
    fields = {"request_id": 1, "table": "model", "fingerprint": FINGERPRINT}
    return pb.LookupRequest(**(fields | changes))


BAD = {
    "no request id": (_ngrams(request_id=0), "BAD_REQUEST", "request_id"),
    "nothing asked": (_request(), "BAD_REQUEST", "neither"),
    "unknown table": (_ngrams(table="other"), "UNKNOWN_TABLE", "no table 'other'"),
    "long name": (_ngrams(table="x" * 5000), "UNKNOWN_TABLE", "no table"),
    "no fingerprint": (_ngrams(fingerprint=""), "OTHER_TABLE", "fingerprint"),
    "other fingerprint": (_ngrams(fingerprint="f" * 32), "OTHER_TABLE", "fingerprint"),
    "order 0": (_ngrams(orders=(0, 3), ids=(1, 2, 3)), "BAD_REQUEST", "orders"),
    "order 1": (_ngrams(orders=(1,), ids=(1,)), "BAD_REQUEST", "orders"),
    "order 4": (_ngrams(orders=(4,), ids=(1, 2, 3, 4)), "BAD_REQUEST", "orders"),
    "order 255": (_ngrams(orders=(255,)), "BAD_REQUEST", "orders"),
    "too few ids": (_ngrams(ids=(1, 2, 3, 4)), "BAD_REQUEST", "bytes of ids"),
    "too many ids": (_ngrams(ids=(1, 2, 3, 4, 5, 6)), "BAD_REQUEST", "bytes of ids"),
    "ids without orders": (_ngrams(orders=()), "BAD_REQUEST", "bytes of ids"),
    "negative id": (_ngrams(ids=(1, 2, 3, 4, -1)), "BAD_REQUEST", "0 to 511"),
    "id beyond the vocabulary": (_ngrams(ids=(1, 2, 3, 4, 512)), "BAD_REQUEST", "0 to 511"),
    "no layer": (_ngrams(layers=()), "BAD_REQUEST", "layers"),
    "layer 2": (_ngrams(layers=(0, 2)), "BAD_REQUEST", "layers"),
    "layer 2**32 - 1": (_ngrams(layers=(2**32 - 1,)), "BAD_REQUEST", "layers"),
    "a layer twice": (_ngrams(layers=(1, 1)), "BAD_REQUEST", "layers"),
    "a million layers": (_ngrams(layers=[0] * 100_000), "BAD_REQUEST", "layers"),
    "no column": (_ngrams(columns=()), "BAD_REQUEST", "columns"),
    "column 16": (_ngrams(columns=(16,)), "BAD_REQUEST", "columns"),
    "a column twice": (_ngrams(columns=(3, 3)), "BAD_REQUEST", "columns"),
    "too many rows of n-grams": (
        _ngrams(orders=[2] * 2001, ids=[1] * 4002, layers=(0,), columns=(0,)),
        "BAD_REQUEST",
        "2001 rows, but at most 2000",
    ),
    "rows: layer 2": (_rows(_int64(1), layer=2), "BAD_REQUEST", "layers"),
    "rows: no whole number": (_rows(b"1234567"), "BAD_REQUEST", "8 bytes"),
    "rows: negative": (_rows(_int64(0, -1)), "BAD_REQUEST", "row ids"),
    "rows: beyond the layer": (_rows(_int64(2**62)), "BAD_REQUEST", "row ids"),
    "rows: too many": (_rows(_int64(*[1] * 2001)), "BAD_REQUEST", "at most 2000"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_answered_and_the_stream_lives_on(stub, what):
    request, code, word = BAD[what]
    good = _ngrams(request_id=7)
    replies = list(stub.Lookup(iter([request, good]), timeout=20))
    (bad,) = [reply for reply in replies if reply.request_id == request.request_id]
    assert pb.ErrorCode.Name(bad.error.code) == f"ERROR_CODE_{code}"
    assert word in bad.error.message
    assert "\n" not in bad.error.message
    assert len(bad.error.message) < 400
    assert bad.last
    assert not bad.values
    (answer,) = [reply for reply in replies if reply.request_id == 7]
    assert answer.last
    assert answer.rows == 4
    assert not answer.HasField("error")


def test_the_order_of_rows_is_the_canonical_one(stub):
    """By n-gram, then layer as listed, then column as listed."""
    request = _ngrams(layers=(1, 0), columns=(9, 2, 8, 0))
    (reply,) = stub.Lookup(iter([request]), timeout=20)
    tier = model_tier()
    windows = np.array([[5, 6, 0], [7, 8, 9]], np.int32)
    ids = tier.spec.hash_windows(windows)
    wanted = [(0, position, column) for position in (1, 0) for column in (2, 0)]
    wanted += [(1, position, column) for position in (1, 0) for column in (9, 8)]
    table = Table(tier)
    expected = [
        table.lookup_rows(table.layers[position], ids[at, position, column]).values.tobytes()
        for at, position, column in wanted
    ]
    assert reply.values == b"".join(expected)


def test_columns_of_another_order_have_no_rows(stub):
    (reply,) = stub.Lookup(iter([_ngrams(orders=(2,), ids=(1, 2), columns=(8,))]), timeout=20)
    assert reply.last
    assert reply.rows == 0
    assert not reply.HasField("error")


def test_a_message_over_the_limit_ends_its_stream_only(stub):
    other: SimpleQueue = SimpleQueue()
    bystander = stub.Lookup(iter(other.get, None))
    bystander.initial_metadata()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Lookup(iter([_rows(bytes(2 << 20))]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    other.put(_ngrams())
    assert next(bystander).rows == 4
    other.put(None)


def test_a_client_over_the_limit_learns_what_to_do_and_can_go_on(sidecar, monkeypatch):
    tier = RemoteTier(sidecar.address)
    ids = np.zeros(200_000, np.int64)
    out = Rows.empty((1,), tier.row_format)
    with monkeypatch.context() as patched:
        patched.setattr("engram.remote.items_per_request", lambda *unused: len(ids))
        with pytest.raises(RequestError, match="ask for fewer rows at once"):
            tier.read_rows(0, ids, out, np.zeros_like(ids))
    tier.read_rows(0, ids[:1], out, ids[:1])
    assert np.array_equal(
        out.values, Table(model_tier()).lookup_rows(tier.spec.layer_ids[0], [0]).values
    )
    tier.close()


@pytest.mark.parametrize(
    ("call", "request_of", "status"),
    [
        ("GetTable", lambda: pb.GetTableRequest(name="other"), "NOT_FOUND"),
        ("GetTable", lambda: pb.GetTableRequest(name="../../etc"), "NOT_FOUND"),
    ],
)
def test_unary_calls_end_with_a_status_and_one_line(stub, call, request_of, status):
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, call)(request_of(), timeout=20)
    assert caught.value.code().name == status
    assert "\n" not in caught.value.details()
    assert "engram-error-code" in dict(caught.value.trailing_metadata())


def test_bytes_that_are_no_message_end_the_call(sidecar):
    garbage, too_long, no_text = b"\xff" * 40, b"\x12\xff\xff\xff\xff\x0f", b"\x12\x02\xc3\x28"
    calls = [(call, raw) for call in ("Lookup", "Fetch", "Prefetch") for raw in (garbage, too_long)]
    with grpc.insecure_channel(sidecar.address) as channel:
        for call, raw in [*calls, ("Lookup", no_text), ("Prefetch", no_text)]:
            stream = channel.stream_stream(f"/engram.v1.Engram/{call}")
            with pytest.raises(grpc.RpcError):
                list(stream(iter([raw]), timeout=20))
        for raw in (garbage, too_long):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary("/engram.v1.Engram/GetTable")(raw, timeout=20)


@pytest.mark.parametrize(
    "raw", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 400, b""]
)
def test_bytes_that_are_no_frames_end_the_connection(sidecar, raw):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(sidecar.socket))
        client.sendall(raw)


def test_silent_connections_hold_up_nobody(sidecar):
    silent = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for client in silent:
        client.connect(str(sidecar.socket))
    with engram.connect(sidecar.address, timeout_s=10) as table:
        table.lookup([1, 2])
    for client in silent:
        client.close()


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_mutated_requests_get_one_final_reply_each_or_end_the_call(stub, data):
    whole = bytearray(
        data.draw(st.sampled_from([_ngrams(), _rows(_int64(3, 4))])).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    raw = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        request = pb.LookupRequest.FromString(raw)
    except Exception:
        return
    replies = list(stub.Lookup(iter([request]), timeout=20))
    assert [reply.last for reply in replies] == [True]
    assert replies[0].request_id == request.request_id


def test_open_reflection_streams_leave_room_for_others(sidecar):
    with grpc.insecure_channel(sidecar.address) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        held = SimpleQueue()
        calls = [ask(iter(held.get, None)) for _ in range(100)]
        with engram.connect(sidecar.address, timeout_s=10) as table:
            assert table.lookup(TOKENS).shape == (30, 2, 16)
        refused = [call for call in calls if call.done()]
        assert refused
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in calls:
            call.cancel()


def _prefetch(**changes):
    told = {"request_id": 1, "table": "model", "fingerprint": FINGERPRINT} | changes
    return pb.PrefetchRequest(**told)


@pytest.mark.parametrize(
    ("request_of", "code"),
    [
        (lambda: _prefetch(table="other"), pb.ERROR_CODE_UNKNOWN_TABLE),
        (lambda: _prefetch(fingerprint="0"), pb.ERROR_CODE_OTHER_TABLE),
        (lambda: _prefetch(request_id=0), pb.ERROR_CODE_BAD_REQUEST),
        (lambda: _prefetch(ngrams=pb.Ngrams(orders=b"\x09")), pb.ERROR_CODE_BAD_REQUEST),
    ],
)
def test_a_prefetch_that_is_refused_leaves_the_stream_usable(stub, request_of, code):
    good = _prefetch(request_id=2, ngrams=pb.Ngrams(orders=b"\x02", ids=_int32(1, 2)))
    refused, taken = stub.Prefetch(iter([request_of(), good]), timeout=20)
    assert refused.error.code == code
    assert "\n" not in refused.error.message
    assert not taken.HasField("error")
    assert taken.request_id == 2


def test_a_prefetch_of_too_many_rows_is_refused(stub):
    count = 2000 // 16 + 1
    ngrams = pb.Ngrams(orders=bytes([2]) * count, ids=_int32(*range(2 * count)))
    (reply,) = stub.Prefetch(iter([_prefetch(ngrams=ngrams)]), timeout=20)
    assert reply.error.code == pb.ERROR_CODE_BAD_REQUEST
    assert "2000" in reply.error.message
