"""What a family module provides, and the helpers that all of them share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram.errors import SpecError
from engram.store.files import read_regular

if TYPE_CHECKING:
    from engram.spec._spec import NgramSpec


@dataclass(frozen=True)
class LayerTensors:
    """Where one layer's table stands in a checkpoint.

    Every pattern is a regular expression for the *end* of a tensor's name: see `matches`.

    Attributes:
        layer: model layer index.
        values: patterns of the tensor with the values, `[rows, ...]`; the first that matches any
            name is the one. A group named `shard` means: concatenate in numeric order of it.
        scales: pattern of the tensor with the scales of each row, or None.
        global_scale: pattern of the one scale that a format with a global scale needs, or None.
        checks: pattern of an integer tensor -> what it must hold, flattened. Such a tensor may be
            absent; if present it must agree.
    """

    layer: int
    values: tuple[str, ...]
    scales: str | None = None
    global_scale: str | None = None
    checks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def matches(pattern: str, name: str) -> re.Match[str] | None:
    """Whether tensor `name` ends with `pattern`, whatever whole components precede it."""
    return re.search(rf"(?:^|\.)(?:{pattern})$", name)


@dataclass(frozen=True)
class Family:
    """One kind of n-gram memory.

    Attributes:
        name: as in `NgramSpec.family`.
        model_types: values of `model_type` in a `config.json` that belong to it.
        build: parameters -> spec.
        from_config: (config, directory of the checkpoint) -> spec, checked against the config's
            own numbers.
        tensors: spec -> where its tables stand in a checkpoint, per layer.
        row_format: name of the published checkpoint's row format.
        size_parameter: which parameter of `build` sets the size of the tables.
        needs_tokenizer: whether `build` needs `tokenizer`.
    """

    name: str
    model_types: tuple[str, ...]
    build: Callable[..., NgramSpec]
    from_config: Callable[[Config, Path], NgramSpec]
    tensors: Callable[[NgramSpec], list[LayerTensors]]
    row_format: str
    size_parameter: str
    needs_tokenizer: bool


@dataclass(frozen=True)
class Config:
    """Fields of a `config.json` by name, with errors that name file and field.

    Attributes:
        fields: the text model's fields.
        outer: the fields around them; the same mapping where nothing is nested.
        path: of the file.
    """

    fields: Mapping[str, Any]
    outer: Mapping[str, Any]
    path: Path

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read a `config.json`, its text model nested as `text_config` or not.

        Raises:
            SpecError: missing, unreadable or not a JSON object.
        """
        try:
            config = json.loads(read_regular(path))
        except OSError as error:
            raise SpecError(
                f"{path} cannot be read ({error.strerror}); name the directory of a checkpoint"
            ) from None
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise SpecError(f"{path} must hold a JSON object")
        nested = config.get("text_config")
        return cls(nested if isinstance(nested, dict) else config, config, path)

    def integer(self, name: str, default: int | None = None) -> int:
        """One integer; a missing one is an error unless it has a default."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        return self._checked(name, value)

    def integers(self, name: str) -> list[int]:
        """A list of integers that is not empty."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not value:
            raise self.error(name, value, "a list of integers")
        return [self._checked(name, item) for item in value]

    def _checked(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, value, "an integer")
        return value

    def error(self, name: str, value: Any, wanted: str) -> SpecError:
        if value is None:
            return SpecError(f"{self.path} lacks {name}; it must be {wanted}")
        return SpecError(f"{self.path}: {name} must be {wanted}, not {value!r}")

    def require_equal(self, name: str, stated: Any, computed: Any) -> None:
        """Compare what the config states with what follows from its parameters.

        Raises:
            SpecError: they differ; both are named.
        """
        if stated != computed:
            raise SpecError(
                f"{self.path}: {name} is {stated}, but its parameters and tokenizer give "
                f"{computed}; config and tokenizer must come from the same model revision"
            )
