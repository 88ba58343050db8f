"""What all policies are made of: queues of n-grams, linked through arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt


def kernel(function: Callable[..., Any]) -> Any:
    """As `engram._jit.kernel`, but never kept: policies inline each other across files."""
    return numba.njit(nogil=True, error_model="numpy")(function)


# The queue that holds an n-gram; what is in GHOST is remembered, not resident.
NOWHERE, SMALL, MAIN, PROTECTED, GHOST = range(5)


class State(NamedTuple):
    """All that a policy remembers; arrays by n-gram stand for what a slot or a ghost would hold.

    Attributes:
        home: uint8 `[K]`, the queue of each n-gram.
        touched: uint8 `[K]`, hits since somebody last looked, saturating.
        newer, older: int32 `[K + 5]`, neighbours in the queue; `K + queue` is its end mark.
        sizes: int64 `[5]`, n-grams in each queue.
        limits: int64 `[5]`, meant sizes; `limits[NOWHERE]` is the capacity.
        numbers: int64 `[4]`, parameters and cursors, by policy.
        sketch: uint8 `[.., 2^k]` counts, or uint32 `[.., 8]` fingerprints.
    """

    home: npt.NDArray[np.uint8]
    touched: npt.NDArray[np.uint8]
    newer: npt.NDArray[np.int32]
    older: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    limits: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    sketch: npt.NDArray[Any]


def empty_state(
    keys: int, limits: dict[int, int], numbers: list[int], sketch: npt.NDArray[Any]
) -> State:
    """Nothing resident, `keys` n-grams possible."""
    marks = np.arange(keys + 5, dtype=np.int32)
    sizes = np.zeros(5, np.int64)
    bounds = np.array([limits.get(queue, 0) for queue in range(5)], np.int64)
    padded = np.array(numbers + [0] * (4 - len(numbers)), np.int64)
    home, touched = np.zeros(keys, np.uint8), np.zeros(keys, np.uint8)
    return State(home, touched, marks, marks.copy(), sizes, bounds, padded, sketch)


@kernel
def oldest(state, queue):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return state.newer[len(state.home) + queue]


@kernel
def push(state, queue, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Put a free n-gram at the newest end."""
    mark = len(state.home) + queue
    below = state.older[mark]
    state.older[key] = below
    state.newer[key] = mark
    state.newer[below] = key
    state.older[mark] = key
    state.home[key] = queue
    state.sizes[queue] += 1


@kernel
def remove(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Take an n-gram out of its queue."""
    newer, older = state.newer[key], state.older[key]
    state.older[newer] = older
    state.newer[older] = newer
    state.sizes[state.home[key]] -= 1
    state.home[key] = NOWHERE


@kernel
def move(state, queue, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    remove(state, key)
    push(state, queue, key)


@kernel
def remember(state, key):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Put a free n-gram into the ghost queue, which forgets its oldest."""
    if state.limits[GHOST] == 0:
        return
    if state.sizes[GHOST] >= state.limits[GHOST]:
        remove(state, oldest(state, GHOST))
    push(state, GHOST, key)


@kernel
def resident(state):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return state.sizes[SMALL] + state.sizes[MAIN] + state.sizes[PROTECTED]
