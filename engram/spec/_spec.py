"""`NgramSpec`: the pure description of how tokens become row ids."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import SpecError, SpecMismatchError, TokenError
from engram.spec import _json, _kernels
from engram.spec._batch import Batch
from engram.spec._layers import LayerHash, constant_array, multiplier_array
from engram.store import checks

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

_ID_LIMIT = 2**31
_NO_MAP = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False, repr=False)
class NgramSpec:
    """How tokens become row ids, resolved to plain numbers; the same for all families.

    A window holds canonical ids, newest first: `token_map` of the raw ids (or the raw ids, where
    it is None), with `blocked_id` at blocked distances. A row id is the floored remainder of the
    xor of `window[s] * multipliers[s]` over the order's distances (int64, wrapping) by the
    column's prime, plus the column's offset. Source: Engram paper (DeepSeek, 2026), generalized.

    Attributes:
        family: name of the family it was made by.
        vocab_size: raw token ids are below this.
        min_order, max_order: smallest and largest n of the n-grams.
        heads: independent hashes of each order.
        dim: values in a row.
        layers: one `LayerHash` per layer, ascending by layer.
        blocked_id: canonical id of blocked window entries.
        boundary_id: canonical id that, at distance >= 1, blocks itself and everything older.
        dead_positions: whether the family has them.
        token_map: int32 `[vocab_size]`, read-only, or None.

    Raises:
        SpecError: fields that contradict each other.
    """

    family: str
    vocab_size: int
    min_order: int
    max_order: int
    heads: int
    dim: int
    layers: tuple[LayerHash, ...]
    blocked_id: int
    boundary_id: int | None
    dead_positions: bool
    token_map: Int32s | None = None

    def __post_init__(self) -> None:
        if self.token_map is not None:
            frozen = np.array(self.token_map, np.int32)
            frozen.setflags(write=False)
            object.__setattr__(self, "token_map", frozen)
        self._check_numbers()
        self._check_layers()

    def _check_numbers(self) -> None:
        _require(0 < self.vocab_size < _ID_LIMIT, f"vocab_size {self.vocab_size} is not in 1..2^31")
        _require(
            1 <= self.min_order <= self.max_order,
            f"orders {self.min_order}..{self.max_order} are not a range from 1 on",
        )
        # An order crosses the wire as one byte.
        _require(self.max_order <= 255, f"max_order {self.max_order} is more than 255")
        _require(self.heads >= 1, f"heads must be positive, not {self.heads}")
        _require(self.dim >= 1, f"dim must be positive, not {self.dim}")
        if self.token_map is not None:
            _require(
                self.token_map.shape == (self.vocab_size,) and int(self.token_map.min()) >= 0,
                f"the token map of shape {list(self.token_map.shape)} must hold one id >= 0 for "
                f"each of the {self.vocab_size} ids of the vocabulary",
            )
        for what in ("blocked_id", "boundary_id"):
            value = getattr(self, what)
            _require(
                value is None or 0 <= value < self.canonical_vocab_size,
                f"{what} {value} is not one of the {self.canonical_vocab_size} canonical ids",
            )

    def _check_layers(self) -> None:
        ids = self.layer_ids
        _require(bool(ids), "a spec needs at least one layer with n-gram memory")
        _require(
            min(ids) >= 0 and all(a < b for a, b in pairwise(ids)),
            f"layers must be named once each, ascending from 0 on: {list(ids)}",
        )
        for each in self.layers:
            each.check(self.max_order, self.num_columns)

    @property
    def num_orders(self) -> int:
        return self.max_order - self.min_order + 1

    @property
    def num_columns(self) -> int:
        return self.num_orders * self.heads

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """0-based model layer indices."""
        return tuple(each.layer for each in self.layers)

    @cached_property
    def canonical_vocab_size(self) -> int:
        """Number of canonical ids."""
        return self.vocab_size if self.token_map is None else int(self.token_map.max()) + 1

    @cached_property
    def token_map_digest(self) -> str | None:
        """`engram.store.checks.digest` of the token map."""
        return None if self.token_map is None else checks.digest(self.token_map)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of `to_json()`: equal for specs that give equal row ids and rows."""
        return checks.digest(self.to_json().encode())

    @cached_property
    def _map_array(self) -> Int32s:
        # Kernels are compiled for writable arrays; this copy never leaves the instance.
        return _NO_MAP if self.token_map is None else self.token_map.copy()

    @cached_property
    def _multiplier_array(self) -> Int64s:
        return multiplier_array(self.layers)

    @cached_property
    def _constant_array(self) -> npt.NDArray[np.uint64]:
        return constant_array(self.layers)

    def batch(
        self,
        tokens: npt.ArrayLike,
        starts: npt.ArrayLike | None = None,
        history: npt.ArrayLike | None = None,
        dead: npt.ArrayLike | None = None,
    ) -> Batch:
        """Check a ragged batch, flatten and window it; see `windows` for the arguments."""
        return Batch.of(
            tokens,
            starts,
            history,
            dead,
            max_order=self.max_order,
            vocab_size=self.vocab_size,
            dead_positions=self.dead_positions,
            token_map=self._map_array,
            blocked_id=self.blocked_id,
            boundary_id=-1 if self.boundary_id is None else self.boundary_id,
        )

    def windows(
        self,
        tokens: npt.ArrayLike,
        starts: npt.ArrayLike | None = None,
        history: npt.ArrayLike | None = None,
        dead: npt.ArrayLike | None = None,
    ) -> Int32s:
        """Canonical ids at every position and before it.

        Args:
            tokens: integer ids `[T]` with `starts`; `[L]` or `[B, L]` without.
            starts: integers `[B + 1]`: where each sequence begins in `tokens`, then T.
            history: integers `[B, max_order - 1]`: ids just before each sequence, oldest first,
                -1 = before the start, or dead. None = all -1. Without `starts` one row will do
                for all sequences: several continuations of one context.
            dead: booleans like `tokens`: positions that take no part, whatever their id.

        Returns:
            int32 `[*tokens.shape, max_order]`, newest first.

        Raises:
            TokenError: arguments of another form, or an id outside the vocabulary.
        """
        batch = self.batch(tokens, starts, history, dead)
        return batch.windows.reshape(*batch.shape, self.max_order)

    def row_ids(
        self,
        tokens: npt.ArrayLike,
        starts: npt.ArrayLike | None = None,
        history: npt.ArrayLike | None = None,
        dead: npt.ArrayLike | None = None,
    ) -> Int64s:
        """Rows of every position: int64 `[*tokens.shape, layers, columns]`.

        Arguments and errors: as `windows`.
        """
        batch = self.batch(tokens, starts, history, dead)
        rows = self.hash_windows(batch.windows)
        return rows.reshape(*batch.shape, len(self.layers), self.num_columns)

    def hash_windows(self, windows: Int32s) -> Int64s:
        """Rows of int32 `[N, max_order]` windows: int64 `[N, layers, columns]`.

        Raises:
            TokenError: another dtype or shape.
        """
        windows = self._checked_windows(windows)
        out = np.empty((len(windows), len(self.layers), self.num_columns), np.int64)
        _kernels.hash_windows(
            windows, self._multiplier_array, self._constant_array, self.min_order, self.heads, out
        )
        return out

    def ngram_rows(
        self,
        windows: Int32s,
        orders: Int32s,
        layers: Int64s,
        columns: Int64s,
        ordered: Int64s,
        order_bounds: Int64s,
    ) -> tuple[Int32s, Int64s]:
        """Rows of n-grams under a selection, in the tiers' canonical order.

        That is: by n-gram, then by selected layer, then by selected column of its order. The
        last four arguments are those of `engram.tiers.Selection`, and trusted.

        Args:
            windows: int32 `[N, max_order]`; entries from an n-gram's order on are not looked at.
            orders: int32 `[N]`.
            layers: int64, positions in `layer_ids`.
            columns: int64, column numbers.
            ordered: int64, positions in `columns`, grouped by order.
            order_bounds: int64 `[num_orders + 1]`: where each order begins in `ordered`.

        Returns:
            positions in `layer_ids`, int32 `[R]`, and row ids, int64 `[R]`.

        Raises:
            TokenError: windows of another dtype or shape, or an order that does not exist.
        """
        windows = self._checked_windows(windows)
        if orders.dtype != np.int32 or orders.shape != windows.shape[:1]:
            raise TokenError(
                f"orders must be int32 [{len(windows)}], one for each window, "
                f"not {orders.dtype} {list(orders.shape)}"
            )
        positions, row_ids, bad = _kernels.hash_ngrams(
            windows,
            _plain(orders),
            self._multiplier_array,
            self._constant_array,
            self.min_order,
            layers,
            columns,
            ordered,
            order_bounds,
        )
        if bad >= 0:
            raise TokenError(
                f"n-gram {bad} has order {orders[bad]}; "
                f"the spec has orders {self.min_order} to {self.max_order}"
            )
        return positions, row_ids

    def _checked_windows(self, windows: Int32s) -> Int32s:
        array = np.asarray(windows)
        if array.dtype != np.int32 or array.ndim != 2 or array.shape[1] != self.max_order:
            raise TokenError(
                f"windows must be int32 [N, {self.max_order}], "
                f"not {array.dtype} {list(array.shape)}"
            )
        return _plain(array)

    def to_json(self) -> str:
        """Canonical JSON; the token map stands in it by its digest and compressed size."""
        return _json.dump(self)

    @classmethod
    def from_json(cls, text: str, token_map: Int32s | None = None) -> NgramSpec:
        """Rebuild from `to_json` and the token map it names.

        Raises:
            SpecError: malformed, or the token map is missing.
            SpecMismatchError: another token map.
        """
        return cls(**_json.load(text, token_map))

    def check_same(self, other: NgramSpec) -> None:
        """Require that `other` gives the same row ids and rows.

        Raises:
            SpecMismatchError: the first field that differs, with both values.
        """
        found = _json.first_difference(_json.to_fields(self), _json.to_fields(other))
        if found is not None:
            field, mine, theirs = found
            raise SpecMismatchError(
                f"specs differ in {field}: {mine} here, {theirs} there; "
                "use the table that was made for this model",
                field,
            )

    def __repr__(self) -> str:
        return (
            f"<NgramSpec {self.family}: orders {self.min_order} to {self.max_order}, "
            f"{self.heads} heads, {self.dim} values a row, layers {list(self.layer_ids)} "
            f"of {[each.rows for each in self.layers]} rows>"
        )

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, NgramSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> NgramSpec:
        """From a checkpoint's `config.json`, and `tokenizer.json` where the family needs it.

        Raises:
            SpecError: a file is missing or malformed, the model type is unknown, a field is
                missing, or the config's own numbers do not follow from its parameters.
        """
        from engram.spec.families import Config, family_of_model

        config = Config.read(Path(directory) / "config.json")
        return family_of_model(config).from_config(config, Path(directory))

    @classmethod
    def deepseek_demo(cls, **parameters: Any) -> NgramSpec:
        """Memory of the Engram paper's demo.

        Parameters and defaults: `engram.spec.families.deepseek_demo.build`.
        """
        return cls.of_family("deepseek_demo", **parameters)

    @classmethod
    def deepseek_v41(cls, **parameters: Any) -> NgramSpec:
        """Memory of DeepSeek-V4.1-Flash, or a smaller one of its kind.

        Parameters and defaults: `engram.spec.families.deepseek_v41.build`.
        """
        return cls.of_family("deepseek_v41", **parameters)

    @classmethod
    def qwen4_exp(cls, **parameters: Any) -> NgramSpec:
        """Memory of Qwen3.8-Flash-Next, or another of its kind.

        Parameters and defaults: `engram.spec.families.qwen4_exp.build`.
        """
        return cls.of_family("qwen4_exp", **parameters)

    @classmethod
    def of_family(cls, name: str, **parameters: Any) -> NgramSpec:
        """Build by family name.

        Raises:
            SpecError: unknown family, or parameters it cannot use.
        """
        from engram.spec.families import family

        return family(name).build(**parameters)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SpecError(otherwise)


def _plain(array: Int32s) -> Int32s:
    """Contiguous and writable: the one kind of array that kernels are compiled for."""
    return array if array.flags.carray else array.copy()
