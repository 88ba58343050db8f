"""A client process of `bench_long`: does one command a line of standard input, and answers each.

python long_client.py '{"target": .., "text_tokens": .., "sources": .., "slots": ..}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bundle_copies import copy_bundles
from machine import microseconds, status_bytes
from texts import Piece, Text

import engram
from engram.bench import checksum, random_tokens
from engram.ram.copies import Copies
from engram.ram.layout import BundleLayout
from engram.rows import Rows
from engram.table import Table
from engram.tiers import Selection

CHUNK_TOKENS = 2048


def slots_of(table: Table, text: Text) -> tuple[Any, int]:
    """A random slot for each n-gram of a text: int64 `[T, orders]`, and how many there are."""
    tokens = text.piece(0, len(text))
    windows = table.spec.windows(tokens.tokens, history=tokens.history)
    slots, count = [], 0
    for order in range(table.spec.min_order, table.spec.max_order + 1):
        _, number = np.unique(windows[:, :order], axis=0, return_inverse=True)
        slots.append(count + number.reshape(-1))
        count += int(number.max()) + 1
    shuffled = np.random.default_rng(0).permutation(count)
    return shuffled[np.stack(slots, axis=1)], count


class Client:
    """What commands do; each answers with facts.

    Args:
        target: of the sidecar.
        text_tokens: length of the text that its arena holds.
        sources: file of as many slots of bundles as the text has n-grams, without zeros.
    """

    def __init__(self, target: str, text_tokens: int, sources: str) -> None:
        self._table = engram.connect(target)
        spec = self._table.spec
        self._text = Text(text_tokens, spec.max_order - 1)
        self._pieces: dict[int, list[Piece]] = {}
        self._slots, _ = slots_of(self._table, self._text)
        self._sources = np.memmap(Path(sources), np.uint8, "r")
        self._sources.sum()  # maps it
        self._bundle = BundleLayout.of(spec, self._table.row_format)
        self._copies = Copies.of(self._bundle, Selection.of(spec))
        self._outs: dict[int, Rows] = {}

    def warm(self) -> dict[str, Any]:
        """Read the text until no more of it gets into the arena."""
        misses = [len(self._text) * self._table.spec.num_orders]
        while len(misses) < 2 or misses[-1] < misses[-2]:
            before = self._misses()
            for piece in self._text.pieces(CHUNK_TOKENS):
                self._look_up(piece)
            misses.append(self._misses() - before)
        return {"misses": misses[-1] / misses[0]}

    def prompt(self, first: int, tokens: int) -> dict[str, Any]:
        """Read a prompt in chunks, each with the tokens before it as history."""
        spent_us, largest, sums = 0.0, 0, []
        before = self._misses()
        for at in range(first, first + tokens, CHUNK_TOKENS):
            piece = self._text.piece(at, min(CHUNK_TOKENS, first + tokens - at))
            spent_us += microseconds(lambda p=piece: self._look_up(p))  # type: ignore[misc]
            largest = max(largest, status_bytes("RssAnon"))
        out = self._room(min(CHUNK_TOKENS, tokens))
        sums.append(checksum(out.values, out.scales))
        return {
            "ns_per_token": spent_us / tokens * 1000,
            "misses": self._share(before, tokens),
            "rss_anon": largest,
            "checksum": checksum(*sums),
        }

    def hits(self, seconds: float, tokens: int, first: int) -> dict[str, Any]:
        """Look up piece after piece for some seconds."""
        pieces = self._cut(tokens)
        before = self._misses()
        answer = self._for(
            seconds, tokens, lambda number: self._look_up(pieces[(first + number) % len(pieces)])
        )
        misses = self._share(before, answer["lookups"] * tokens)
        self._look_up(pieces[0])
        out = self._room(tokens)
        return {**answer, "misses": misses, "checksum": checksum(out.values, out.scales)}

    def copy(self, seconds: float, tokens: int, first: int) -> dict[str, Any]:
        """Copy as many bundles, in the same order, from known slots."""
        out, size = self._room(tokens), len(self._slots) // tokens
        values = out.values.reshape(-1)
        scales = np.empty(0, np.uint8) if out.scales is None else out.scales.reshape(-1)

        def one(number: int) -> None:
            at = (first + number) % size * tokens
            copy_bundles(
                self._sources,
                self._bundle.slot_bytes,
                self._slots[at : at + tokens],
                self._copies.pieces,
                self._copies.bounds,
                values,
                scales,
            )

        for part in (values, scales):
            part.fill(0)
        answer = self._for(seconds, tokens, one)
        if not (values.all() and scales.all()):
            raise SystemExit("the copy left some bytes out")
        return answer

    def churn(self, seconds: float, seed: int) -> dict[str, Any]:
        """Miss all the time: random tokens, each looked up once, and others prefetched."""
        spec, ends, number = self._table.spec, time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            ids = random_tokens(spec, 2 * CHUNK_TOKENS, seed * 1_000_000 + number)
            self._table.prefetch(ids[CHUNK_TOKENS:])
            self._table.lookup(ids[:CHUNK_TOKENS], out=self._room(CHUNK_TOKENS))
            number += 1
        return {"lookups": number}

    def _for(self, seconds: float, tokens: int, work: Callable[[int], None]) -> dict[str, Any]:
        out = self._room(tokens)
        each = out.values.nbytes + (0 if out.scales is None else out.scales.nbytes)
        began = time.perf_counter()
        number = 0
        while (now := time.perf_counter()) < began + seconds:
            work(number)
            number += 1
        return {"bytes_per_s": number * each / (now - began), "lookups": number}

    def _cut(self, tokens: int) -> list[Piece]:
        if tokens not in self._pieces:
            self._pieces[tokens] = self._text.pieces(tokens)
        return self._pieces[tokens]

    def _look_up(self, piece: Piece) -> None:
        self._table.lookup(piece.tokens, history=piece.history, out=self._room(len(piece.tokens)))

    def _room(self, tokens: int) -> Rows:
        if tokens not in self._outs:
            shape = (tokens, len(self._table.layers), len(self._table.columns))
            self._outs[tokens] = Rows.empty(shape, self._table.row_format)
        return self._outs[tokens]

    def _share(self, before: int, tokens: int) -> float:
        """Misses since there were `before`, as a share of the n-grams of so many tokens."""
        return (self._misses() - before) / (tokens * self._table.spec.num_orders)

    def _misses(self) -> int:
        return int(self._table.stats()["tiers"][0]["misses"])


def main(arguments: list[str]) -> None:
    """Answer commands, JSON objects with `do` and its keyword arguments."""
    client = Client(**json.loads(arguments[0]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(client, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
