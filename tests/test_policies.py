"""The simulated policies do what their plain twins do; traces hold what their texts ask for."""

from __future__ import annotations

import gzip
import sys
from collections import OrderedDict
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tidy import ROOT

from engram.spec import NgramSpec

sys.path.append(str(ROOT / "benchmarks" / "policies"))
pages, policies, queues, simulate, tables, traces, twins = map(
    import_module, ("pages", "policies", "queues", "simulate", "tables", "traces", "twins")
)

BATCHES = st.lists(st.lists(st.integers(0, 30), max_size=6, unique=True), min_size=1, max_size=80)
CAPACITY = st.integers(1, 20)


def arrays(batches):
    keys = np.array([key for batch in batches for key in batch], np.int32)
    return keys, np.cumsum([0, *map(len, batches)])


def share(part, capacity):
    return max(1, round(part * capacity)) if part else 0


@pytest.mark.parametrize(
    ("policy", "twin"),
    [
        (policies.lru(), twins.Lru),
        (policies.fifo(), lambda n: twins.Clock(n, 0)),
        (policies.clock(2), lambda n: twins.Clock(n, 3)),
        (policies.sieve(), twins.Sieve),
        (policies.doorkeeper(2, 2.0), lambda n: twins.Doorkeeper(n, 3, 2 * n)),
        (policies.s3fifo(), lambda n: twins.S3Fifo(n, share(0.25, n), 2, n, 3)),
        (policies.s3fifo(0.1, 1, 0.0), lambda n: twins.S3Fifo(n, share(0.1, n), 1, 0, 3)),
        # Up to 20 slots there is one bucket of 16 fingerprints.
        (policies.CHOSEN, lambda n: twins.S3Fifo(n, share(0.25, n), 2, 16, 3)),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
@settings(max_examples=80, deadline=None)
@given(batches=BATCHES, capacity=CAPACITY)
def test_a_policy_misses_what_its_twin_misses(policy, twin, batches, capacity):
    keys, starts = arrays(batches)
    missed = policies.misses(policy, keys, starts, capacity)
    assert missed.astype(bool).tolist() == twins.replay(twin(capacity), batches)


@settings(max_examples=80, deadline=None)
@given(keys=st.lists(st.integers(0, 4), min_size=1, max_size=12), capacity=st.integers(1, 3))
def test_nothing_misses_less_than_the_optimum(keys, capacity):
    one_each = np.arange(len(keys) + 1)
    missed = policies.optimum_misses(np.array(keys, np.int32), one_each, capacity)
    assert missed.sum() == twins.fewest_misses(tuple(keys), capacity)


@pytest.mark.parametrize("policy", policies.main_policies(), ids=lambda policy: policy.name)
def test_every_policy_stays_between_the_optimum_and_its_capacity(policy):
    random = np.random.default_rng(1)
    keys = (random.zipf(1.2, 4000) % 300).astype(np.int32)
    starts = np.arange(len(keys) + 1)
    firsts = np.unique(keys, return_index=True)[1]
    everything = policies.misses(policy, keys, starts, 400)
    assert np.flatnonzero(everything).tolist() == sorted(firsts)
    some = policies.misses(policy, keys, starts, 40)
    assert policies.optimum_misses(keys, starts, 40).sum() <= some.sum() < len(keys)
    # A scan over more n-grams than fit, again and again: what is kept can hit once a round.
    scan = np.tile(np.arange(100, dtype=np.int32), 20)
    hits = policies.misses(policy, scan, np.arange(len(scan) + 1), 40) == 0
    assert hits.reshape(20, 100).sum(1).max() <= 40


def test_a_prefetched_ngram_was_not_used_twice():
    """Its own lookup touches it: one touch more must be asked for."""
    batches = [[key] for key in range(40)]
    batches[3:3] = [[1], [2]]  # used again soon: these alone are worth keeping
    keys, starts = arrays(batches)
    for promote, kept in ((1, 6), (2, 2)):
        policy = policies.s3fifo(0.25, promote=promote)
        state = policy.state(40, 8)
        missed = np.zeros(len(keys), np.uint8)
        policies._replay_prefetched(keys, starts, policy.touch, policy.admit, state, missed)
        assert missed.sum() == 40
        assert state.sizes[queues.MAIN] == kept


def test_capacity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one slot"):
        policies.misses(policies.lru(), np.zeros(1, np.int32), np.array([0, 1]), 0)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.integers(0, 9), min_size=1, max_size=60), capacity=st.integers(2, 12))
