"""Windows and row ids: compiled kernels against their twins, and batches against their parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.errors import TokenError
from engram.spec import LayerHash, NgramSpec
from engram.spec._twins import hash_ngrams_twin, hash_windows_twin, row_ids_twin, windows_twin
from engram.tiers import Ngrams, Selection

quick = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)

# Small ones, those around 2**31 and 2**32, and one beyond any product of the published models.
MODULI = [2, 3, 7, 251, 65_537, 2**31 - 1, 2**31 + 11, 2**32 - 5, 2**32 + 15, 2**57 - 13]
SMALL = st.integers(1, 1000)
ANY_WORD = st.integers(-(2**63), 2**63 - 1)


@st.composite
def specs(draw, dead_positions=None) -> NgramSpec:
    """Specs of any order, head and layer count; multipliers from tame to wrapping."""
    vocab = draw(st.integers(1, 12))
    mapped = draw(st.booleans())
    token_map = None
    if mapped:
        token_map = np.array(
            draw(st.lists(st.integers(0, vocab - 1), min_size=vocab, max_size=vocab)), np.int32
        )
    canonical = int(token_map.max()) + 1 if mapped else vocab
    min_order = draw(st.integers(1, 3))
    max_order = draw(st.integers(min_order, 5))
    heads = draw(st.integers(1, 3))
    columns = (max_order - min_order + 1) * heads
    layers = []
    for layer in sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=3))):
        multipliers = draw(
            st.lists(SMALL | ANY_WORD, min_size=max_order, max_size=max_order).map(tuple)
        )
        primes = tuple(draw(st.lists(st.sampled_from(MODULI), min_size=columns, max_size=columns)))
        padding = draw(st.integers(0, 5))
        layers.append(LayerHash(layer, multipliers, primes, sum(primes) + padding))
    return NgramSpec(
        family="made up",
        vocab_size=vocab,
        min_order=min_order,
        max_order=max_order,
        heads=heads,
        dim=4,
        layers=tuple(layers),
        blocked_id=draw(st.integers(0, canonical - 1)),
        boundary_id=draw(st.none() | st.integers(0, canonical - 1)),
        dead_positions=draw(st.booleans()) if dead_positions is None else dead_positions,
        token_map=token_map,
    )


@st.composite
def batches(draw, spec: NgramSpec) -> dict[str, np.ndarray | None]:
    """Arguments of `row_ids`: sequences of any length, empty ones too."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=0, max_size=4))
    total = sum(lengths)
    ids = st.integers(0, spec.vocab_size - 1)
    width = spec.max_order - 1
    before = [draw(st.lists(ids | st.just(-1), min_size=width, max_size=width)) for _ in lengths]
    dead = None
    if spec.dead_positions and draw(st.booleans()):
        dead = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    return {
        "tokens": np.array(draw(st.lists(ids, min_size=total, max_size=total)), np.int32),
        "starts": np.cumsum([0, *lengths]).astype(np.int32),
        "history": np.array(before, np.int32).reshape(len(lengths), width),
        "dead": dead,
    }


@quick
@given(st.data())
def test_kernels_equal_their_twins(data):
    spec = data.draw(specs())
    arguments = data.draw(batches(spec))
    batch = spec.batch(**arguments)
    windows = spec.windows(**arguments)
    expected = windows_twin(
        batch.tokens, batch.starts, batch.history, spec.token_map, spec.blocked_id, spec.boundary_id
    )
    np.testing.assert_array_equal(windows, expected)
    np.testing.assert_array_equal(spec.row_ids(**arguments), row_ids_twin(spec, batch))
    assert windows.dtype == np.int32
    assert spec.row_ids(**arguments).dtype == np.int64


@quick
@given(st.data())
def test_a_window_is_what_the_definition_says(data):
    """From the words of the design alone, one token at a time: the oracle of the twin."""
    spec = data.draw(specs())
    arguments = data.draw(batches(spec))
    windows = spec.windows(**arguments)
    dead = arguments["dead"]
    for b, history in enumerate(arguments["history"]):
        first, last = arguments["starts"][b : b + 2]
        ids = [int(each) for each in history]
        for t in range(first, last):
            ids.append(-1 if dead is not None and dead[t] else int(arguments["tokens"][t]))
            assert windows[t].tolist() == _window(spec, ids)


