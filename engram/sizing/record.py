"""Recording traces: from tokens now, and from whatever else sees lookups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engram.errors import ConfigError
from engram.sizing.simulator import LEVEL_MAX, hash_windows
from engram.sizing.trace import Trace
from engram.spec import NgramSpec
from engram.tiers import Int32s

SAMPLES_MAX = 1 << 20
SAMPLES_LEAST = 1 << 10


class Recorder:
    """Keeps a sample of the n-grams of lookups, in bounded memory.

    When there are more than `samples_max`, every other n-gram goes, by its hash, until there are
    not: the sample gets coarser as the recording gets longer (SHARDS with a fixed size:
    Waldspurger et al., FAST 2015).

    Args:
        spec: of the table.
        fingerprint: of the table.
        level: of the finest sample; one n-gram in 2 ** level.
        samples_max: accesses kept at most, at least `SAMPLES_LEAST`.

    Raises:
        ConfigError: a level or number of samples out of range.
    """

    def __init__(
        self, spec: NgramSpec, fingerprint: str, level: int = 0, samples_max: int = SAMPLES_MAX
    ) -> None:
        if not 0 <= level <= LEVEL_MAX or samples_max < SAMPLES_LEAST:
            raise ConfigError(
                f"level {level} and {samples_max} samples cannot be recorded; use levels of 0 to "
                f"{LEVEL_MAX} and {SAMPLES_LEAST:,} samples or more"
            )
        self._spec, self._fingerprint = spec, fingerprint
        self.level, self._samples_max = level, samples_max
        self.tokens = self.accesses = 0
        self._parts = [self._none()]
        self._ends: list[tuple[int, int]] = []
        self._kept = 0

    def add(self, windows: Int32s) -> None:
        """Take note of one lookup.

        Args:
            windows: int32 `[T, max_order]`, as of `NgramSpec.windows`.
        """
        spec = self._spec
        hashes = hash_windows(np.ascontiguousarray(windows), spec.min_order)
        self.tokens += len(windows)
        self.accesses += len(hashes)
        which = np.flatnonzero(self._in_sample(hashes))
        if not len(which):
            return
        orders = (which % spec.num_orders + spec.min_order).astype(np.uint8)
        kept = np.where(
            np.arange(spec.max_order) < orders[:, None], windows[which // spec.num_orders], -1
        ).astype(np.int32)
        lookup = np.full(len(which), len(self._ends), np.int64)
        self._ends.append((self.tokens, self.accesses))
        self._parts.append((hashes[which], lookup, kept, orders))
        self._kept += len(which)
        while self._kept > self._samples_max and self.level < LEVEL_MAX:
            self._coarsen()

    def finish(self) -> Trace:
        """The trace so far."""
        _, lookup, windows, orders = self._joined()
        numbers, counts = np.unique(lookup, return_counts=True)
        ends = np.array(self._ends, np.int64).reshape(-1, 2)[numbers]
        return Trace(
            fingerprint=self._fingerprint,
            spec_digest=self._spec.digest,
            level=self.level,
            min_order=self._spec.min_order,
            lookups=np.column_stack([np.cumsum(counts), ends]).astype(np.int64),
            windows=windows,
            orders=orders,
            tokens=self.tokens,
            accesses=self.accesses,
        )

    def _in_sample(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        within: npt.NDArray[np.bool_] = hashes <= np.uint64((2**64 - 1) >> self.level)
        return within

    def _coarsen(self) -> None:
        self.level += 1
        hashes, lookup, windows, orders = self._joined()
        which = self._in_sample(hashes)
        numbers, renumbered = np.unique(lookup[which], return_inverse=True)
        self._ends = [self._ends[number] for number in numbers.tolist()]
        self._parts = [(hashes[which], renumbered, windows[which], orders[which])]
        self._kept = int(which.sum())

    def _joined(
        self,
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], Int32s, npt.NDArray[np.uint8]]:
        hashes, lookups, windows, orders = zip(*self._parts, strict=True)
        joined = (
            np.concatenate(hashes),
            np.concatenate(lookups),
            np.concatenate(windows),
            np.concatenate(orders),
        )
        self._parts = [joined]
        return joined

    def _none(
        self,
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], Int32s, npt.NDArray[np.uint8]]:
        return (
            np.empty(0, np.uint64),
            np.empty(0, np.int64),
            np.empty((0, self._spec.max_order), np.int32),
            np.empty(0, np.uint8),
        )


def record_documents(
    recorder: Recorder,
    spec: NgramSpec,
    documents: Sequence[npt.NDArray[np.int32]],
    lookup_tokens: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Record documents one after the other, as prefill of `lookup_tokens` tokens a lookup.

    Args:
        documents: int32 `[T]` token ids each; no n-gram reaches from one into the next.
        progress: told (tokens done, tokens in all).

    Raises:
        TokenError: an id outside the vocabulary.
    """
    total, done = sum(len(each) for each in documents), 0
    for document in documents:
        for windows in _chunks(spec, document, lookup_tokens):
            recorder.add(windows)
        done += len(document)
        progress(done, total)


def _chunks(spec: NgramSpec, document: npt.NDArray[np.int32], tokens: int) -> Iterable[Int32s]:
    windows = spec.windows(document)
    for first in range(0, len(document), tokens):
        yield windows[first : first + tokens]
