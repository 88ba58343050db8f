"""How many random reads a drive does."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from pathlib import Path

from engram.errors import ConfigError
from engram.store.layout import PAGE_BYTES

_THREADS = 32


def reads_per_second(path: Path, seconds: float = 1.0) -> float:
    """4 KiB random reads a second of a file, past the page cache, which keeps what it has.

    By `_THREADS` Python threads, so of a fast drive it is a lower bound.

    Raises:
        ConfigError: the file is too small, or the file system has no direct reads.
    """
    pages = path.stat().st_size // PAGE_BYTES
    if not pages:
        raise ConfigError(f"{path} is too small to measure; name the drive's rate with --iops")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        raise ConfigError(
            f"the drive of {path} cannot be measured here; name its reads a second with --iops"
        ) from None
    counts: list[int] = []
    try:
        threads = [
            threading.Thread(target=_read, args=(descriptor, pages, seconds, number, counts))
            for number in range(_THREADS)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
    finally:
        os.close(descriptor)
    if not sum(counts):
        raise ConfigError(f"{path} could not be read directly; name the drive's rate with --iops")
    return sum(counts) / took


def _read(descriptor: int, pages: int, seconds: float, seed: int, counts: list[int]) -> None:
    choose, count = random.Random(seed), 0
    until = time.monotonic() + seconds
    # Direct reads want memory that begins at a page.
    with mmap.mmap(-1, PAGE_BYTES) as room:
        while time.monotonic() < until:
            try:
                os.preadv(descriptor, [room], choose.randrange(pages) * PAGE_BYTES)
            except OSError:
                return
            count += 1
    counts.append(count)
