"""Where n-grams were found lately: what the status page draws over time."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus

from engram.ram.tier import RamTier
from engram.service._http import Answer

EVERY_S = 10.0
KEPT = 360
"""Readings kept of each table: an hour."""


_Reading = tuple[float, dict[str, tuple[int, int, int]]]
"""When, and n-grams that the gpu, ram and ssd tiers had served of each table."""


class History:
    """Reads how many n-grams each tier served, every `EVERY_S` seconds, until `stop`.

    Args:
        tiers: by the name under which each is served.
    """

    def __init__(self, tiers: Mapping[str, RamTier]) -> None:
        self._tiers = dict(tiers)
        self._readings: deque[_Reading] = deque(maxlen=KEPT)
        self._over = threading.Event()
        self._readings.append(self._reading())
        self._thread = threading.Thread(target=self._run, name="engram-history", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Safe to call twice."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self._readings.append(self._reading())

    def _reading(self) -> _Reading:
        served = {}
        for name, tier in self._tiers.items():
            counts = tier.cache.counts(tier.number)
            found = counts["hits"] + counts["in_place"]
            served[name] = (counts["on_device"], found, counts["misses"] + counts["staged"])
        return time.monotonic(), served

    def page(self, headers: Mapping[str, str]) -> Answer:
        """JSON: for each table `[seconds ago, gpu, ram, ssd]`, n-grams that each tier had served
        then, since the start, oldest first; the last one is of now."""
        readings = [*self._readings, self._reading()]
        now, _ = readings[-1]
        tables = {
            name: [[round(now - at, 1), *served[name]] for at, served in readings]
            for name in self._tiers
        }
        body = json.dumps({"every_seconds": EVERY_S, "tables": tables}, separators=(",", ":"))
        return Answer(HTTPStatus.OK, body.encode(), "application/json")
