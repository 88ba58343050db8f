"""The canonical JSON of a spec: sorted keys, no spaces, the token map by its digest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engram.errors import SpecError, SpecMismatchError
from engram.spec._layers import LayerHash
from engram.store import checks

if TYPE_CHECKING:
    from engram.spec._spec import NgramSpec

_INTEGERS = ("vocab_size", "min_order", "max_order", "heads", "dim", "blocked_id")
_LAYER_KEYS = {"layer", "multipliers", "primes", "rows"}


def to_fields(spec: NgramSpec) -> dict[str, Any]:
    """Plain values by field name, in the order in which specs are compared."""
    token_map = None
    if spec.token_map is not None:
        token_map = {"digest": spec.token_map_digest, "size": spec.canonical_vocab_size}
    return {
        "family": spec.family,
        **{name: getattr(spec, name) for name in _INTEGERS},
        "boundary_id": spec.boundary_id,
        "dead_positions": spec.dead_positions,
        "token_map": token_map,
        "layers": [
            {
                "layer": each.layer,
                "rows": each.rows,
                "multipliers": list(each.multipliers),
                "primes": list(each.primes),
            }
            for each in spec.layers
        ],
    }


def dump(spec: NgramSpec) -> str:
    """Canonical text."""
    return json.dumps(to_fields(spec), sort_keys=True, separators=(",", ":"))


def load(text: str, token_map: npt.NDArray[np.int32] | None) -> dict[str, Any]:
    """Arguments of `NgramSpec`.

    Raises:
        SpecError: malformed, or the token map is missing or superfluous.
        SpecMismatchError: it is not the map that the text names.
    """
    try:
        fields = json.loads(text)
        arguments = _arguments(fields)
        named = fields["token_map"]
        wanted = None if named is None else str(named["digest"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise SpecError(f"the spec's JSON is malformed ({problem}); make it with to_json") from None
    if (wanted is None) != (token_map is None):
        raise SpecError(
            f"the spec needs its token map of digest {wanted}; pass token_map"
            if token_map is None
            else "the spec has no token map, but one was given"
        )
    if token_map is not None:
        token_map = np.ascontiguousarray(token_map, np.int32)
        found = checks.digest(token_map)
        if found != wanted:
            raise SpecMismatchError(
                f"the token map has digest {found}, but the spec names {wanted}; "
                "use the tokenizer that the table was made with",
                "token_map",
            )
    return {**arguments, "token_map": token_map}


def _arguments(fields: dict[str, Any]) -> dict[str, Any]:
    known = {"family", *_INTEGERS, "boundary_id", "dead_positions", "token_map", "layers"}
    if set(fields) != known:
        raise ValueError(f"missing or unknown: {sorted(set(fields) ^ known)}")
    boundary = fields["boundary_id"]
    if not isinstance(fields["dead_positions"], bool):
        raise TypeError("dead_positions must be true or false")
    return {
        "family": str(fields["family"]),
        **{name: _integer(fields[name]) for name in _INTEGERS},
        "boundary_id": None if boundary is None else _integer(boundary),
        "dead_positions": fields["dead_positions"],
        "layers": tuple(_layer(each) for each in fields["layers"]),
    }


def _layer(fields: dict[str, Any]) -> LayerHash:
    if set(fields) != _LAYER_KEYS:
        raise ValueError(f"missing or unknown in a layer: {sorted(set(fields) ^ _LAYER_KEYS)}")
    return LayerHash(
        layer=_integer(fields["layer"]),
        multipliers=tuple(_integer(each) for each in fields["multipliers"]),
        primes=tuple(_integer(each) for each in fields["primes"]),
        rows=_integer(fields["rows"]),
    )


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


def first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Field name and both values of the first place where two `to_fields` differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(f"{path}.{key}".lstrip("."), ours[key], theirs[key]) for key in ours]
    elif not (isinstance(ours, list) and isinstance(theirs, list)):
        return None if ours == theirs else (path, ours, theirs)
    elif len(ours) != len(theirs):
        return path, f"{len(ours)} entries", f"{len(theirs)} entries"
    else:
        pairs = [(f"{path}[{i}]", *each) for i, each in enumerate(zip(ours, theirs, strict=True))]
    found = (first_difference(mine, other, name) for name, mine, other in pairs)
    return next((each for each in found if each is not None), None)
