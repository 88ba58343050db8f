"""Real text as one endless stream, and its pieces as a lookup takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.demo.corpus import source_tokens

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """Arguments of one lookup.

    Attributes:
        tokens: int32 `[T]`.
        history: int32 `[1, max_order - 1]`, the tokens just before.
    """

    tokens: Int32s
    history: Int32s


class Text:
    """Real text that begins again at its end, so it has a bounded number of n-grams.

    Args:
        tokens: its length.
        context: tokens of history that a lookup wants, `max_order - 1`.
        seed: another one gives another text.
    """

    def __init__(self, tokens: int, context: int, seed: int = 0) -> None:
        self.tokens = np.resize(np.concatenate(source_tokens(tokens, seed)), tokens)
        self._context = context

    def __len__(self) -> int:
        return len(self.tokens)

    def piece(self, first: int, count: int) -> Piece:
        """`count` tokens from `first` on, with those before."""
        places = np.arange(first - self._context, first + count) % len(self.tokens)
        found = self.tokens[places]
        return Piece(found[self._context :], found[None, : self._context])

    def pieces(self, count: int) -> list[Piece]:
        """The whole text, `count` tokens each."""
        return [self.piece(first, count) for first in range(0, len(self.tokens), count)]
