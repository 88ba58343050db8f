"""The tier contract: what serves n-grams, whatever it is made of.

A request names n-grams and a selection of layers and columns. Its *rows* are numbered in one
canonical order: by n-gram, then by selected layer, then by selected column of that n-gram's
order. The caller says for each row where in `out` it goes, so every tier writes its answer once,
in place.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engram.errors import RowIntegrityError, SelectionError
from engram.rows import RowFormat, Rows

if TYPE_CHECKING:
    from engram.spec import NgramSpec

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Layers and columns that a lookup wants, in the order it wants them.

    Attributes:
        layers: positions in `spec.layer_ids` (not model layer indices).
        columns: global column numbers.
        heads: heads per order of the spec.
        min_order: its smallest order.
        orders: its number of orders.
    """

    layers: tuple[int, ...]
    columns: tuple[int, ...]
    heads: int
    min_order: int
    orders: int

    @classmethod
    def of(
        cls,
        spec: NgramSpec,
        layers: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
    ) -> Selection:
        """Resolve model layer indices and column numbers; None selects all.

        Raises:
            SelectionError: a layer or column that does not exist, twice the same, or none.
        """
        layers = chosen("layer", layers, spec.layer_ids)
        return cls(
            tuple(spec.layer_ids.index(layer) for layer in layers),
            chosen("column", columns, tuple(range(spec.num_columns))),
            spec.heads,
            spec.min_order,
            spec.num_orders,
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.layers, self.columns, self.heads, self.min_order, self.orders))

    @cached_property
    def order_bounds(self) -> Int64s:
        """int64 `[orders + 1]`: where each order's columns start in `ordered`."""
        counts = np.bincount(np.array(self.columns) // self.heads, minlength=self.orders)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def ordered(self) -> Int64s:
        """int64 `[columns]`: positions in `columns`, grouped by order, in the order asked for."""
        return np.argsort(np.array(self.columns) // self.heads, kind="stable").astype(np.int64)

    @cached_property
    def layer_array(self) -> Int64s:
        return np.array(self.layers, np.int64)

    @cached_property
    def column_array(self) -> Int64s:
        return np.array(self.columns, np.int64)


def chosen(what: str, asked: Sequence[int] | None, known: tuple[int, ...]) -> tuple[int, ...]:
    """`asked`, or all that are known.

    Args:
        what: "layer" or "column", for messages.

    Raises:
        SelectionError: not integers, one that does not exist, twice the same, or none.
    """
    if asked is None:
        return known
    try:
        found = tuple(operator.index(item) for item in asked)
    except TypeError:
        raise SelectionError(f"{what}s must be a list of integers, not {asked!r}") from None
    for item in found:
        if item not in known:
            raise SelectionError(
                f"{what} {item} does not exist; {what}s are {', '.join(map(str, known))}"
            )
    if not found or len(set(found)) < len(found):
        raise SelectionError(f"{what}s must be named, each once: got {list(found)}")
    return found


@dataclass(frozen=True, slots=True)
class Ngrams:
    """N-grams to serve.

    Attributes:
        windows: int32 `[N, max_order]`, canonical ids, newest first, unused entries -1.
        orders: int32 `[N]`.
    """

    windows: Int32s
    orders: Int32s

    def __len__(self) -> int:
        return len(self.orders)

    def take(self, which: Int64s | slice) -> Ngrams:
        """Some of them, by position."""
        return Ngrams(self.windows[which], self.orders[which])

    def row_count(self, selection: Selection) -> int:
        """Number of rows these n-grams have under `selection`."""
        widths = np.diff(selection.order_bounds)
        return len(selection.layers) * int(widths[self.orders - selection.min_order].sum())


class Prefetch:
    """N-grams on their way closer; `cancel` those that will not be needed after all."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Start no more reads for it. Safe at any time, twice, and from any thread."""
        self.cancelled = True


class Prefetches(Prefetch):
    """Several at once."""

    def __init__(self, parts: Sequence[Prefetch]) -> None:
        super().__init__()
        self._parts = parts

    def cancel(self) -> None:
        super().cancel()
        for part in self._parts:
            part.cancel()


class Tier(ABC):
    """Serves rows of one table.

    Every implementation passes `tests/test_tiers.py`. Methods may be called from several threads
    at once. Arguments are valid: shapes, dtypes and ranges were checked by the caller.
    """

    spec: NgramSpec
    row_format: RowFormat
    name: str
    """How messages name the table."""
    fingerprint: str
    backing: Tier | None = None
    """The tier below, which serves what this one lacks."""

    def lookup(self, windows: Int32s, selection: Selection, out: Rows) -> None:
        """Write the rows of all tokens' n-grams into `out`.

        Args:
            windows: int32 `[T, max_order]`, canonical ids, newest first.
            out: flat rows `[T * layers * columns, bytes]`, by token, layer, column.

        Raises: as `read`.
        """
        from engram._ngrams import copy_repeats, distinct_ngrams, places_of

        ngrams, tokens, first = distinct_ngrams(windows, selection.min_order, selection)
        try:
            self.read(ngrams, selection, out, places_of(ngrams, tokens, selection))
        except RowIntegrityError:
            copy_repeats(first, selection, out)
            raise
        copy_repeats(first, selection, out)

    @abstractmethod
    def read(self, ngrams: Ngrams, selection: Selection, out: Rows, places: Int64s) -> None:
        """Write the rows of `ngrams` into `out`.

        Args:
            ngrams: n-grams, each once.
            out: flat rows `[R', bytes]`.
            places: int64 `[R]`, for each row in canonical order its index in `out`.

        Raises:
            RowIntegrityError: some rows failed; all others were written.
            ServiceError: the rows cannot be had now.
        """

    @abstractmethod
    def read_rows(self, layer: int, row_ids: Int64s, out: Rows, places: Int64s) -> None:
        """Write single rows into `out`.

        Args:
            layer: position in `spec.layer_ids`.
            row_ids: int64 `[R]`, each once.
            places: int64 `[R]`, index in `out` of each.

        Raises: as `read`.
        """

    @abstractmethod
    def prefetch(self, ngrams: Ngrams) -> Prefetch:
        """Bring rows of `ngrams` closer, in the background; returns at once and never raises for
        rows that cannot be read (a later `read` does)."""

    def start(self, ngrams: Ngrams) -> None:  # noqa: B027 - a tier that never waits has none
        """Start the first reads of n-grams that are about to be asked for, if reads have to be
        waited for; returns at once."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counters since the start, by name; plain ints and strings."""

    def check_integrity(self) -> None:  # noqa: B027 - a tier without state has nothing to check
        """Assert the invariants of the tier's own state; tests call it after each test."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; later calls raise. Safe to call twice."""
