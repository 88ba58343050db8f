"""What tests of attached clients share."""

from __future__ import annotations

import time

import numpy as np

TOKENS = np.arange(40)
SECONDS_MAX = 30


def until(condition):
    """Wait for it, a little at a time."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def until_there(table, windows):
    """Wait until the RAM tier has all n-grams of `windows`."""
    until(lambda: table._tier.probe(windows).min() >= 0)


def stats_of(table):
    return table.stats()["tiers"][0]


def same(table, exact, tokens=TOKENS, **selection):
    """Whether both tables give the same rows, bit for bit."""
    found, wanted = (each.lookup(tokens, **selection) for each in (table, exact))
    return np.array_equal(found.packed(), wanted.packed())
