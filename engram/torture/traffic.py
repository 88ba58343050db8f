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
LONG_TOKENS = (8193, 9000)
_FRESH_TOKENS_MAX = 256
_EVEN_MAX = (8, 40)
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

    def decode(self, sequences: int | None = None) -> Batch:
        """The next token of each of some sequences, 1 to 64 when None."""
        least, most = DECODE_SEQUENCES
        count = sequences or int(self._rng.integers(least, most + 1))
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
        return Batch(tokens, starts, self._none_before(1))

    def fresh(self) -> Batch:
        """Up to 256 tokens in a row such as nobody else has."""
        tokens = self._new(int(self._rng.integers(1, _FRESH_TOKENS_MAX + 1)))
        return Batch(tokens, np.array([0, len(tokens)], np.int32), self._none_before(1))

    def even(self) -> Batch:
        """1 to 8 sequences of the same length, without dead positions."""
        count, length = (int(self._rng.integers(1, most + 1)) for most in _EVEN_MAX)
        starts = np.arange(count + 1, dtype=np.int32) * length
        history = self._text(count * self._context).reshape(count, -1)
        return Batch(self._text(count * length), starts.astype(np.int32), history)

    def empty(self) -> Batch:
        """No token, of no, one or two sequences."""
        count = int(self._rng.integers(3))
        starts = np.zeros(count + 1, np.int32)
        return Batch(np.empty(0, np.int32), starts, self._none_before(count))

    def long(self) -> Batch:
        """One sequence that is longer than what tiers look up at once."""
        tokens = self._text(int(self._rng.integers(*LONG_TOKENS)))
        return Batch(tokens, np.array([0, len(tokens)], np.int32), self._none_before(1))

    def _none_before(self, sequences: int) -> Int32s:
        return np.full((sequences, self._context), -1, np.int32)

    def _new(self, *shape: int) -> Int32s:
        """Tokens that come from nowhere."""
        return self._rng.integers(0, self._spec.vocab_size, shape).astype(np.int32)

    @property
    def _context(self) -> int:
        return self._spec.max_order - 1

    def _text(self, count: int) -> Int32s:
        """int32 `[count]`: phrases one after another."""
        phrases = -(-count // _PHRASE_TOKENS)
        ranks = np.searchsorted(self._bounds, self._rng.random(phrases)).astype(np.uint64)
        tokens = self._phrases(ranks)
        fresh = self._rng.random(phrases) < UNIFORM
        tokens[fresh] = self._new(int(fresh.sum()), _PHRASE_TOKENS)
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
