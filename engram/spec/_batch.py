"""Ragged batches: what callers pass, checked and flattened once."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from engram.errors import TokenError
from engram.spec import _kernels

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_NONE_DEAD = np.zeros(0, np.bool_)


class Batch(NamedTuple):
    """Valid tokens of one or more sequences, end to end.

    Attributes:
        tokens: int32 `[T]`, raw ids; -1 at dead positions.
        starts: int64 `[B + 1]`, where each sequence begins, and T.
        history: int32 `[B, max_order - 1]`, raw ids before each sequence, oldest first; -1 = none.
        dead: bool `[T]`, or None where no position is dead.
        shape: how results begin: the shape of the tokens that were passed.
        windows: int32 `[T, max_order]`, see `NgramSpec.windows`.
    """

    tokens: Int32s
    starts: Int64s
    history: Int32s
    dead: Bools | None
    shape: tuple[int, ...]
    windows: Int32s

    @classmethod
    def of(
        cls,
        tokens: npt.ArrayLike,
        starts: npt.ArrayLike | None,
        history: npt.ArrayLike | None,
        dead: npt.ArrayLike | None,
        *,
        max_order: int,
        vocab_size: int,
        dead_positions: bool,
        token_map: Int32s,
        blocked_id: int,
        boundary_id: int,
    ) -> Batch:
        """Check and flatten.

        Args:
            tokens: integers `[T]` (with `starts`), `[L]` or `[B, L]`. At a dead position any id.
            starts: integers `[B + 1]`, from 0 to T, never falling; None without ragged sequences.
            history: integers `[B, max_order - 1]`; without `starts` also `[max_order - 1]`, the
                same before all sequences; None = all -1.
            dead: booleans shaped like `tokens`, or None.
            max_order, vocab_size, dead_positions, blocked_id: of the spec.
            token_map: of the spec, or empty.
            boundary_id: of the spec, or -1.

        Raises:
            TokenError: anything else, the first bad position named.
        """
        ids = _integers("tokens", tokens)
        shape = ids.shape
        if ids.ndim not in (1, 2) or (starts is not None and ids.ndim != 1):
            wanted = "[T] with starts" if starts is not None else "[L] or [B, L]"
            raise TokenError(f"tokens must be {wanted}, not of shape {list(shape)}")
        bounds = _starts_of(shape) if starts is None else _checked_starts(starts)
        before = _history_of(history, len(bounds) - 1, max_order, starts is None)
        mask = None if dead is None else _dead_of(dead, shape, dead_positions)
        flat = np.empty(ids.size, np.int32)
        windows = np.empty((ids.size, max_order), np.int32)
        problem, where = _kernels.check_and_window(
            ids if ids.ndim == 1 else ids.reshape(-1),
            bounds,
            before,
            _NONE_DEAD if mask is None else mask,
            vocab_size,
            token_map,
            blocked_id,
            boundary_id,
            flat,
            windows,
        )
        if problem != _kernels.VALID:
            # As they were given: what is beyond int64 was clipped.
            given = bounds if starts is None else np.asarray(starts)
            past = before if history is None else np.asarray(history)
            _refuse(problem, where, np.asarray(tokens), given, past, vocab_size)
        if before.dtype is not _INT32:
            # Checked against the vocabulary, so nothing is lost.
            before = before.astype(np.int32)
        return cls(flat, bounds, before, mask, shape, windows)


def _integers(what: str, given: npt.ArrayLike) -> npt.NDArray[Any]:
    """As contiguous int32 or int64, which the kernels are compiled for."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise TokenError(f"{what} cannot be read as an array of integers: {error}") from None
    kind = array.dtype
    if kind is not _INT32 and kind is not _INT64 and kind not in (_INT32, _INT64):
        if kind.kind not in "iu" and array.size:
            raise TokenError(f"{what} must be integers, not {kind}; pass int32 or int64")
        if kind == np.uint64:
            # Beyond int64 it would turn negative, and -1 means none.
            array = np.minimum(array, np.uint64(2**63 - 1))
        array = array.astype(np.int64)
    return array if array.flags.carray else array.copy()


def _starts_of(shape: tuple[int, ...]) -> Int64s:
    if len(shape) == 1:
        return np.array((0, shape[0]), np.int64)
    return np.arange(shape[0] + 1, dtype=np.int64) * shape[1]


def _checked_starts(starts: npt.ArrayLike) -> Int64s:
    bounds = _integers("starts", starts)
    if bounds.ndim != 1 or not len(bounds):
        raise TokenError(f"starts must be [B + 1], not of shape {list(bounds.shape)}")
    return bounds if bounds.dtype is _INT64 else bounds.astype(np.int64)


def _history_of(
    history: npt.ArrayLike | None, sequences: int, max_order: int, flat_allowed: bool
) -> npt.NDArray[Any]:
    width = max_order - 1
    if history is None:
        return np.full((sequences, width), -1, np.int32)
    before = _integers("history", history)
    if before.ndim == 1 and flat_allowed:
        before = before.reshape(1, -1)
        if sequences != 1:
            before = np.repeat(before, sequences, axis=0)
    if before.ndim != 2:
        raise TokenError(f"history must be [B, {width}], not of shape {list(before.shape)}")
    if before.shape[1] != width:
        raise TokenError(
            f"history has width {before.shape[1]}, but the spec needs {width} ids before each "
            "sequence (its largest order less one); pad with -1 at the front"
        )
    if before.shape[0] != sequences:
        raise TokenError(
            f"history has {before.shape[0]} rows for {sequences} sequences; pass one for each"
        )
    return before


def _dead_of(dead: npt.ArrayLike, shape: tuple[int, ...], allowed: bool) -> Bools:
    if not allowed:
        raise TokenError("this family has no dead positions; do not pass dead")
    try:
        mask = np.asarray(dead)
    except (TypeError, ValueError) as error:
        raise TokenError(f"dead cannot be read as an array of booleans: {error}") from None
    if mask.dtype != np.bool_ and mask.size:
        raise TokenError(f"dead must be booleans, not {mask.dtype}")
    if mask.shape != shape:
        raise TokenError(f"dead has shape {list(mask.shape)}, but tokens {list(shape)}")
    return np.array(mask, np.bool_, order="C").reshape(-1)


def _refuse(
    problem: int,
    where: int,
    ids: npt.NDArray[Any],
    starts: npt.NDArray[Any],
    history: npt.NDArray[Any],
    vocab_size: int,
) -> NoReturn:
    if problem == _kernels.BAD_START:
        raise TokenError(f"starts must begin at 0, not {starts[0]}")
    if problem == _kernels.BAD_ORDER:
        raise TokenError(
            f"starts must never fall: starts[{where}] = {starts[where]} follows {starts[where - 1]}"
        )
    if problem == _kernels.BAD_END:
        raise TokenError(f"starts must end at the {ids.size} tokens given, not {starts[-1]}")
    what, array = ("tokens", ids) if problem == _kernels.BAD_TOKEN else ("history", history)
    index = ", ".join(str(i) for i in np.unravel_index(where, array.shape))
    raise TokenError(
        f"{what}[{index}] = {array.flat[where]} is not an id of the vocabulary of {vocab_size}"
        + ("; use -1 for none" if what == "history" else "")
    )
