"""Counts of readers that come, go and lie."""

from __future__ import annotations

import numpy as np
import pytest

from engram.ram.layout import (
    PAGE_BYTES,
    WORD_HITS,
    WORD_LOOKUPS,
    WORD_ON_DEVICE,
    WORD_STAGED,
)
from engram.ram.memory import Memory
from engram.ram.reader_counts import ReaderCounts, read_counts


@pytest.fixture
def pages():
    return [Memory.private(PAGE_BYTES) for _ in range(4)]


def _words(page):
    return page.words(WORD_STAGED + 1)


def test_counters_share_one_line():
    assert {word // 8 for word in range(WORD_HITS, WORD_STAGED + 1)} == {1}


def test_what_readers_counted_stays_when_they_go(pages):
    own, *others = pages
    counts = ReaderCounts(own)
    for page in others:
        counts.add(page)
    for number, page in enumerate(pages, 1):
        _words(page)[WORD_HITS] = 10**number
        _words(page)[WORD_ON_DEVICE] = number
    for page in others:
        counts.remove(page)
        counts.remove(page)
        assert (counts.read()["hits"], counts.read()["on_device"]) == (11110, 10)
    _words(others[0])[WORD_HITS] += 5
    _words(own)[WORD_LOOKUPS] += 1
    assert counts.read() == {
        **dict.fromkeys(read_counts(own), 0),
        "lookups": 1,
        "hits": 11110,
        "on_device": 10,
    }


def test_sums_never_fall_and_stay_numbers_whatever_a_reader_writes(pages):
    own, liar, *_ = pages
    counts = ReaderCounts(own)
    counts.add(liar)
    _words(own)[WORD_HITS] = 3
    numbers, before = np.random.default_rng(1), 0
    for _ in range(200):
        _words(liar)[:] = numbers.integers(0, 2**64, WORD_STAGED + 1, np.uint64)
        if numbers.random() < 0.5:
            _words(liar)[:] >>= np.uint64(numbers.integers(0, 63))
        now = counts.read()["hits"]
        assert before <= now < 2**53 + 3
        before = now
    _words(liar)[:] = 0
    counts.remove(liar)
    assert counts.read()["hits"] == before
