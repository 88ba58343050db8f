"""What all readers of the RAM tier share: hits copied by the caller, misses fetched as bundles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engram._failures import Failures
from engram._ngrams import number_ngrams
from engram.ram import _crew, _deliver, _probe
from engram.ram.copies import Copies
from engram.ram.epochs import Epochs
from engram.ram.layout import BundleLayout
from engram.ram.memory import Memory
from engram.rows import Bytes, Rows
from engram.tiers import Int32s, Int64s, Ngrams, Selection, Tier

Deliver = Callable[[int, Int64s], None]
"""Given the position of the first n-gram of a part, and int64 addresses of the part's bundles,
which stay as they are until it returns."""

_NO_SCALES = np.empty((0, 0), np.uint8)
_NO_FAILURES = Failures()
_COPIES_KEPT = 64
BLOCK_TOKENS = 8192
"""Tokens looked up at once, so that what a lookup needs for itself stays small."""


@dataclass(frozen=True, eq=False)
class InPlace:
    """An arena, for a device that reads bundles where they are.

    Attributes:
        view: to find them through, while holding an epoch of `epochs`.
        slabs: where they lie.
        ready: how many slabs, from the first on, have all their pages.
        require_protection: makes sure that what was found while holding an epoch has kept its
            bytes until now; raises UnavailableError if not.
    """

    view: Int64s
    slabs: tuple[Memory, ...]
    epochs: Epochs
    ready: Callable[[], int]
    require_protection: Callable[[], None]


class BundleTier(Tier):
    """Reads an arena through a view of it, and has whole bundles fetched for what it lacks.

    Subclasses set `bundle` and the attributes of `Tier`, and say where the view and the bundles
    come from.
    """

    bundle: BundleLayout

    def __init__(self) -> None:
        self._copies: dict[Selection, Copies] = {}

    @abstractmethod
    def _view(self) -> Int64s:
        """The view to read through now (`engram.ram.layout.pack_view`); what it points to lives
        at least as long as the array.

        Raises:
            StoreError, ServiceError: the tier is closed, or of no use in this process.
        """

    @abstractmethod
    def in_place(self) -> InPlace:
        """The arena that is in use now; another object once it is another arena.

        Raises: as `_view`.
        """

    @abstractmethod
    def _epochs(self) -> Epochs:
        """Where this reader says which slots it reads in place."""

    @abstractmethod
    def fetch(self, ngrams: Ngrams, selection: Selection, deliver: Deliver) -> Failures:
        """Get the bundles of `ngrams`, each once, in parts and in any order.

        Args:
            selection: the rows that are wanted of them; at least these must be delivered.

        Returns:
            Rows that failed; all others in the bundles are valid.

        Raises: as `Tier.read`.
        """

    def lookup(self, windows: Int32s, selection: Selection, out: Rows) -> None:
        scales = _NO_SCALES if out.scales is None else out.scales
        if len(windows) <= BLOCK_TOKENS:
            failures = self._lookup(windows, selection, out.values, scales)
        else:
            failures = Failures()
            rows_each = len(selection.layers) * len(selection.columns)
            for first in range(0, len(windows), BLOCK_TOKENS):
                block = windows[first : first + BLOCK_TOKENS]
                rows = slice(first * rows_each, (first + len(block)) * rows_each)
                failed = self._lookup(block, selection, out.values[rows], scales[rows])
                failures.add(failed.rows, failed.cause)
        if failures:
            failures.raise_any(self.name, served=self.served)

    def _lookup(
        self, windows: Int32s, selection: Selection, values: Bytes, scales: Bytes
    ) -> Failures:
        """Serve one block; the selected rows that failed."""
        view = self._view()
        copies = self._copies_of(selection)
        slots = np.empty((len(windows), selection.orders), np.int64)
        request = (view, windows, copies.order_used, copies.pieces, copies.bounds)
        misses = -1
        if values.nbytes >= _crew.WORTHWHILE_BYTES and (helpers := _crew.crew()):
            misses = _crew.copy_hits_together(helpers, *request, values, scales, slots)
        if misses < 0:
            misses = _probe.copy_hits(*request, values, scales, slots)
        if not misses:
            return _NO_FAILURES
        return self._serve_misses(windows, selection, copies, slots, misses, values, scales)

    def _serve_misses(
        self,
        windows: Int32s,
        selection: Selection,
        copies: Copies,
        slots: Int64s,
        misses: int,
        values: Bytes,
        scales: Bytes,
    ) -> Failures:
        asked = Ngrams(
            np.full((misses, windows.shape[1]), -1, np.int32), np.empty(misses, np.int32)
        )
        missed = np.empty(misses, np.int64)
        _deliver.collect_missed(
            windows,
            selection.min_order,
            copies.order_used,
            slots,
            missed,
            asked.windows,
            asked.orders,
        )
        firsts, number = number_ngrams(asked)
        ngrams = asked.take(firsts)

        def deliver(first: int, addresses: Int64s) -> None:
            bundles = np.zeros(len(ngrams), np.int64)
            bundles[first : first + len(addresses)] = addresses
            _deliver.deliver(
                missed,
                number,
                bundles,
                selection.orders,
                copies.pieces,
                copies.bounds,
                values,
                scales,
                len(windows),
            )

        failures = self.fetch(ngrams, selection, deliver)
        return self._only_selected(failures, ngrams, selection) if failures else failures

    served = False
    """Whether messages speak of a table that a sidecar serves."""

    def read(self, ngrams: Ngrams, selection: Selection, out: Rows, places: Int64s) -> None:
        view = self._view()
        values, scales = out.values, _NO_SCALES if out.scales is None else out.scales
        chosen = (
            selection.layer_array,
            selection.column_array,
            selection.ordered,
            selection.order_bounds,
        )
        missed = _probe.copy_ngram_hits(
            view, ngrams.windows, ngrams.orders, *chosen, places, values, scales
        )
        absent = np.flatnonzero(missed)
        if not len(absent):
            return
        wanted = ngrams.take(absent)
        wanted_places = places[_rows_of(ngrams, absent, selection)]

        def deliver(first: int, addresses: Int64s) -> None:
            bundles = np.zeros(len(wanted), np.int64)
            bundles[first : first + len(addresses)] = addresses
            _deliver.deliver_ngrams(
                view, wanted.orders, bundles, *chosen, wanted_places, values, scales
            )

        self.fetch_all(wanted, selection, deliver)

    def fetch_all(self, ngrams: Ngrams, selection: Selection, deliver: Deliver) -> None:
        """As `fetch`, but raises RowIntegrityError if selected rows failed."""
        failures = self.fetch(ngrams, selection, deliver)
        if failures:
            selected = self._only_selected(failures, ngrams, selection)
            selected.raise_any(self.name, served=self.served)

    def _only_selected(self, failures: Failures, ngrams: Ngrams, selection: Selection) -> Failures:
        """Failed rows that were asked for: bundles have more than a selection wants."""
        positions, ids = self.spec.ngram_rows(
            ngrams.windows,
            ngrams.orders,
            selection.layer_array,
            selection.column_array,
            selection.ordered,
            selection.order_bounds,
        )
        wanted = Failures()
        for layer, rows in failures.rows.items():
            mine = ids[positions == self.spec.layer_ids.index(layer)]
            failed = sorted(set(rows) & set(mine.tolist()))
            if failed:
                wanted.add({layer: failed}, failures.cause)
        return wanted

    def probe(self, windows: Int32s) -> Int64s:
        """Slots of all n-grams, for reading them in place: only `while holding()`.

        Args:
            windows: int32 `[T, max_order]`.

        Returns:
            int64 `[T, orders]`, -1 for what is not in the arena.
        """
        view = self._view()
        slots = np.empty((len(windows), self.spec.num_orders), np.int64)
        _probe.probe(view, windows, self._every_order, slots)
        return slots

    @property
    def _every_order(self) -> np.ndarray:
        return np.ones(self.spec.num_orders, np.bool_)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within it, slots that `probe` finds keep their bytes, though they may be evicted."""
        self._view()  # refuses a forked child, which would overwrite its parent's epoch
        epochs = self._epochs()
        held = epochs.enter()
        try:
            yield
        finally:
            epochs.leave(held)

    def _copies_of(self, selection: Selection) -> Copies:
        copies = self._copies.get(selection)
        if copies is None:
            if len(self._copies) >= _COPIES_KEPT:
                self._copies.clear()
            copies = self._copies[selection] = Copies.of(self.bundle, selection)
        return copies


def _rows_of(ngrams: Ngrams, which: Int64s, selection: Selection) -> Int64s:
    """Canonical row numbers of some of `ngrams`."""
    widths = len(selection.layers) * np.diff(selection.order_bounds)
    counts = widths[ngrams.orders - selection.min_order]
    begins = np.cumsum(counts) - counts
    mine = counts[which]
    within = np.arange(int(mine.sum())) - np.repeat(np.cumsum(mine) - mine, mine)
    rows: Int64s = np.repeat(begins[which], mine) + within
    return rows
