"""Traces: what is recorded is what was asked for; a file that lies is one line, never a crash."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
from conftest import small_qwen, small_v41
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.errors import ConfigError, TraceError
from engram.sizing.record import SAMPLES_LEAST, Recorder, record_documents
from engram.sizing.replay import replay, replay_tiers
from engram.sizing.simulator import Simulator, hash_windows
from engram.sizing.trace import FILE_BYTES_MAX, read_trace, write_trace

FINGERPRINT = "0123456789abcdef" * 2
HEADER_BYTES = 80


def tokens(count, seed=0, ids=600):
    return (np.random.default_rng(seed).zipf(1.3, count) % ids).astype(np.int32)


def recorded(spec, documents, lookup_tokens=50, **options):
    recorder = Recorder(spec, FINGERPRINT, **options)
    record_documents(recorder, spec, documents, lookup_tokens)
    return recorder.finish()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a sound trace."""
    path = tmp_path_factory.mktemp("traces") / "a.trace"
    write_trace(path, recorded(small_v41(), [tokens(300)], level=2))
    return path.read_bytes()


def same(one, other):
    assert (one.lookups == other.lookups).all()
    assert (one.windows == other.windows).all()
    assert (one.orders == other.orders).all()
    for name in ("fingerprint", "spec_digest", "level", "min_order", "tokens", "accesses"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("spec", [small_v41(), small_qwen()], ids=["v41", "qwen"])
@pytest.mark.parametrize("level", [0, 3])
def test_a_trace_is_the_sampled_part_of_all_ngrams(tmp_path, spec, level):
    documents = [tokens(count, seed) % spec.vocab_size for seed, count in enumerate((120, 7, 200))]
    trace = recorded(spec, documents, level=level)
    write_trace(tmp_path / "t", trace)
    same(read_trace(tmp_path / "t"), trace)
    windows = np.concatenate([spec.windows(each) for each in documents])
    hashes = hash_windows(windows, spec.min_order)
    assert trace.hashes().tolist() == hashes[hashes < (1 << 64 - level)].tolist()
    assert (trace.tokens, trace.accesses) == (327, 327 * spec.num_orders)
    if level == 0:
        # 50 tokens a lookup, and none across documents.
        assert np.diff(trace.starts).tolist() == [
            n * spec.num_orders for n in (50, 50, 20, 7, 50, 50, 50, 50)
        ]


def test_a_full_recorder_takes_a_coarser_sample():
    spec, text = small_v41(), tokens(20_000, ids=590)
    trace = recorded(spec, [text], samples_max=SAMPLES_LEAST)
    assert 0 < len(trace.orders) <= SAMPLES_LEAST
    assert trace.level > 3
    same(trace, recorded(spec, [text], level=trace.level))


@pytest.mark.parametrize("options", [{"level": -1}, {"level": 33}, {"samples_max": 5}])
def test_impossible_recordings_are_refused(options):
    with pytest.raises(ConfigError, match="cannot be recorded"):
        Recorder(small_v41(), FINGERPRINT, **options)


def test_a_trace_replaces_nothing(tmp_path):
    path = tmp_path / "t"
    path.write_text("mine")
    with pytest.raises(TraceError, match="exists"):
        write_trace(path, recorded(small_v41(), [tokens(99)]))
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def refused(tmp_path_factory, data):
    """Refused by one line, or believed; in any case without much memory."""
    path = tmp_path_factory.getbasetemp() / "mutated.trace"
    path.write_bytes(data)
    tracemalloc.start()
    said = ""
    try:
        read_trace(path)
    except TraceError as error:
        said = str(error)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1_000_000 + 20 * len(data)
    assert "\n" not in said
    return bool(said)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_files_are_refused(tmp_path_factory, whole, data):
    changed = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        changed[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(whole)))
    if bytes(changed) != whole:
        assert refused(tmp_path_factory, bytes(changed))
    if cut < len(whole):
        assert refused(tmp_path_factory, whole[:cut])
    assert refused(tmp_path_factory, whole + bytes(data.draw(st.integers(1, 9))))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_files_that_lie_with_a_right_checksum(tmp_path_factory, whole, data):
    body = bytearray(whole[:-16])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, HEADER_BYTES + 200) | st.integers(8, len(body) - 8))
        value = data.draw(st.sampled_from([0, 1, 255, 2**31, 2**63, 2**64 - 1]))
        width = data.draw(st.sampled_from([1, 4, 8]))
        body[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    del body[len(whole) - 16 :]
    if not refused(tmp_path_factory, bytes(body) + xxhash.xxh3_128_digest(bytes(body))):
        trace = read_trace(tmp_path_factory.getbasetemp() / "mutated.trace")
        with pytest.raises(TraceError, match="says nothing"):
            replay(trace)


@pytest.mark.parametrize(
    ("at", "form", "value", "word"),
    [
        (0, "<Q", 7, "no trace"),
        (8, "<I", 2, "version 2, but this engram reads 1"),
        (12, "<B", 40, "contradicts"),
        (13, "<B", 0, "contradicts"),
        (48, "<Q", 2**63, "more than there can be"),
        (64, "<Q", 2**60, "length"),
        (72, "<Q", 2**60, "length"),
        (HEADER_BYTES, "<Q", 2**63, "samples"),
        (HEADER_BYTES + 8, "<Q", 2**40, "tokens"),
    ],
)
def test_what_a_lie_is_called(tmp_path, whole, at, form, value, word):
    body = bytearray(whole[:-16])
    struct.pack_into(form, body, at, value)
    path = tmp_path / "t"
    path.write_bytes(bytes(body) + xxhash.xxh3_128_digest(bytes(body)))
    with pytest.raises(TraceError, match=word):
        read_trace(path)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "large").touch()
    with (tmp_path / "large").open("r+b") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    for path, word in ((tmp_path, "regular"), (tmp_path / "none", "No such")):
        with pytest.raises(TraceError, match=word):
            read_trace(path)


def test_replaying_all_of_it_is_simulating_it():
    spec, text = small_v41(), tokens(8000)
    trace = recorded(spec, [text], lookup_tokens=100)
    simulator = Simulator([(0, 500)])
    hashes = hash_windows(spec.windows(text), spec.min_order)
    for half in np.split(hashes, 2):
        simulator.forget_counts()
        simulator.feed(half, np.arange(0, len(half) + 1, 100 * spec.num_orders), tokens=4000)
    expected = simulator.curve()
    assert replay(trace, [(0, 500)]) == expected
    found = replay_tiers(trace, 500)
    assert (found.hits, found.reads) == pytest.approx(
        (expected.points[0].hits, expected.points[0].reads)
    )
    without = replay_tiers(trace, 0)
    assert (without.hits, without.hbm_hits) == (0, 0)
    assert found.reads < without.reads < 1
    both = replay_tiers(trace, 500, 300)
    assert both.hits > found.hits
    assert 0 < both.hbm_hits == replay_tiers(trace, 300).hits < both.hits


def test_a_coarser_replay_of_a_finer_trace():
    trace = recorded(small_v41(), [tokens(30_000, ids=550)], lookup_tokens=100)
    fine, coarse = (replay(trace, [(level, 2048 >> level)]) for level in (0, 2))
    assert coarse.points[0].hits == pytest.approx(fine.points[0].hits, abs=0.05)
    assert coarse.accesses == fine.accesses == trace.accesses // 2
