"""A process that reads an arena which another one writes: for `test_interleaving`.

It gets descriptors and sizes as JSON in its first argument, then a command a line: a mode and how
long to go on. It answers each with a line of JSON counts.
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from types import SimpleNamespace

import numpy as np
from arenas import MIN_ORDER, ORDERS, Arena, ArenaReader, bundle_bytes

from engram.ram.layout import ArenaLayout, BundleLayout
from engram.ram.memory import SEALS_OF_READER, SEALS_OF_WRITER, Memory
from engram.rows import Rows
from engram.tiers import Selection

SECONDS_MAX = 30
"""Longest run of one command, however slow the machine."""
_TOKENS = 24


def universe():
    """int32 `[12, 3]` windows, whose n-grams are all that is ever written."""
    return np.array([[n, n % 3, 7] for n in range(12)], np.int32)


class Reader:
    """The arena, mapped from what the writer handed over."""

    def __init__(self, offer):
        self.bundle = BundleLayout(**offer["bundle"])
        layout = ArenaLayout(**offer["layout"])
        self.arena = SimpleNamespace(
            layout=layout,
            seed=offer["seed"],
            bundles=(self.bundle,),
            slabs=[
                Memory.received(descriptor, layout.slab_bytes(n), SEALS_OF_WRITER)
                for n, descriptor in enumerate(offer["slabs"])
            ],
            directories=[
                Memory.received(offer["directory"], layout.directory_bytes, SEALS_OF_WRITER)
            ],
        )
        self.memory = Memory.received(
            offer["reader"], layout.reader_bytes, SEALS_OF_READER, writable=True
        )
        self.tier = ArenaReader(self.arena, memory=self.memory)
        self.tier._content = cache(lambda key: bundle_bytes(0, key, self.bundle))
        self.rng = np.random.default_rng(0)
        self.windows = universe()
        heads = ORDERS * self.bundle.heads
        self.selection = Selection(
            tuple(range(self.bundle.layers)),
            tuple(range(heads)),
            self.bundle.heads,
            MIN_ORDER,
            ORDERS,
        )
        self.contents = np.stack(
            [
                [bundle_bytes(0, window[:order], self.bundle) for order in (2, 3)]
                for window in self.windows.tolist()
            ]
        )
        self.expected = self._rows_of(self.contents)

    def _rows_of(self, contents):
        """uint8 `[windows, layers, columns, bytes]` values, and scales, of all windows."""
        bundle = self.bundle
        parts = contents.reshape(len(contents), ORDERS, bundle.layers, bundle.layer_bytes)
        split = bundle.heads * bundle.value_bytes
        shape = (len(contents), bundle.layers, ORDERS * bundle.heads, -1)
        return tuple(
            np.ascontiguousarray(part.transpose(0, 2, 1, 3)).reshape(shape)
            for part in (parts[..., :split], parts[..., split:])
        )

    def lookups(self, count):
        """Whole lookups: every row of every token must be right, hit or miss."""
        bundle, wrong, reads = self.bundle, 0, 0
        rows = _TOKENS * bundle.layers * ORDERS * bundle.heads
        out = Rows(
            np.empty((rows, bundle.value_bytes), np.uint8),
            np.empty((rows, bundle.scale_bytes), np.uint8),
        )
        before = int(self.memory.words(9)[8])
        while reads < count and not self.late():
            picked = self.rng.integers(0, len(self.windows), _TOKENS)
            self.tier.fetched.clear()
            self.tier.lookup(self.windows[picked], self.selection, out)
            for found, expected in zip((out.values, out.scales), self.expected, strict=True):
                there = found.reshape(expected[picked].shape) == expected[picked]
                wrong += int((~there).any(axis=-1).sum())
            reads += ORDERS * _TOKENS
        return {"reads": reads, "wrong": wrong, "hits": int(self.memory.words(9)[8]) - before}

    def careless(self, count):
        """Negative control: copies of whole slots that nobody asks about again, without an epoch;
        ends with the first wrong one."""
        wrong = reads = 0
        arena = Arena(self.arena)
        while reads < count and not wrong and not self.late():
            slots = self.tier.probe(self.windows)
            for window, o in np.argwhere(slots >= 0):
                copied = arena.bundle(slots[window, o]).copy()
                wrong += not np.array_equal(copied, self.contents[window, o])
                reads += 1
        return {"reads": reads, "wrong": wrong, "hits": reads}

    def in_place(self, count, *, patient=True):
        """Find slots under an epoch, then look at their bytes again and again, never at heads."""
        wrong = reads = 0
        arena = Arena(self.arena)
        while reads < count and (patient or not wrong) and not self.late():
            with self.tier.holding():
                slots = self.tier.probe(self.windows)
                held = [
                    (arena.bundle(slots[window, o]), self.contents[window, o])
                    for window, o in np.argwhere(slots >= 0)
                ]
                for _ in range(30):
                    wrong += sum(not np.array_equal(found, known) for found, known in held)
                    reads += len(held)
        return {"reads": reads, "wrong": wrong, "hits": reads}

    def late(self):
        return time.monotonic() > self.deadline

    def answer(self, mode, count):
        self.deadline = time.monotonic() + SECONDS_MAX
        return {
            "lookups": self.lookups,
            "careless": self.careless,
            "in_place": self.in_place,
            "in_place_until_wrong": lambda count: self.in_place(count, patient=False),
        }[mode](count)


def main():
    reader = Reader(json.loads(sys.argv[1]))
    reader.answer("lookups", 1)  # compiles
    reader.tier.probe(reader.windows)
    with reader.tier.holding():
        pass
    print("ready", flush=True)
    for line in sys.stdin:
        mode, count = line.split()
        print(json.dumps(reader.answer(mode, int(count))), flush=True)


if __name__ == "__main__":
    main()
