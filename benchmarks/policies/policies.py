"""The policies by name, and what each one misses on a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orders
import rings
from queues import GHOST, MAIN, NOWHERE, PROTECTED, SMALL, State, empty_state, kernel

Missed = npt.NDArray[np.uint8]
_NO_SKETCH = np.zeros((1, 1), np.uint8)


@dataclass(frozen=True)
class Policy:
    """A policy and its parameters.

    Attributes:
        name: as printed.
        touch, admit: kernels for a hit and for a miss.
        state: makes the empty state for a number of n-grams and a capacity.
        possible: whether touched counts seen at eviction suffice for it.
        slot_bytes: what the writer keeps per slot beside key and sequence.
        ghost_bytes: the same for what is remembered without being resident, as fingerprints.
    """

    name: str
    touch: Any
    admit: Any
    state: Callable[[int, int], State]
    possible: bool
    slot_bytes: float
    ghost_bytes: float = 0.0


@kernel
def _replay(keys, starts, touch, admit, sample, state, missed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """A batch is looked up as a whole, then its misses come in; one hit in `sample` is noted."""
    for batch in range(len(starts) - 1):
        for i in range(starts[batch], starts[batch + 1]):
            missed[i] = state.home[keys[i]] in (NOWHERE, GHOST)
            if not missed[i] and i % sample == 0:
                touch(state, keys[i])
        for i in range(starts[batch], starts[batch + 1]):
            if missed[i]:
                admit(state, keys[i])


@kernel
def _replay_prefetched(keys, starts, touch, admit, state, missed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """A batch's misses are all admitted ahead of it; then all its n-grams are hits, once each."""
    for batch in range(len(starts) - 1):
        for i in range(starts[batch], starts[batch + 1]):
            missed[i] = state.home[keys[i]] in (NOWHERE, GHOST)
            if missed[i]:
                admit(state, keys[i])
        for i in range(starts[batch], starts[batch + 1]):
            if state.home[keys[i]] not in (NOWHERE, GHOST):
                touch(state, keys[i])


def misses(
    policy: Policy,
    keys: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    capacity: int,
    sample: int = 1,
    prefetched: bool = False,
) -> Missed:
    """Which accesses miss: uint8 `[A]`.

    Args:
        keys: int32 `[A]` dense n-gram numbers.
        starts: int64 `[B + 1]` boundaries of the batches.
        capacity: resident n-grams at most, at least 1.
        sample: only one hit of so many is noted.
        prefetched: misses are admitted before their batch, so that its lookup touches them.
    """
    if capacity < 1:
        raise ValueError(f"capacity {capacity}: give at least one slot")
    missed = np.zeros(len(keys), np.uint8)
    state = policy.state(int(keys.max(initial=0)) + 1, capacity)
    if prefetched:
        _replay_prefetched(keys, starts, policy.touch, policy.admit, state, missed)
    else:
        _replay(keys, starts, policy.touch, policy.admit, sample, state, missed)
    return missed


def optimum_misses(
    keys: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], capacity: int
) -> Missed:
    """As `misses`, with the future known (Belady's MIN, with bypass): nothing can miss less."""
    count = int(keys.max(initial=0)) + 1
    missed = np.zeros(len(keys), np.uint8)
    later = np.empty(len(keys), np.int32)
    orders.next_uses(keys, np.full(count, len(keys), np.int32), later)
    held, heap = np.zeros(count, np.uint8), np.empty(len(keys) + 1, np.int32)
    orders.optimum(keys, starts, later, capacity, held, heap, missed)
    return missed


def lru() -> Policy:
    return Policy("LRU", orders.lru_touch, orders.lru, _plain(0), False, 8)


def fifo() -> Policy:
    return Policy("FIFO", rings.touch, rings.clock, _plain(0), True, 0)


def clock(bits: int) -> Policy:
    state = _plain((1 << bits) - 1)
    return Policy(f"CLOCK, {bits} bit", rings.touch, rings.clock, state, True, bits / 8)


def sieve() -> Policy:
    """The queue keeps its order when a middle entry goes, so it must be linked."""
    return Policy("SIEVE", rings.touch, rings.sieve, _plain(1, -1), True, 8 + 1 / 8)


