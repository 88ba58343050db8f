"""Digests and checks: what proves that bytes are the ones that were written.

    row check     XXH32 of the row, seeded by (table seed, layer, row id): a row that sits where
                  another belongs fails, too
    digest        xxh3-128 in hexadecimal, for manifests, extents and LMDB's own pages

A damaged row passes its check with probability 2**-32. That finds failing hardware and software,
not an attacker: whoever can write the file can write matching checks.

XXH32 follows the published specification (xxHash fast digest algorithm, version 0.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engram._jit import kernel, load_u8, load_u32

_P1 = np.uint32(2654435761)
_P2 = np.uint32(2246822519)
_P3 = np.uint32(3266489917)
_P4 = np.uint32(668265263)
_P5 = np.uint32(374761393)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_U64 = np.uint64


def digest(*parts: bytes | memoryview | npt.NDArray[Any]) -> str:
    """xxh3-128 of the parts, each preceded by its length, in hexadecimal."""
    state = xxhash.xxh3_128()
    for part in parts:
        view = (part.data if isinstance(part, np.ndarray) else memoryview(part)).cast("B")
        state.update(len(view).to_bytes(8, "little"))
        state.update(view)
    return state.hexdigest()


def seed_of(*parts: bytes) -> int:
    """64-bit seed of a table: xxh3-64 of the parts, each preceded by its length."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.intdigest()


@kernel
def mix64(word):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Finalizer of splitmix64 (Steele, Lea and Flood, 2014): a bijection on uint64."""
    word = _U64(word) + _GAMMA
    word = (word ^ (word >> _U64(30))) * _M1
    word = (word ^ (word >> _U64(27))) * _M2
    return word ^ (word >> _U64(31))


@kernel
def row_seed(table_seed, layer, row):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Seed of one row's check: both halves of mix64(mix64(table_seed ^ layer) ^ row) folded."""
    word = mix64(mix64(_U64(table_seed) ^ _U64(layer)) ^ _U64(row))
    return np.uint32(word ^ (word >> _U64(32)))


@kernel
def _rotate(word, count):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return np.uint32((word << np.uint32(count)) | (word >> np.uint32(32 - count)))


@kernel
def _round(lane, word):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return np.uint32(_rotate(np.uint32(lane + np.uint32(word * _P2)), 13) * _P1)


@kernel
def xxh32(address, count, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """XXH32 of `count` bytes at `address`."""
    seed = np.uint32(seed)
    end = address + count
    if count >= 16:
        lane1 = np.uint32(seed + _P1 + _P2)
        lane2 = np.uint32(seed + _P2)
        lane3 = seed
        lane4 = np.uint32(seed - _P1)
        while address + 16 <= end:
            lane1 = _round(lane1, load_u32(address))
            lane2 = _round(lane2, load_u32(address + 4))
            lane3 = _round(lane3, load_u32(address + 8))
            lane4 = _round(lane4, load_u32(address + 12))
            address += 16
        state = np.uint32(
            _rotate(lane1, 1) + _rotate(lane2, 7) + _rotate(lane3, 12) + _rotate(lane4, 18)
        )
    else:
        state = np.uint32(seed + _P5)
    state = np.uint32(state + np.uint32(count))
    while address + 4 <= end:
        state = np.uint32(_rotate(np.uint32(state + np.uint32(load_u32(address) * _P3)), 17) * _P4)
        address += 4
    while address < end:
        state = np.uint32(
            _rotate(np.uint32(state + np.uint32(np.uint32(load_u8(address)) * _P5)), 11) * _P1
        )
        address += 1
    state = np.uint32((state ^ (state >> np.uint32(15))) * _P2)
    state = np.uint32((state ^ (state >> np.uint32(13))) * _P3)
    return np.uint32(state ^ (state >> np.uint32(16)))


def row_seed_twin(table_seed: int, layer: int, row: int) -> int:
    """`row_seed` in plain Python: its oracle."""

    def mix(word: int) -> int:
        word = (word + int(_GAMMA)) & (2**64 - 1)
        word = ((word ^ (word >> 30)) * int(_M1)) & (2**64 - 1)
        word = ((word ^ (word >> 27)) * int(_M2)) & (2**64 - 1)
        return word ^ (word >> 31)

    word = mix(mix(table_seed ^ layer) ^ row)
    return (word ^ (word >> 32)) & 0xFFFFFFFF


def row_check_twin(row_bytes: bytes, table_seed: int, layer: int, row: int) -> int:
    """Check of one row by the xxhash library: the oracle of the compiled path."""
    return xxhash.xxh32_intdigest(row_bytes, seed=row_seed_twin(table_seed, layer, row))