def test_page_cache(keys, capacity):
    of_rows = np.random.default_rng(0).integers(0, 14, (10, 3)).astype(np.int32)
    order: OrderedDict[int, None] = OrderedDict()
    expected = []
    for key in keys:
        expected.append(0)
        for page in of_rows[key].tolist():
            expected[-1] += page not in order
            order[page] = None
            order.move_to_end(page)
            if len(order) > capacity:
                order.popitem(last=False)
    run = traces.Trace("", np.array(keys, np.int32), *[np.zeros(0)] * 4)
    missed = pages.rows_missed(run, of_rows, 14, capacity * pages.PAGE_BYTES)
    assert missed.tolist() == expected


def test_pages_are_those_of_the_rows():
    spec = NgramSpec.deepseek_v41(tokenizer=np.arange(50, dtype=np.int32), engram_vocab_size=1000)
    texts = [np.array([3, 4, 5, 3, 4, 5], np.int32), np.array([9], np.int32)]
    run = traces.trace("", spec, texts, traces.one_stream([6, 1], 4))
    of_rows, count = pages.pages_of(run, spec, 264)
    blocks = -(-spec.layers[0].rows // 15)
    assert count == blocks + -(-spec.layers[1].rows // 15)
    ids = spec.row_ids(texts[0])
    key = run.keys[run.starts[1] : run.starts[2]][-1]  # the newest n-gram of order 4
    assert run.orders[key] == 4
    expected = ids[5, :, 16:24] // 15 + np.array([[0], [blocks]])
    assert of_rows[key].tolist() == expected.reshape(-1).tolist()


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=40), min_size=1, max_size=5),
    batch=st.integers(1, 9),
)
def test_a_trace_holds_each_ngram_of_a_batch_once(texts, batch):
    spec = NgramSpec.deepseek_v41(tokenizer=np.arange(50, dtype=np.int32), engram_vocab_size=1000)
    documents = [np.array(text, np.int32) for text in texts]
    run = traces.trace("", spec, documents, traces.one_stream([*map(len, texts)], batch))
    expected = []
    for text in documents:
        windows = spec.windows(text)
        for start in range(0, len(text), batch):
            part = windows[start : start + batch].tolist()
            expected.append([tuple(w[:n]) for w in part for n in (2, 3, 4)])
    assert len(expected) == len(run.tokens)
    for i, grams in enumerate(expected):
        keys = run.keys[run.starts[i] : run.starts[i + 1]]
        found = [tuple(run.windows[key, : run.orders[key]].tolist()) for key in keys]
        assert found == list(dict.fromkeys(grams))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=70))
def test_streams_serve_every_position_once_and_in_order(lengths):
    places, steps = traces.many_streams(lengths)
    assert sorted(places) == list(range(sum(lengths)))
    assert steps[-1] == len(places)
    assert np.diff(steps).max() <= traces.PREFILL_TOKENS + traces.STREAMS
    turn = np.argsort(places)
    for start, n in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        assert (np.diff(turn[start : start + n]) > 0).all()


def test_texts_are_read_without_their_tags(tmp_path):
    page = "<html><style>p {}</style><p>What is &lt; meant</p><script>no()</script></html>"
    (tmp_path / "a.html.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "b.md").write_text("plain")
    (tmp_path / "c.bin").write_text("not text")
    assert [path.name for path in traces._files([tmp_path])] == ["a.html.gz", "b.md"]
    assert traces._text(tmp_path / "a.html.gz").strip() == "What is < meant"


def test_figures_become_tables(tmp_path):
    random = np.random.default_rng(0)
    spec = NgramSpec.deepseek_v41(tokenizer=np.arange(50, dtype=np.int32), engram_vocab_size=1000)
    text = [random.integers(0, 20, 400).astype(np.int32)]
    run = traces.trace("toy", spec, text, traces.one_stream([400], 16))
    rivals = [policies.lru(), policies.CHOSEN]
    found = [vars(each) for each in simulate.compare(run, rivals, (0.001, 0.002))]
    peers = [vars(each) for each in simulate.beside_page_cache(run, spec, (0.001,))]
    assert found[0]["slots"] == simulate.slots_of(0.001) == 250
    assert found[0]["rows"] == pytest.approx(
        policies.misses(policies.lru(), run.keys, run.starts, 250).sum() * 16 / 400
    )
    body = {
        "command": "x",
        "environment": {"commit": "y"},
        "texts": {"toy": {"places": ["z"], "documents": 1}},
        "traces": {"toy": simulate.describe(run)},
        "costs": policies.costs(),
        "policies": found,
        "page_cache": peers,
        **dict.fromkeys(("variants", "circumstances", "batches"), found),
    }
    tables.save(tmp_path, body)
    written = (tmp_path / "results.md").read_text()
    assert f"| LRU | {found[0]['late']:.4f} | {found[1]['late']:.4f} |" in written
    assert f"{peers[0]['least_gib']:.3f} GiB" in written
    assert f"| {policies.CHOSEN.name} | yes | 6.25 |" in written