def _window(spec: NgramSpec, ids: list[int]) -> list[int]:
    window: list[int] = []
    blocked = False
    for s in range(spec.max_order):
        raw = ids[-1 - s]
        canonical = raw if spec.token_map is None or raw < 0 else int(spec.token_map[raw])
        blocked = blocked or raw < 0 or (s > 0 and canonical == spec.boundary_id)
        window.append(spec.blocked_id if blocked else canonical)
    return window


@quick
@given(specs(), st.integers(0, 2**32))
def test_hashes_of_any_word_are_floored_remainders(spec, seed):
    """Window entries far outside any vocabulary reach every hash word, negative ones too."""
    windows = np.random.default_rng(seed).integers(-(2**31), 2**31, (5, spec.max_order), np.int32)
    found = spec.hash_windows(windows)
    for n, window in enumerate(windows.tolist()):
        for position, each in enumerate(spec.layers):
            word = 0
            for s in range(spec.max_order):
                word ^= window[s] * each.multipliers[s]
                signed = (word + 2**63) % 2**64 - 2**63
                for head in range(spec.heads) if s + 1 >= spec.min_order else ():
                    column = (s + 1 - spec.min_order) * spec.heads + head
                    expected = signed % each.primes[column] + each.offsets[column]
                    assert found[n, position, column] == expected


@pytest.mark.parametrize("modulus", MODULI)
def test_reduction_at_its_edges(modulus):
    """Words next to multiples of the modulus and to the ends of the int64 range."""
    near = [0, modulus, 2 * modulus, -modulus, 2**63 - 1, -(2**63), 2**62]
    near += [2**63 // modulus * modulus, -(2**63 // modulus) * modulus]
    words = sorted({w + d for w in near for d in (-1, 0, 1) if -(2**63) <= w + d < 2**63})
    # One layer for each word: order 1, the canonical id 1, the word itself as multiplier.
    layers = tuple(LayerHash(i, (word,), (modulus,), modulus) for i, word in enumerate(words))
    spec = NgramSpec("edges", 2, 1, 1, 1, 4, layers, 0, None, False)
    assert spec.row_ids([1]).ravel().tolist() == [word % modulus for word in words]


@quick
@given(st.data())
def test_a_batch_equals_each_sequence_alone(data):
    spec = data.draw(specs())
    arguments = data.draw(batches(spec))
    whole = spec.row_ids(**arguments)
    for b, history in enumerate(arguments["history"]):
        own = slice(*arguments["starts"][b : b + 2])
        dead = None if arguments["dead"] is None else arguments["dead"][own]
        alone = spec.row_ids(arguments["tokens"][own], history=history, dead=dead)
        np.testing.assert_array_equal(whole[own], alone)


@quick
@given(st.data())
def test_chunks_with_history_equal_the_whole(data):
    spec = data.draw(specs())
    length = data.draw(st.integers(0, 14))
    ids = st.integers(0, spec.vocab_size - 1)
    tokens = np.array(data.draw(st.lists(ids, min_size=length, max_size=length)), np.int32)
    dead = np.zeros(length, bool)
    if spec.dead_positions:
        dead[data.draw(st.lists(st.integers(0, max(length - 1, 0)), max_size=3 * (length > 0)))] = 1
    dead_of = (lambda part: dead[part]) if spec.dead_positions else (lambda part: None)
    whole = spec.windows(tokens, dead=dead_of(slice(None)))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    width = spec.max_order - 1
    seen = np.concatenate([np.full(width, -1), np.where(dead, -1, tokens)]).astype(np.int32)
    for first, last in zip([0, *cuts], [*cuts, length], strict=True):
        chunk = spec.windows(
            tokens[first:last],
            history=seen[first : first + width],
            dead=dead_of(slice(first, last)),
        )
        np.testing.assert_array_equal(chunk, whole[first:last])


@quick
@given(st.data())
def test_rectangular_tokens_equal_ragged_ones(data):
    spec = data.draw(specs(dead_positions=True))
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 4)))
    source = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = source.integers(0, spec.vocab_size, shape)
    history = source.integers(-1, spec.vocab_size, (shape[0], spec.max_order - 1))
    dead = source.random(shape) < 0.2
    starts = np.arange(shape[0] + 1) * shape[1]
    found = spec.row_ids(tokens, history=history, dead=dead)
    ragged = spec.row_ids(tokens.ravel(), starts, history, dead.ravel())
    assert found.shape == (*shape, len(spec.layers), spec.num_columns)
    np.testing.assert_array_equal(found.reshape(ragged.shape), ragged)


