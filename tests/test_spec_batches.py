"""What a batch that cannot be used is told."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_qwen, small_v41

from engram.errors import TokenError


@pytest.fixture(scope="module")
def spec():
    """Vocabulary of 600, orders 2 to 4, dead positions."""
    return small_v41()


BAD = {
    "below zero": (
        {"tokens": [1, 2, -1, -5]},
        r"tokens\[2\] = -1 is not an id of the vocabulary of 600",
    ),
    "beyond the vocabulary": (
        {"tokens": [[1, 2], [3, 600]]},
        r"tokens\[1, 1\] = 600 is not an id of the vocabulary of 600",
    ),
    "beyond int32": ({"tokens": [2**32 + 1]}, r"tokens\[0\] = 4294967297 is not an id"),
    "beyond int64": ({"tokens": np.array([2**64 - 1], np.uint64)}, r"tokens\[0\] = .* not an id"),
    "floats": ({"tokens": [1.0, 2.0]}, "tokens must be integers, not float64"),
    "booleans": ({"tokens": [True]}, "tokens must be integers, not bool"),
    "strings": ({"tokens": ["a"]}, "tokens must be integers, not <U1"),
    "uneven lists": ({"tokens": [[1, 2], [3]]}, "tokens cannot be read as an array"),
    "a single id": ({"tokens": 5}, r"tokens must be \[L\] or \[B, L\], not of shape \[\]"),
    "three dimensions": ({"tokens": [[[1]]]}, r"tokens must be .*, not of shape \[1, 1, 1\]"),
    "starts and rectangular tokens": (
        {"tokens": [[1, 2]], "starts": [0, 2]},
        r"tokens must be \[T\] with starts, not of shape \[1, 2\]",
    ),
    "starts not from 0": ({"starts": [1, 4]}, "starts must begin at 0, not 1"),
    "starts that fall": (
        {"starts": [0, 3, 2, 4]},
        r"starts must never fall: starts\[2\] = 2 follows 3",
    ),
    "starts that fall below zero": ({"starts": [0, -1, 4]}, r"starts\[1\] = -1 follows 0"),
    "starts that end early": ({"starts": [0, 3]}, "starts must end at the 4 tokens given, not 3"),
    "starts that end late": ({"starts": [0, 5]}, "starts must end at the 4 tokens given, not 5"),
    "starts of no sequence": ({"starts": []}, r"starts must be \[B \+ 1\], not of shape \[0\]"),
    "starts of two dimensions": ({"starts": [[0, 4]]}, r"starts must be \[B \+ 1\]"),
    "float starts": ({"starts": [0.0, 4.0]}, "starts must be integers, not float64"),
    "history too narrow": (
        {"history": [[1, 2]]},
        "history has width 2, but the spec needs 3 ids before each sequence",
    ),
    "history too wide": ({"history": [1, 2, 3, 4]}, "history has width 4, but the spec needs 3"),
    "history of other sequences": (
        {"history": [[1, 2, 3], [1, 2, 3]]},
        "history has 2 rows for 1 sequences",
    ),
    "flat history of a ragged batch": (
        {"starts": [0, 4], "history": [1, 2, 3]},
        r"history must be \[B, 3\], not of shape \[3\]",
    ),
    "history below -1": (
        {"history": [[-1, -2, 3]]},
        r"history\[0, 1\] = -2 is not an id of the vocabulary of 600; use -1 for none",
    ),
    "history beyond the vocabulary": (
        {"history": np.array([[-1, 2, 2**40]])},
        r"history\[0, 2\] = 1099511627776 is not an id",
    ),
    "flat history below -1": (
        {"tokens": [[1, 2], [3, 4]], "history": [1, -2, 3]},
        r"history\[1\] = -2 is not an id of the vocabulary of 600; use -1 for none",
    ),
    "flat history too narrow": (
        {"tokens": [[1, 2], [3, 4]], "history": [1, 2]},
        "history has width 2, but the spec needs 3",
    ),
    "float history": ({"history": [[1.0, 2, 3]]}, "history must be integers, not float64"),
    "dead of another shape": (
        {"dead": [True, False]},
        r"dead has shape \[2\], but tokens \[4\]",
    ),
    "dead of integers": ({"dead": [0, 1, 0, 1]}, "dead must be booleans, not int64"),
}


@pytest.mark.parametrize("method", ["windows", "row_ids"])
@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_refused_in_one_line(spec, name, method):
    changes, message = BAD[name]
    with pytest.raises(TokenError, match=message) as caught:
        getattr(spec, method)(**({"tokens": [1, 2, 3, 4]} | changes))
    assert "\n" not in str(caught.value)


def test_dead_is_refused_by_families_without_dead_positions():
    with pytest.raises(TokenError, match="this family has no dead positions"):
        small_qwen().windows([1, 2], dead=[False, True])


@pytest.mark.parametrize("anything", [-1, -7, 600, 2**31 - 1, 2**40, -(2**63)])
def test_the_id_at_a_dead_position_is_not_looked_at(spec, anything):
    dead = [False, True, False]
    expected = spec.windows([4, 5, 6], dead=dead)
    np.testing.assert_array_equal(spec.windows([4, anything, 6], dead=dead), expected)


def test_the_batch_keeps_raw_ids_and_marks_dead_ones(spec):
    batch = spec.batch([[4, 5], [6, 7]], dead=[[False, True], [False, False]])
    assert batch.tokens.tolist() == [4, -1, 6, 7]
    assert batch.starts.tolist() == [0, 2, 4]
    assert batch.history.tolist() == [[-1, -1, -1]] * 2
    assert batch.dead.tolist() == [False, True, False, False]
    assert batch.shape == (2, 2)


@pytest.mark.parametrize(
    ("tokens", "starts", "shape"),
    [
        ([], None, (0,)),
        ([], [0], (0,)),
        ([], [0, 0, 0], (0,)),
        (np.empty((0, 5), np.int32), None, (0, 5)),
        (np.empty((3, 0), np.int32), None, (3, 0)),
    ],
)
def test_empty_batches(spec, tokens, starts, shape):
    assert spec.windows(tokens, starts).shape == (*shape, 4)
    assert spec.row_ids(tokens, starts).shape == (*shape, 2, 24)


def test_history_of_one_sequence_may_be_flat(spec):
    np.testing.assert_array_equal(
        spec.windows([4, 5], history=[-1, 8, 9]), spec.windows([4, 5], history=[[-1, 8, 9]])
    )


def test_flat_history_stands_before_all_continuations(spec):
    drafts, context = [[4, 5], [6, 7], [4, 8]], [-1, 8, 9]
    expected = np.stack([spec.windows(draft, history=context) for draft in drafts])
    np.testing.assert_array_equal(spec.windows(drafts, history=context), expected)
    np.testing.assert_array_equal(spec.windows(drafts, history=[context] * 3), expected)
    for kind in (np.int32, np.int64):
        given = np.array(context, kind)
        np.testing.assert_array_equal(spec.windows(drafts, history=given), expected)


def test_flat_history_of_no_sequences(spec):
    assert spec.windows(np.empty((0, 5), np.int32), history=[1, 2, 3]).shape == (0, 5, 4)
