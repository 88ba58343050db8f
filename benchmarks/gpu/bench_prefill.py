"""Prefill of a long prompt, the same four ways as decoding: a part of `bench_decode.py`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from decode_loop import HISTORY, Small
from decoder import Decoder, Memory
from report import Line, Samples

from engram.nn import EngramLookup

WARM_BAR, COLD_BAR = 0.99, 0.97
cuda: Any = torch.cuda  # parts of it have no types


class Prefill:
    """One sequence's tokens through the decoder, in one go.

    Args:
        decoder: as for decoding.
        tokens: how many.
        lookups: of the ways (c) and (d).
    """

    def __init__(self, decoder: Decoder, tokens: int, lookups: dict[str, EngramLookup]) -> None:
        self._decoder, self._tokens, self._lookups = decoder, tokens, lookups
        self._small = Small(decoder.shape, tokens, decoder.device)

    def lines(self, text: np.ndarray, fresh: np.ndarray, rounds: int, rate: float) -> list[Line]:
        """All ways in turns; (d) reads `fresh`, which nobody has read before, the others `text`.

        Args:
            rate: reads a second of the disk; (d) is queued for as long ahead as it needs.
        """
        times: dict[str, list[float]] = {way: [] for way in "abcd"}
        ahead: list[float] = []
        for number in range(rounds + 1):
            for way in "abcd":
                source = fresh if way == "d" else text
                first = HISTORY + number * self._tokens
                ids, before = source[first : first + self._tokens], source[first - HISTORY : first]
                if way == "d":
                    ahead.append(self._queue(ids, before, rate))
                spent = self._milliseconds(way, ids, before)
                if number:  # the first one compiles
                    times[way].append(spent)
        return self._told(times, ahead[1:])

    def _queue(self, ids: np.ndarray, before: np.ndarray, rate: float) -> float:
        """Prefetch, and let the time pass that the reads take; seconds."""
        lookup = self._lookups["d"]
        ngrams = sum(
            len(np.unique(np.stack([ids[o - at : len(ids) - at] for at in range(o)]), axis=1).T)
            for o in range(lookup.table.spec.min_order, lookup.table.spec.max_order + 1)
        )
        rows = len(lookup.layers) * len(lookup.columns) // lookup.table.spec.num_orders
        ahead = ngrams * rows / rate
        lookup.prefetch(torch.from_numpy(ids), history=torch.from_numpy(before)[None])
        time.sleep(ahead)
        return ahead

    def _milliseconds(self, way: str, ids: np.ndarray, before: np.ndarray) -> float:
        """From ids on the host to the next one there."""
        if self._decoder.device.type == "cuda":
            cuda.synchronize()
        began = time.perf_counter()
        tokens = torch.from_numpy(ids)
        memory: Memory = None
        with torch.no_grad():
            there = tokens.to(self._decoder.device, torch.int64, non_blocking=True)
            if way == "b":
                self._small.look_up(there)
                memory = self._small.memory
            elif way in self._lookups:
                layers = self._lookups[way].layers
                prepared = self._lookups[way].prepare(
                    tokens, history=torch.from_numpy(before)[None]
                )

                def memory(which: int) -> torch.Tensor:
                    embeddings: torch.Tensor = prepared[layers[which]]
                    return embeddings

            hidden = self._decoder.before(there, prefill=True)
            self._decoder.after(hidden, memory, prefill=True).cpu()
        return (time.perf_counter() - began) * 1e3

    def _told(self, times: dict[str, list[float]], ahead: list[float]) -> list[Line]:
        names = {
            "a": "no Engram",
            "b": "a small table on the device",
            "c": "engram, all n-grams in RAM or HBM",
            "d": f"engram, disk cold, queued {np.median(ahead):.1f} s ahead",
        }
        bars = {"c": WARM_BAR, "d": COLD_BAR}
        small = Samples.of(times["b"])
        lines = []
        for way, name in names.items():
            measured = Samples.of(times[way])
            ratio = small.median / measured.median
            lines.append(
                Line(
                    f"({way}) prefill of {self._tokens:,} tokens, {name}",
                    "ms",
                    measured,
                    "(b)" if way in bars else "",
                    small if way in bars else None,
                    ratio if way in bars else None,
                    f"at least {bars[way]} of (b)" if way in bars else "",
                    ratio >= bars[way] if way in bars else None,
                )
            )
        return lines