@quick
@given(st.data())
def test_ngram_rows_are_the_rows_of_the_windows(data):
    spec = data.draw(specs())
    columns = data.draw(st.lists(st.integers(0, spec.num_columns - 1), min_size=1, unique=True))
    layers = data.draw(st.lists(st.sampled_from(spec.layer_ids), min_size=1, unique=True))
    selection = Selection.of(spec, layers, columns)
    orders = np.array(
        data.draw(st.lists(st.integers(spec.min_order, spec.max_order), max_size=6)), np.int32
    )
    source = np.random.default_rng(data.draw(st.integers(0, 99)))
    windows = source.integers(0, spec.vocab_size, (len(orders), spec.max_order), np.int32)
    all_rows = spec.hash_windows(windows)
    unused = np.arange(spec.max_order)[None, :] >= orders[:, None]
    windows[unused] = -1
    positions, row_ids = _ngram_rows(spec, windows, orders, selection)
    expected = hash_ngrams_twin(
        all_rows, orders, selection.layers, columns, spec.min_order, spec.heads
    )
    np.testing.assert_array_equal(positions, expected[0])
    np.testing.assert_array_equal(row_ids, expected[1])
    assert (positions.dtype, row_ids.dtype) == (np.int32, np.int64)
    assert len(row_ids) == Ngrams(windows, orders).row_count(selection)


def _ngram_rows(spec, windows, orders, selection):
    return spec.ngram_rows(
        windows,
        orders,
        selection.layer_array,
        selection.column_array,
        selection.ordered,
        selection.order_bounds,
    )


def _two_order_spec() -> NgramSpec:
    layers = (LayerHash(3, (5, 7, 11), (13, 17), 30),)
    return NgramSpec("small", 10, 2, 3, 1, 4, layers, 0, None, False)


@pytest.mark.parametrize("order", [-1, 0, 1, 4, 2**31 - 1])
def test_an_order_that_does_not_exist_is_refused(order):
    spec = _two_order_spec()
    orders = np.array([2, order], np.int32)
    with pytest.raises(TokenError, match=rf"n-gram 1 has order {order}; .* orders 2 to 3"):
        _ngram_rows(spec, np.zeros((2, 3), np.int32), orders, Selection.of(spec))


def test_ngrams_of_another_form_are_refused():
    spec = _two_order_spec()
    everything = Selection.of(spec)
    with pytest.raises(TokenError, match=r"windows must be int32 \[N, 3\], not int64"):
        _ngram_rows(spec, np.zeros((2, 3), np.int64), np.full(2, 2, np.int32), everything)
    with pytest.raises(TokenError, match=r"not int32 \[2, 4\]"):
        spec.hash_windows(np.zeros((2, 4), np.int32))
    with pytest.raises(TokenError, match=r"orders must be int32 \[2\]"):
        _ngram_rows(spec, np.zeros((2, 3), np.int32), np.full(3, 2, np.int32), everything)


def test_read_only_and_strided_arrays_give_the_same():
    spec = _two_order_spec()
    tokens = np.arange(8, dtype=np.int32)
    expected = spec.row_ids(tokens)
    frozen = tokens.copy()
    frozen.setflags(write=False)
    np.testing.assert_array_equal(spec.row_ids(frozen), expected)
    np.testing.assert_array_equal(spec.row_ids(np.repeat(tokens, 2)[::2]), expected)
    windows = spec.windows(tokens)
    np.testing.assert_array_equal(spec.hash_windows(np.asfortranarray(windows)), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_every_integer_dtype_is_accepted(dtype):
    spec = _two_order_spec()
    found = spec.row_ids(np.arange(5).astype(dtype), np.array([0, 2, 5]).astype(dtype))
    np.testing.assert_array_equal(found, spec.row_ids([0, 1, 2, 3, 4], [0, 2, 5]))


def test_nothing_is_written_to_the_arguments():
    spec = _two_order_spec()
    arrays = [np.array([1, 2, 3]), np.array([0, 1, 3]), np.array([[4, 5], [-1, 6]])]
    before = [each.copy() for each in arrays]
    spec.row_ids(*arrays)
    for array, same in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, same)


def test_windows_twin_of_hashes_is_checked_against_python_integers():
    """The NumPy twin wraps like int64; a slip of its own would hide one of the kernel."""
    found = hash_windows_twin(
        np.array([[3]], np.int32), np.array([[2**62 + 1]]), np.array([[97]]), np.array([[0]]), 1, 1
    )
    wrapped = (3 * (2**62 + 1) + 2**63) % 2**64 - 2**63
    assert wrapped < 0
    assert found.item() == wrapped % 97
