"""What crosses the wire: n-grams, row ids and rows packed and unpacked, errors both ways."""

from __future__ import annotations

import inspect

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import _wire, errors
from engram._failures import Failures
from engram.errors import EngramError, RequestError
from engram.proto.v1 import engram_pb2 as pb
from engram.tiers import Ngrams


@st.composite
def ngrams(draw):
    orders = np.array(draw(st.lists(st.integers(2, 4), max_size=20)), np.int32)
    ids = draw(st.lists(st.integers(0, 99), min_size=4 * len(orders), max_size=4 * len(orders)))
    windows = np.array(ids, np.int32).reshape(-1, 4)
    windows[np.arange(4) >= orders[:, None]] = -1
    return Ngrams(windows, orders)


@given(ngrams())
def test_ngrams_survive_the_journey(sent):
    packed = _wire.pack_ngrams(sent)
    assert len(packed.ids) == 4 * int(sent.orders.sum())
    came = _wire.unpack_ngrams(pb.Ngrams.FromString(packed.SerializeToString()), 2, 4, 100)
    assert np.array_equal(came.windows, sent.windows)
    assert np.array_equal(came.orders, sent.orders)
    assert came.windows.dtype == came.orders.dtype == np.int32


@given(ngrams(), st.integers(1, 50))
def test_ids_beyond_the_vocabulary_are_refused(sent, vocab_size):
    packed = _wire.pack_ngrams(sent)
    if sent.windows.size and sent.windows.max() >= vocab_size:
        with pytest.raises(RequestError, match="canonical"):
            _wire.unpack_ngrams(packed, 2, 4, vocab_size)
    else:
        _wire.unpack_ngrams(packed, 2, 4, vocab_size)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_row_ids_survive_or_are_refused(ids):
    packed = np.array(ids, "<i8").tobytes()
    if all(0 <= row < 1000 for row in ids):
        assert _wire.unpack_row_ids(packed, 1000).tolist() == ids
    else:
        with pytest.raises(RequestError, match="0 to 999"):
            _wire.unpack_row_ids(packed, 1000)


@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_scatter_equals_its_twin(rows, width, seed):
    rng = np.random.default_rng(seed)
    chunk = rng.bytes(rows * width)
    places = rng.permutation(rows + 4)[:rows].astype(np.int64)
    found, expected = (np.full((rows + 4, width), 0xEE, np.uint8) for _ in range(2))
    _wire.scatter(chunk, places, found)
    _wire.scatter_twin(chunk, places, expected)
    assert np.array_equal(found, expected)


def test_failures_are_gathered_each_once():
    sent = Failures()
    sent.add({3: (5, 6)}, "damaged bytes")
    sent.add({3: (6, 7), 1: tuple(range(100))}, "I/O error")
    sent.add({3: (7,)}, "damaged bytes")
    sent.add({3: (7,)}, "")
    came = Failures()
    packed = [each.SerializeToString() for each in _wire.pack_failures(sent)]
    _wire.unpack_failures(map(pb.FailedRows.FromString, packed), came)
    for failures in (sent, came):
        assert failures.rows == {3: [5, 6, 7], 1: list(range(100))}
        assert failures.cause == "damaged bytes, I/O error"


def _service_errors():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in kinds if issubclass(kind, errors.ServiceError)]


@pytest.mark.parametrize("kind", _service_errors())
def test_errors_of_the_service_come_back_as_what_they_were(kind):
    fault = _wire.fault_of(kind("one line"))
    came = _wire.error_of(fault.code, "one line")
    assert type(came) is kind
    assert str(came) == "one line"


def test_codes_and_statuses_are_used_once():
    codes = [fault.code for fault in _wire.FAULTS]
    assert sorted(codes) == sorted(set(pb.ErrorCode.values()) - {pb.ERROR_CODE_UNSPECIFIED})
    assert len({fault.status for fault in _wire.FAULTS}) == len(codes)


def test_what_is_not_ours_is_internal():
    for error in (ZeroDivisionError(), EngramError("x"), errors.TokenError("x")):
        assert _wire.fault_of(error).status is grpc.StatusCode.INTERNAL
    assert _wire.fault_of(errors.CorruptTableError("x")).status is grpc.StatusCode.DATA_LOSS
    mismatch = _wire.error_of(pb.ERROR_CODE_OTHER_TABLE, "x")
    assert isinstance(mismatch, errors.SpecMismatchError)
    assert mismatch.field == "fingerprint"


class _Ended:
    def __init__(self, status, metadata=(), details="told so"):
        self.status, self.metadata, self.words = status, metadata, details

    def code(self):
        return self.status

    def details(self):
        return self.words

    def trailing_metadata(self):
        return self.metadata


@pytest.mark.parametrize("status", list(grpc.StatusCode))
def test_every_end_of_a_call_is_a_service_error_of_one_line(status):
    error = _wire.error_of_call(_Ended(status), "unix:/s")
    assert isinstance(error, errors.ServiceError)
    assert "unix:/s" in str(error)


def test_a_refusal_of_engrams_own_keeps_its_words():
    metadata = (("engram-error-code", str(int(pb.ERROR_CODE_UNKNOWN_TABLE))),)
    error = _wire.error_of_call(_Ended(grpc.StatusCode.NOT_FOUND, metadata), "unix:/s")
    assert type(error) is errors.UnknownTableError
    assert str(error) == "told so"


def test_a_message_too_large_is_a_bad_request_and_no_overload():
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    large = "Received message larger than max (1600150 vs. 1048576)"
    error = _wire.error_of_call(_Ended(status, details=large), "unix:/s")
    assert type(error) is RequestError
    assert "ask for fewer rows at once" in str(error)
    error = _wire.error_of_call(_Ended(status, details="Concurrent RPC limit exceeded!"), "unix:/s")
    assert type(error) is errors.OverloadError
