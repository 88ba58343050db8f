"""The families of n-gram memory: each module of this package is one.

A module defines `FAMILY`, a `Family`; nothing else needs to know of it.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from engram.errors import SpecError
from engram.spec._family import Config, Family, LayerTensors, matches

__all__ = ["Config", "Family", "LayerTensors", "families", "family", "family_of_model", "matches"]


@cache
def families() -> dict[str, Family]:
    """All families by name."""
    modules = sorted(info.name for info in pkgutil.iter_modules(__path__))
    found = [import_module(f"{__name__}.{module}").FAMILY for module in modules]
    return {each.name: each for each in found}


def family(name: str) -> Family:
    """The family of that name; `-` and `_` are the same.

    Raises:
        SpecError: there is none.
    """
    found = families().get(name.replace("-", "_"))
    if found is None:
        raise SpecError(f"family {name!r} is unknown; choose one of {', '.join(families())}")
    return found


def family_of_model(config: Config) -> Family:
    """The family that a model's config belongs to.

    Raises:
        SpecError: `model_type` is missing or belongs to none.
    """
    known = {kind: each for each in families().values() for kind in each.model_types}
    stated = [fields.get("model_type") for fields in (config.outer, config.fields)]
    for kind in stated:
        if isinstance(kind, str) and kind in known:
            return known[kind]
    if all(kind is None for kind in stated):
        raise SpecError(f"{config.path} lacks model_type; it must be the config of a model")
    raise SpecError(
        f"{config.path}: model_type {stated[0]!r} has no n-gram memory that engram knows; "
        f"it knows {', '.join(sorted(known))}"
    )
