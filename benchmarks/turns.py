"""Calls that are compared, taking turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable

IGNORED, COUNTED = 10, 20
"""Calls of a block."""
_PAUSE_S = 0.02
"""Longer than torch's threads stay awake after a copy."""


def in_turns(calls: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Microseconds of each call, taking turns in blocks.

    After a call to torch its threads go on spinning on the other cores for a while. So that
    whoever comes next is measured without them, there is a pause between blocks, in which this
    core stays busy, because a virtual one takes milliseconds to come back to its speed; and the
    first calls of each do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(-(-runs // COUNTED)):
        for name, call in calls.items():
            until = time.perf_counter() + _PAUSE_S
            while time.perf_counter() < until:
                pass
            times[name] += [call() for _ in range(IGNORED + COUNTED)][IGNORED:]
    return times


def _time(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6
