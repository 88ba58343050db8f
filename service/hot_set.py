"""Restart without forgetting: which n-grams were in memory, on disk, and read again at the start.

A list holds n-grams only, those that came again first; rows are read from the table and verified as
ever. It is a trace of one lookup (`engram.sizing.trace`), so that `engram warm` reads it, too.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engram.errors import ConfigError, EngramError, TraceError
from engram.ram.keys import keys_of
from engram.ram.tier import RamTier
from engram.service.config import HotSetConfig
from engram.sizing.trace import Trace, read_trace, write_trace
from engram.tiers import Ngrams, Tier

NGRAMS_MAX = 1 << 24
"""Of one list: a file of 300 MB or so."""
CHUNK_NGRAMS = 2048
SUFFIX = ".hotset"

_log = logging.getLogger("engram.service")


def trace_of(tier: Tier, ngrams: Ngrams) -> Trace:
    """N-grams as if one lookup had asked for them."""
    count = len(ngrams)
    lookups = np.full((1 if count else 0, 3), count, np.int64)
    return Trace(
        fingerprint=tier.fingerprint,
        spec_digest=tier.spec.digest,
        level=0,
        min_order=tier.spec.min_order,
        lookups=lookups,
        windows=ngrams.windows,
        orders=ngrams.orders.astype(np.uint8),
        tokens=count,
        accesses=count,
    )


def ngrams_of(trace: Trace) -> Ngrams:
    """The n-grams of a trace, each once, in the order of their first appearance."""
    keys = np.column_stack([trace.orders.astype(np.int32), trace.windows])
    _, firsts = np.unique(keys, axis=0, return_index=True)
    firsts.sort()
    return Ngrams(trace.windows[firsts], trace.orders[firsts].astype(np.int32))


def prefetch_slowly(
    tier: Tier,
    ngrams: Ngrams,
    per_second: float,
    wait: Callable[[float], bool],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Prefetch n-grams a part at a time.

    Args:
        per_second: n-grams, at most.
        wait: sleeps for some seconds; True to stop.
        progress: told (n-grams asked for, n-grams in all).

    Returns:
        how many were asked for.

    Raises: as `Tier.prefetch`.
    """
    for first in range(0, len(ngrams), CHUNK_NGRAMS):
        some = ngrams.take(slice(first, first + CHUNK_NGRAMS))
        tier.prefetch(some)
        progress(first + len(some), len(ngrams))
        if wait(len(some) / per_second):
            return first + len(some)
    return len(ngrams)


class HotSets:
    """Reads the lists of all tables, and then writes them every while and at `stop`.

    Args:
        tiers: by the name under which each is served.
        config: where and how often.

    Raises:
        ConfigError: nothing can be written there.
    """

    def __init__(self, tiers: Mapping[str, RamTier], config: HotSetConfig) -> None:
        self._tiers = dict(tiers)
        self._config = config
        if not os.access(config.directory, os.W_OK | os.X_OK):
            raise ConfigError(
                f"hotset.directory: {config.directory} is no directory that this user can write "
                "to; make it, or leave [hotset] out"
            )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engram-hotset", daemon=True)

    def start(self) -> None:
        """Begin to read, in a thread that gives way to lookups."""
        self._thread.start()

    def stop(self) -> None:
        """Write the lists a last time. Safe to call twice, and without `start`."""
        if self._thread.ident is None or self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        self._write_all()

    def _run(self) -> None:
        for name, tier in self._tiers.items():
            self._read(name, tier)
        while not self._over.wait(self._config.every_seconds):
            self._write_all()

    def _path(self, name: str) -> Path:
        return self._config.directory / f"{name}{SUFFIX}"

    def _read(self, name: str, tier: RamTier) -> None:
        path = self._path(name)
        if not path.exists():
            return
        try:
            trace = read_trace(path)
            trace.require_table(tier.fingerprint, name)
            ngrams = ngrams_of(trace).take(slice(0, tier.cache.layout.slots))
            asked = prefetch_slowly(tier, ngrams, self._config.ngrams_per_second, self._over.wait)
            _log.info("%s: %d n-grams of its last life asked for", name, asked)
        except TraceError as error:
            _log.warning("%s begins with an empty memory: %s", name, error)
        except EngramError as error:
            _log.warning("%s: warming up ended: %s", name, error)

    def _write_all(self) -> None:
        for name, tier in self._tiers.items():
            try:
                most = min(NGRAMS_MAX, tier.cache.layout.slots)
                ngrams = keys_of(tier.cache, tier.number, most)
                write_trace(self._path(name), trace_of(tier, ngrams), replace=True)
            except (OSError, EngramError) as error:
                _log.error("the hot set of %s could not be written: %s", name, error)
