"""What a client asks for: text in which some phrases are frequent, most are rare, some are new.

Phrases are numbered by frequency, and all clients draw from the same ones, so that they share hot
n-grams; every client draws by a seed of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.spec import NgramSpec
from engram.tiers import Int32s, Int64s

ZIPF = 0.99
UNIFORM = 0.1
"""The part of all phrases that nobody ever asks for again."""
PREFILL_TOKENS = (48, 4096)
DECODE_SEQUENCES = (1, 64)
_PHRASES = 1 << 14
_PHRASE_TOKENS = 16
_FREQUENT, _FREQUENT_FROM_MAX = 24, 100
_DEAD = 0.05


@dataclass(frozen=True)
class Batch:
    """Arguments of one lookup."""

    tokens: Int32s
    starts: Int32s
    history: Int32s
    dead: np.ndarray | None = None

    def row_ids(self, spec: NgramSpec) -> Int64s:
        """int64 `[T, layers, columns]`: the rows it asks for."""
        return spec.row_ids(self.tokens, self.starts, self.history, self.dead)


class Traffic:
    """Batches of one client.

    Args:
        rng: of this client.
        seed: of the phrases, shared by all.
    """

    def __init__(self, spec: NgramSpec, rng: np.random.Generator, seed: int) -> None:
        self._spec = spec
        self._rng = rng
        self._shape = np.random.default_rng(seed).integers(1, 2**31, 2).astype(np.uint64)
        weights = np.arange(1, _PHRASES + 1) ** -ZIPF
        self._bounds = np.cumsum(weights / weights.sum())

    def prefill(self) -> Batch:
        """One to four sequences, of 48 to 4,096 tokens together."""
        least, most = np.log(PREFILL_TOKENS)
        count = int(np.exp(self._rng.uniform(least, most)))
        cuts = np.sort(self._rng.integers(0, count + 1, self._rng.integers(0, 4)))
        starts = np.array([0, *cuts, count], np.int32)
        history = self._text((len(starts) - 1) * self._context).reshape(-1, self._context)
        history[self._rng.random(len(history)) < 0.5] = -1
        dead = None
        if self._spec.dead_positions and self._rng.random() < 0.3:
            dead = self._rng.random(count) < _DEAD
        return Batch(self._text(count), starts, history, dead)

    def decode(self) -> Batch:
        """The next token of each of 1 to 64 sequences."""
        count = int(self._rng.integers(DECODE_SEQUENCES[0], DECODE_SEQUENCES[1] + 1))
        width = self._context + 1
        text = self._text(count * _PHRASE_TOKENS).reshape(count, _PHRASE_TOKENS)
        last = int(self._rng.integers(width, _PHRASE_TOKENS + 1))
        window = np.ascontiguousarray(text[:, last - width : last])
        starts = np.arange(count + 1, dtype=np.int32)
        return Batch(window[:, -1].copy(), starts, window[:, :-1].copy())

    def frequent(self) -> Batch:
        """Phrases of nearly the same frequency, each once."""
        first = int(self._rng.integers(_FREQUENT_FROM_MAX))
        ranks = np.arange(first, first + _FREQUENT, dtype=np.uint64)
        tokens = self._phrases(ranks).reshape(-1)
        starts = np.array([0, len(tokens)], np.int32)
        return Batch(tokens, starts, np.full((1, self._context), -1, np.int32))

    @property
    def _context(self) -> int:
        return self._spec.max_order - 1

    def _text(self, count: int) -> Int32s:
        """int32 `[count]`: phrases one after another."""
        phrases = -(-count // _PHRASE_TOKENS)
        ranks = np.searchsorted(self._bounds, self._rng.random(phrases)).astype(np.uint64)
        tokens = self._phrases(ranks)
        fresh = self._rng.random(phrases) < UNIFORM
        tokens[fresh] = self._rng.integers(
            0, self._spec.vocab_size, (int(fresh.sum()), _PHRASE_TOKENS)
        )
        return np.ascontiguousarray(tokens.reshape(-1)[:count])

    def _phrases(self, ranks: npt.NDArray[np.uint64]) -> Int32s:
        """int32 `[P, tokens]`."""
        words = ranks[:, None] * np.uint64(_PHRASE_TOKENS) + np.arange(
            _PHRASE_TOKENS, dtype=np.uint64
        )
        words = (words + self._shape[0]) * (self._shape[1] | np.uint64(1))
        words ^= words >> np.uint64(29)
        words *= np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(32)
        tokens: Int32s = (words % np.uint64(self._spec.vocab_size)).astype(np.int32)
        return tokens