def doorkeeper(bits: int, ghosts: float) -> Policy:
    def state(keys: int, capacity: int) -> State:
        limits = {NOWHERE: capacity, GHOST: _share(ghosts, capacity)}
        return empty_state(keys, limits, [(1 << bits) - 1], _NO_SKETCH)

    name = f"second miss, ghosts {ghosts:g}x, CLOCK {bits} bit"
    return Policy(name, rings.touch, rings.doorkeeper, state, True, bits / 8, 2 * ghosts)


def s3fifo(
    small: float = 0.25,
    promote: int = 2,
    ghosts: float = 1.0,
    cap: int = 3,
    table: bool = False,
    clear: bool = False,
) -> Policy:
    """S3-FIFO.

    Args:
        small: share of the small queue.
        promote: touches that move an n-gram from the small queue to the main one.
        ghosts: n-grams remembered, per slot.
        cap: touches counted at most.
        table: remember 16-bit fingerprints in buckets of 16 instead of exact keys in order.
        clear: a touched n-gram of the main queue loses all its touches as it starts again.
    """

    def state(keys: int, capacity: int) -> State:
        limits = {
            NOWHERE: capacity,
            SMALL: _share(small, capacity),
            GHOST: 0 if table else _share(ghosts, capacity),
        }
        sketch = np.zeros((_share(ghosts / 16, capacity) if table else 1, 16), np.uint32)
        return empty_state(keys, limits, [cap, promote, int(table), int(clear)], sketch)

    name = f"S3-FIFO small {small:.0%}, promote at {promote}, ghosts {ghosts:g}x"
    name += f", cap {cap}" if cap != 3 else ""
    name += ", fingerprints" if table else ""
    name += ", cleared" if clear else ""
    return Policy(name, rings.touch, rings.s3fifo, state, True, 4.25, 2 * ghosts)


def two_queues() -> Policy:
    def state(keys: int, capacity: int) -> State:
        limits = {NOWHERE: capacity, SMALL: capacity // 4, GHOST: capacity // 2}
        return empty_state(keys, limits, [], _NO_SKETCH)

    return Policy("2Q", orders.two_queues_touch, orders.two_queues, state, False, 8, 2)


def tinylfu(window: float) -> Policy:
    def state(keys: int, capacity: int) -> State:
        recent = _share(window, capacity)
        protected = (capacity - recent) * 4 // 5
        sketch = np.zeros((4, 1 << (4 * capacity - 1).bit_length()), np.uint8)
        limits = {NOWHERE: capacity, SMALL: recent, PROTECTED: protected}
        return empty_state(keys, limits, [0, 10 * capacity], sketch)

    name = f"W-TinyLFU window {window:.0%}"
    return Policy(name, orders.tinylfu_touch, orders.tinylfu, state, False, 8 + 8)


CHOSEN = s3fifo(table=True)


def main_policies() -> list[Policy]:
    """Those compared at every capacity, the reference first."""
    return [
        lru(),
        fifo(),
        clock(1),
        clock(2),
        sieve(),
        doorkeeper(2, 2.0),
        two_queues(),
        tinylfu(0.01),
        tinylfu(0.1),
        s3fifo(0.1, ghosts=0.9),
        s3fifo(),
        CHOSEN,
    ]


def variants() -> list[Policy]:
    """The parameters of the chosen policy, one at a time, and the doorkeeper's."""
    return [
        *(s3fifo(share) for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)),
        *(s3fifo(promote=touches) for touches in (1, 3)),
        *(s3fifo(ghosts=ghosts) for ghosts in (0.0, 0.5, 2.0, 4.0)),
        s3fifo(cap=1, promote=1),
        s3fifo(cap=2),
        s3fifo(cap=7),
        s3fifo(clear=True),
        *(doorkeeper(2, ghosts) for ghosts in (1.0, 4.0)),
    ]


def costs() -> list[dict[str, Any]]:
    """What each policy needs to know of hits, and its bytes per slot."""
    return [
        {
            "policy": each.name,
            "possible": each.possible,
            "slot_bytes": each.slot_bytes + each.ghost_bytes,
        }
        for each in main_policies()
    ]


def _share(part: float, capacity: int) -> int:
    return max(1, round(part * capacity)) if part else 0


def _plain(*numbers: int) -> Callable[[int, int], State]:
    def state(keys: int, capacity: int) -> State:
        return empty_state(keys, {NOWHERE: capacity, MAIN: capacity}, list(numbers), _NO_SKETCH)

    return state
