"""Identity of a spec: canonical JSON, digest, comparison, and fields that must fit."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
from conftest import small_qwen, small_v41

from engram.errors import SpecError, SpecMismatchError
from engram.spec import LayerHash, NgramSpec
from engram.store.checks import digest


def tiny(**changes) -> NgramSpec:
    fields = {
        "family": "made up",
        "vocab_size": 6,
        "min_order": 1,
        "max_order": 2,
        "heads": 1,
        "dim": 8,
        "layers": (LayerHash(0, (3, 5), (7, 11), 20), LayerHash(4, (9, -1), (13, 17), 30)),
        "blocked_id": 2,
        "boundary_id": None,
        "dead_positions": True,
        "token_map": np.array([0, 1, 2, 0, 1, 3], np.int32),
    }
    return NgramSpec(**(fields | changes))


def test_the_canonical_text_and_its_digest_never_change():
    """Stored tables carry both; another text would orphan every one of them."""
    spec = tiny()
    assert spec.to_json() == (
        '{"blocked_id":2,"boundary_id":null,"dead_positions":true,"dim":8,"family":"made up",'
        '"heads":1,"layers":[{"layer":0,"multipliers":[3,5],"primes":[7,11],"rows":20},'
        '{"layer":4,"multipliers":[9,-1],"primes":[13,17],"rows":30}],"max_order":2,'
        '"min_order":1,"token_map":{"digest":"' + digest(spec.token_map) + '","size":4},'
        '"vocab_size":6}'
    )
    assert spec.token_map_digest == "856382a0e1877c76cac30b40c064dc46"
    assert spec.digest == "2e3243e55d23511c3e8149f81504e5e7"


@pytest.mark.parametrize("spec", [tiny(), small_v41(), small_qwen()], ids=lambda s: s.family)
def test_round_trip(spec):
    again = NgramSpec.from_json(spec.to_json(), spec.token_map)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest == spec.digest
    again.check_same(spec)
    ids = [1, 5, 3, 2, 0]
    np.testing.assert_array_equal(again.row_ids(ids), spec.row_ids(ids))


def test_a_copy_is_equal_and_works():
    spec = tiny()
    spec.row_ids([1, 2])
    again = copy.deepcopy(spec)
    assert again == spec
    np.testing.assert_array_equal(again.row_ids([1, 2]), spec.row_ids([1, 2]))


def test_specs_are_not_equal_to_other_things():
    assert tiny() != "made up"
    assert tiny() != tiny(dim=4)


def test_the_repr_is_short_and_names_the_geometry():
    assert repr(tiny()) == (
        "<NgramSpec made up: orders 1 to 2, 1 heads, 8 values a row, "
        "layers [0, 4] of [20, 30] rows>"
    )


CHANGES = {
    "family": {"family": "other"},
    "vocab_size": {"vocab_size": 7, "token_map": np.array([0, 1, 2, 0, 1, 3, 0], np.int32)},
    "dim": {"dim": 4},
    "blocked_id": {"blocked_id": 1},
    "boundary_id": {"boundary_id": 0},
    "dead_positions": {"dead_positions": False},
    "token_map.digest": {"token_map": np.array([0, 1, 2, 0, 1, 2], np.int32)},
    "layers": {"layers": (LayerHash(0, (3, 5), (7, 11), 20),)},
    "layers[1].rows": {
        "layers": (LayerHash(0, (3, 5), (7, 11), 20), LayerHash(4, (9, -1), (13, 17), 31))
    },
    "layers[0].primes[1]": {
        "layers": (LayerHash(0, (3, 5), (7, 13), 20), LayerHash(4, (9, -1), (13, 17), 30))
    },
    "layers[1].multipliers[1]": {
        "layers": (LayerHash(0, (3, 5), (7, 11), 20), LayerHash(4, (9, 1), (13, 17), 30))
    },
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_first_difference_is_named(field):
    ours, theirs = tiny(), tiny(**CHANGES[field])
    with pytest.raises(SpecMismatchError, match=r"specs differ in .* here, .* there") as caught:
        ours.check_same(theirs)
    assert caught.value.field == field
    assert len(str(caught.value)) < 200
    assert ours != theirs


def test_no_map_differs_from_a_map():
    plain = tiny(token_map=None)
    with pytest.raises(SpecMismatchError) as caught:
        tiny().check_same(plain)
    assert caught.value.field == "token_map"


def test_from_json_wants_exactly_its_token_map():
    spec = tiny()
    with pytest.raises(SpecError, match="needs its token map of digest"):
        NgramSpec.from_json(spec.to_json())
    with pytest.raises(SpecMismatchError, match="the token map has digest") as caught:
        NgramSpec.from_json(spec.to_json(), np.array([0, 1, 2, 1, 0, 3], np.int32))
    assert caught.value.field == "token_map"
    with pytest.raises(SpecError, match="no token map, but one was given"):
        NgramSpec.from_json(tiny(token_map=None).to_json(), spec.token_map)


MALFORMED = {
    "not json": lambda f: "{",
    "not an object": lambda f: "[1]",
    "a field missing": lambda f: {k: v for k, v in f.items() if k != "heads"},
    "a field too many": lambda f: f | {"color": "red"},
    "a float": lambda f: f | {"dim": 8.0},
    "a boolean for a number": lambda f: f | {"heads": True},
    "a number for a boolean": lambda f: f | {"dead_positions": 1},
    "a layer without rows": lambda f: f | {"layers": [{"layer": 0}]},
    "layers that are no list": lambda f: f | {"layers": 5},
    "a token map without digest": lambda f: f | {"token_map": {}},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_json(name):
    spec = tiny(token_map=None)
    text = MALFORMED[name](json.loads(spec.to_json()))
    with pytest.raises(SpecError, match="the spec's JSON is malformed"):
        NgramSpec.from_json(text if isinstance(text, str) else json.dumps(text))


LAYER = LayerHash(0, (3, 5), (7, 11), 20)
UNFIT = {
    "empty vocabulary": ({"vocab_size": 0, "token_map": None}, "vocab_size 0"),
    "ids beyond int32": ({"vocab_size": 2**31, "token_map": None}, "vocab_size 2147483648"),
    "order zero": ({"min_order": 0}, r"orders 0\.\.2"),
    "orders that fall": ({"min_order": 3}, r"orders 3\.\.2"),
    "orders of two bytes": ({"max_order": 256}, "max_order 256 is more than 255"),
    "no heads": ({"heads": 0}, "heads must be positive"),
    "no values": ({"dim": 0}, "dim must be positive"),
    "blocked id not canonical": ({"blocked_id": 4}, "blocked_id 4 is not one of the 4"),
    "boundary id not canonical": ({"boundary_id": -1}, "boundary_id -1 is not one of the 4"),
    "map too short": ({"token_map": np.zeros(5, np.int32)}, r"token map of shape \[5\]"),
    "map below zero": ({"token_map": np.full(6, -1, np.int32)}, "token map"),
    "no layers": ({"layers": ()}, "at least one layer"),
    "a layer twice": ({"layers": (LAYER, LAYER)}, r"ascending from 0 on: \[0, 0\]"),
    "a layer below zero": ({"layers": (dataclasses.replace(LAYER, layer=-1),)}, "ascending"),
    "too few multipliers": (
        {"layers": (dataclasses.replace(LAYER, multipliers=(3,)),)},
        "layer 0 needs 2 int64 multipliers",
    ),
    "a multiplier beyond int64": (
        {"layers": (dataclasses.replace(LAYER, multipliers=(3, 2**63)),)},
        "layer 0 needs 2 int64 multipliers",
    ),
    "too many primes": (
        {"layers": (dataclasses.replace(LAYER, primes=(2, 3, 5)),)},
        "layer 0 needs 2 primes",
    ),
    "a modulus of one": (
        {"layers": (dataclasses.replace(LAYER, primes=(1, 3)),)},
        "layer 0 needs 2 primes of at least 2",
    ),
    "too few rows": (
        {"layers": (dataclasses.replace(LAYER, rows=17),)},
        "has 17 rows, but needs the sum of its primes, 18",
    ),
    "too many rows": ({"layers": (dataclasses.replace(LAYER, rows=2**62),)}, r"below 2\*\*62"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_fields_that_do_not_fit(name):
    changes, message = UNFIT[name]
    with pytest.raises(SpecError, match=message):
        tiny(**changes)


def test_the_token_map_of_a_spec_cannot_change():
    given = np.array([0, 1, 2, 0, 1, 3], np.int32)
    spec = tiny(token_map=given)
    given[0] = 3
    assert spec.token_map[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        spec.token_map[0] = 3


def test_derived_numbers():
    spec = tiny()
    assert (spec.num_orders, spec.num_columns, spec.layer_ids) == (2, 2, (0, 4))
    assert spec.canonical_vocab_size == 4
    assert tiny(token_map=None).canonical_vocab_size == 6
    assert tiny(token_map=None).token_map_digest is None
    assert spec.layers[1].offsets == (0, 13)
