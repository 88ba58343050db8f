"""Decode steps of sequences that go through real text, and what serves their memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from decoder import Shape, Step

from engram.nn import EngramLookup

HISTORY = 3
_SMALL_ROWS = 1 << 16
cuda: Any = torch.cuda  # parts of it have no types


class Streams:
    """Sequences that go through real text, each from a place of its own."""

    def __init__(self, text: np.ndarray, sequences: int, steps: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        places = rng.integers(HISTORY, len(text) - steps, sequences)
        self.steps = [
            (text[places + at].astype(np.int32), self._before(text, places + at))
            for at in range(steps)
        ]

    @staticmethod
    def _before(text: np.ndarray, places: np.ndarray) -> np.ndarray:
        history = np.stack([text[places - back] for back in range(HISTORY, 0, -1)], axis=1)
        return history.astype(np.int32)


class Loop:
    """Decodes and measures.

    Args:
        step: captured.
        lookup: brings embeddings to `out`; None where the graphs do it.
    """

    def __init__(self, step: Step, lookup: EngramLookup | None, out: torch.Tensor | None) -> None:
        self._step, self._lookup, self._out = step, lookup, out
        self._on_cuda = step.ids.device.type == "cuda"
        sequences = len(step.ids)
        self._starts = np.arange(sequences + 1, dtype=np.int64)
        pinned = self._on_cuda
        self._there = torch.empty(sequences, dtype=step.ids.dtype, pin_memory=pinned)
        self._back = torch.empty(sequences, dtype=torch.int32, pin_memory=pinned)
        self._free: Any = None

    def run(self, streams: Streams) -> list[float]:
        """Milliseconds of each step, from ids on the host to the next ones there."""
        return [self.one(ids, history) for ids, history in streams.steps]

    def one(self, ids: np.ndarray, history: np.ndarray) -> float:
        """One step, in milliseconds."""
        began = time.perf_counter()
        step = self._step
        self._there.copy_(torch.from_numpy(ids))
        step.ids.copy_(self._there, non_blocking=True)
        step.first()
        if self._lookup is not None:
            prepared = self._lookup.prepare(
                ids, self._starts, history, out=self._out, after=self._free
            )
            prepared.wait()
        step.rest()
        if self._on_cuda and self._lookup is not None:
            self._free = cuda.Event()
            self._free.record()
        self._back.copy_(step.next, non_blocking=True)
        if self._on_cuda:
            cuda.current_stream().synchronize()
        return (time.perf_counter() - began) * 1e3


class Small:
    """A table of few rows in the device's own memory; which row, the ids say."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device) -> None:
        columns = shape.embed_dim // 256
        self._rows = torch.randn(2, _SMALL_ROWS, 256, device=device, dtype=torch.bfloat16)
        self._factors = torch.arange(1, columns + 1, device=device) * 2_654_435_761
        self.out = torch.empty(2, tokens, shape.embed_dim, device=device, dtype=torch.bfloat16)

    def look_up(self, ids: torch.Tensor) -> None:
        """Fill `out` for these ids."""
        rows = (ids[:, None] * self._factors[None]) % _SMALL_ROWS
        for layer in range(2):
            self.out[layer].copy_(self._rows[layer][rows].flatten(1))

    def memory(self, which: int) -> torch.Tensor:
        """`[tokens, embed_dim]` of one of the two layers."""
        return self.out[which]
