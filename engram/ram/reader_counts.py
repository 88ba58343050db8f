"""What readers count in their pages, summed over all that ever were."""

from __future__ import annotations

from engram.ram.layout import (
    WORD_HITS,
    WORD_IN_PLACE,
    WORD_LOOKUPS,
    WORD_MISSES,
    WORD_ON_DEVICE,
    WORD_STAGED,
)
from engram.ram.memory import Memory

_WORDS = {
    "lookups": WORD_LOOKUPS,
    "hits": WORD_HITS,
    "misses": WORD_MISSES,
    "on_device": WORD_ON_DEVICE,
    "in_place": WORD_IN_PLACE,
    "staged": WORD_STAGED,
}
_COUNT_MAX = 1 << 53
"""What no reader reaches, and the last whole number that a metric can show exactly."""


def read_counts(reader: Memory) -> dict[str, int]:
    """What a reader counted: lookups and steps; n-grams of its tokens by where they were.

    `hits` and `misses` are of lookups that copy, `on_device`, `in_place` (in the arena) and
    `staged` of steps on a device.
    """
    words = reader.words(1 + max(_WORDS.values()))
    return {name: int(words[word]) for name, word in _WORDS.items()}


class ReaderCounts:
    """Counts of a table's readers, those that are gone included. They never fall, whatever a
    reader writes into its page. Not safe for several threads at once.

    Args:
        own: the page of the process that writes the arena.
    """

    def __init__(self, own: Memory) -> None:
        self._gone = dict.fromkeys(_WORDS, 0)
        self._living = {own: dict.fromkeys(_WORDS, 0)}

    def add(self, reader: Memory) -> None:
        """Count what a reader counts, from now on."""
        self._living[reader] = dict.fromkeys(_WORDS, 0)

    def remove(self, reader: Memory) -> None:
        """Keep what a reader counted, and read its page no more. Safe if it is not known."""
        if reader in self._living:
            for name, count in self._seen(reader).items():
                self._gone[name] += count
            del self._living[reader]

    def read(self) -> dict[str, int]:
        """As `read_counts`, of all readers."""
        total = dict(self._gone)
        for reader in self._living:
            for name, count in self._seen(reader).items():
                total[name] += count
        return total

    def _seen(self, reader: Memory) -> dict[str, int]:
        seen = self._living[reader]
        for name, count in read_counts(reader).items():
            if seen[name] < count < _COUNT_MAX:
                seen[name] = count
        return seen
