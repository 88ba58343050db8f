"""What a run of torture does, and when."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CALM_S_MAX = 20.0


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        seconds: of faults; start and end come on top.
        clients: processes; the first is never killed, so that it shows what it gathers.
        gpu_clients: how many of them, the last ones, are clients of the GPU tier.
        gpu_device: what these use; CUDA's if there is one, else the CPU, when None.
        ram_percent: RAM tier, of the table.
        kill_sidecar_every_s, kill_client_every_s, stop_client_every_s: mean times, 0 for never.
        on_unavailable: see `engram.connect`.
        seed: of every random choice.
        table: use the table there, or make it there; in a temporary directory when None.
        size: bytes of the table's rows, if it is made.
        row_format: of a table that is made.
        table_seed: what clients believe; the table's own when None.
        hang_after_s: silence of a client that counts as hanging.
        recovery_s_max: from a sidecar's being ready to clients' being attached.
    """

    seconds: float = 600.0
    clients: int = 4
    gpu_clients: int = 0
    gpu_device: str | None = None
    ram_percent: float = 5.0
    kill_sidecar_every_s: float = 8.0
    kill_client_every_s: float = 1.0
    stop_client_every_s: float = 7.0
    on_unavailable: str = "direct"
    seed: int = 0
    table: Path | None = None
    size: int = 192 << 20
    row_format: str = "fp8-ue8m0"
    table_seed: int | None = None
    hang_after_s: float = 30.0
    recovery_s_max: float = 1.0

    def of_gpu(self, place: int) -> bool:
        """Whether the client in a place is one of the GPU tier."""
        return place >= self.clients - self.gpu_clients

    @property
    def one_of_each_kind(self) -> list[int]:
        """Places of a client of each kind, the first client's among them."""
        places = range(self.clients)
        return sorted({self.of_gpu(place): place for place in reversed(places)}.values())

    @property
    def calm_s(self) -> float:
        """At the end no sidecar is killed for so long, to see what one of them gathers."""
        return min(CALM_S_MAX, self.seconds / 5)


class Agenda:
    """Things to do at their times."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, action: Callable[..., object], *arguments: Any) -> None:
        """Do `action(*arguments)` when `time.monotonic` says `when`."""
        heapq.heappush(self._entries, (when, next(self._numbers), action, arguments))

    def run_due(self) -> None:
        """Do what is due."""
        while self._entries and self._entries[0][0] <= time.monotonic():
            _, _, action, arguments = heapq.heappop(self._entries)
            action(*arguments)

    def wait_s(self, longest: float) -> float:
        """Seconds until something is due, at most `longest`."""
        if not self._entries:
            return longest
        return min(longest, max(0.0, self._entries[0][0] - time.monotonic()))


def moments(rng: np.random.Generator, every_s: float, until_s: float) -> Iterator[float]:
    """Seconds from the start at which something happens, a fifth early or late."""
    when = 0.0
    while every_s > 0:
        when += every_s * rng.uniform(0.8, 1.2)
        if when >= until_s:
            return
        yield when
