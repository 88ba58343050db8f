"""`LayerHash`: the numbers by which one layer hashes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from engram.errors import SpecError

_LAYER_LIMIT = 2**31
_ROW_LIMIT = 2**62


@dataclass(frozen=True)
class LayerHash:
    """How one layer hashes.

    Attributes:
        layer: 0-based layer index of the model.
        multipliers: int64, one for each distance, newest first: `max_order` of them.
        primes: one for each column.
        rows: rows of the table: the sum of the primes, padded.
    """

    layer: int
    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    rows: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each column: the running sum of the primes."""
        return tuple(accumulate(self.primes[:-1], initial=0))

    def check(self, max_order: int, columns: int) -> None:
        """Require numbers that fit each other and the kernels.

        Raises:
            SpecError: they do not.
        """
        if not 0 <= self.layer < _LAYER_LIMIT:
            problem = f"is not in 0..{_LAYER_LIMIT - 1}"
        elif len(self.multipliers) != max_order or any(
            not -(2**63) <= each < 2**63 for each in self.multipliers
        ):
            problem = f"needs {max_order} int64 multipliers, not {self.multipliers}"
        elif len(self.primes) != columns or min(self.primes) < 2:
            problem = f"needs {columns} primes of at least 2, not {self.primes}"
        elif not sum(self.primes) <= self.rows < _ROW_LIMIT:
            problem = (
                f"has {self.rows} rows, but needs the sum of its primes, {sum(self.primes)}, "
                "or more, below 2**62"
            )
        else:
            return
        raise SpecError(f"layer {self.layer} {problem}")


def multiplier_array(layers: tuple[LayerHash, ...]) -> npt.NDArray[np.int64]:
    """int64 `[layers, max_order]`."""
    return np.array([each.multipliers for each in layers], np.int64)


def constant_array(layers: tuple[LayerHash, ...]) -> npt.NDArray[np.uint64]:
    """uint64 `[layers, columns, 4]`: the constants of each column that `_kernels` names."""
    return np.array(
        [
            [
                (prime, 2**64 // prime, offset, 2**64 % prime)
                for prime, offset in zip(each.primes, each.offsets, strict=True)
            ]
            for each in layers
        ],
        np.uint64,
    )
