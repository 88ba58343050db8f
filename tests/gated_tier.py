"""A backing tier that says what was read, waits when told to, and fails when told to."""

from __future__ import annotations

import threading
import time
from functools import cache

import numpy as np
from arenas import keys_of
from conftest import small_v41
from dict_tier import DictTier

from engram.ram.layout import STAGED_HEAD_BYTES, BundleLayout
from engram.ram.memory import Memory
from engram.ram.staged import Staged
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat, Rows
from engram.tiers import Ngrams, Selection

SPEC = small_v41()
FORMAT = RowFormat("fp8-ue8m0", SPEC.dim)
EVERYTHING = Selection.of(SPEC)
BUNDLE = BundleLayout.of(SPEC, FORMAT)
SEED = 5


class Gate:
    """Open at first; when shut, only as many pass as are let through."""

    def __init__(self):
        self._changed = threading.Condition()
        self._open, self._passes = True, 0

    def shut(self):
        with self._changed:
            self._open = False

    def open(self):
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def let(self, count):
        with self._changed:
            self._passes += count
            self._changed.notify_all()

    def wait(self):
        with self._changed:
            assert self._changed.wait_for(lambda: self._open or self._passes, 60)
            if not self._open:
                self._passes -= 1


class GatedTier(DictTier):
    """The model tier, watched.

    Attributes:
        calls: n-grams of each `read`, as tuples.
        gate: reads wait here.
        broken: errors by n-gram, raised by reads of it.
    """

    def __init__(self, damaged=()):
        super().__init__(SPEC, FORMAT, SEED, damaged)
        self.calls = []
        self.gate = Gate()
        self.broken = {}

    def read(self, ngrams, selection, out, places):
        keys = keys_of(ngrams)
        self.calls.append(keys)
        self.gate.wait()
        for key in keys:
            if key in self.broken:
                raise self.broken[key]
        super().read(ngrams, selection, out, places)


def ram_tier(budget=1 << 20, damaged=()):
    """A RAM tier over a `GatedTier`."""
    return ram_tiers({"table": GatedTier(damaged)}, budget, shared=False)["table"]


def some_ngrams(first, count):
    """`count` n-grams, of all orders in turn; the same number is always the same n-gram."""
    windows = np.full((count, SPEC.max_order), -1, np.int32)
    orders = 2 + np.arange(first, first + count, dtype=np.int32) % 3
    for n, order in enumerate(orders.tolist()):
        windows[n, :order] = ((first + n) % 400, (first + n) // 400, 7, 9)[:order]
    return Ngrams(windows, orders)


@cache
def _bundle_of(key):
    windows = np.full((1, SPEC.max_order), -1, np.int32)
    windows[0, : len(key)] = key
    ngrams = Ngrams(windows, np.array([len(key)], np.int32))
    rows = Rows.empty((len(SPEC.layers), SPEC.heads), FORMAT)
    flat = rows.reshape((len(SPEC.layers) * SPEC.heads,))
    DictTier(SPEC, FORMAT, SEED).read(ngrams, EVERYTHING, flat, np.arange(len(flat.values)))
    layers = len(SPEC.layers)
    parts = [part.reshape(layers, -1) for part in (rows.values, rows.scales)]
    return np.concatenate(parts, axis=1).reshape(-1)


class Asked:
    """A caller of `MissPath.read` in a thread of its own.

    Attributes:
        failures, error: what came of it, once `done`.
    """

    def __init__(self, tier, ngrams, request_id=1, timeout_s=60.0):
        self.tier, self.ngrams, self.request_id = tier, ngrams, request_id
        self.memory = Memory.private(max(1, len(ngrams)) * BUNDLE.staged_bytes)
        self.failures = self.error = None
        self._timeout_s = timeout_s
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.failures = self.tier.misses.read(
                self.ngrams,
                self.memory.address,
                request_id=self.request_id,
                timeout_s=self._timeout_s,
            )
        except BaseException as error:
            self.error = error

    def done(self):
        """Wait for its end; itself."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self

    @property
    def over(self):
        return not self._thread.is_alive()

    def require_staged(self, but=()):
        """Every entry must be an answer, and every bundle right but those of the keys `but`."""
        assert self.error is None
        number = self.tier.number
        signed_id = int(np.uint64(self.request_id).astype(np.int64))  # what kernels take
        staged = Staged(self.ngrams, number, BUNDLE, self.memory.address, signed_id)
        assert staged.whole()
        entries = self.memory.bytes().reshape(-1, BUNDLE.staged_bytes)
        for entry, key in zip(entries, keys_of(self.ngrams), strict=True):
            if key not in but:
                found = entry[STAGED_HEAD_BYTES + BUNDLE.head_bytes :]
                expected = _bundle_of(key)
                assert np.array_equal(found[: len(expected)], expected)

    @property
    def untouched(self):
        """Whether nothing was ever written for it."""
        return not self.memory.bytes().any()


def until(condition):
    """Wait for another thread to get somewhere."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def held_up(tier, ngrams):
    """Somebody whose reading does not end before the gate lets it."""
    calls = len(tier.backing.calls)
    tier.backing.gate.shut()
    first = Asked(tier, ngrams)
    until(lambda: len(tier.backing.calls) > calls)
    return first


def waiting(tier, count):
    """Wait until `count` requests wait for their turn."""
    until(lambda: len(tier.misses._waiting) == count)
