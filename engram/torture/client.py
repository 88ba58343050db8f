"""One client under torture: looks up, checks every byte of every row, and tells how it went."""

from __future__ import annotations

import faulthandler
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from types import FrameType
from typing import Any, Protocol

import numpy as np

from engram.errors import EngramError, UnavailableError
from engram.ram.bundle_tier import BundleTier
from engram.remote import connect
from engram.rows import Rows
from engram.table import Table
from engram.tiers import Prefetch
from engram.torture.checker import Checker, different_rows
from engram.torture.held import HeldSlots
from engram.torture.reports import Reporter, Watch, described, resources
from engram.torture.traffic import PREFILL_TOKENS, Batch, Traffic
from engram.torture.works import InThreadError, Work, Works, together

LOOKUP_TIMEOUT_S = 10.0
_RETRY_S = 0.1
_RESOURCES_EVERY_S = 1.0
_PREFETCHES_KEPT = 4
_REPEATS = 50
_POISON = 0xA5


@dataclass(frozen=True)
class Told:
    """What a client is told.

    Attributes:
        serial: no two clients of a run have the same.
        target, table: what to connect to.
        table_seed: of its rows.
        traffic_seed: of the phrases.
        seed: of this run; with `serial` of everything random here.
        on_unavailable: see `engram.connect`.
        gpu: whether it takes steps of the GPU tier.
        gpu_device: on which; CUDA's if there is one, else the CPU, when None.
        rehearses: begin with each kind of work once.
    """

    serial: int
    target: str
    table: str
    table_seed: int
    traffic_seed: int
    seed: int
    on_unavailable: str
    gpu: bool
    gpu_device: str | None
    rehearses: bool

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Told:
        return cls(**{field.name: facts[field.name] for field in fields(cls)})


class Worker(Protocol):
    """What `run` has work.

    Attributes:
        works: its kinds of work.
    """

    works: Works

    def counts(self) -> dict[str, Any]:
        """Of its own, for the reports."""


class _Room:
    """A buffer for the largest lookup, used again and again: a row that a lookup leaves out would
    still hold poison, or a row of another lookup."""

    def __init__(self, table: Table) -> None:
        self._row_format = table.row_format
        rows = PREFILL_TOKENS[1] * len(table.layers) * len(table.columns)
        self._all = Rows.empty((rows,), table.row_format)
        for part in (self._all.values, self._all.scales):
            if part is not None:
                part.fill(_POISON)

    def rows(self, shape: tuple[int, ...]) -> Rows:
        """Its first rows, as many as fit `shape`."""
        count = math.prod(shape)
        scales = None if self._all.scales is None else self._all.scales[:count]
        return Rows(self._all.values[:count], scales).reshape(shape)


class Client:
    """The work of one client on an open table.

    Attributes:
        works: its kinds of work.
    """

    def __init__(self, table: Table, told: Told) -> None:
        self._table = table
        self._rng = np.random.default_rng([told.seed, told.serial])
        self._traffic = Traffic(table.spec, self._rng, told.traffic_seed)
        self._told = told
        self._dropped = 0
        self._prefetches: list[Prefetch] = []
        self._rooms = [_Room(table) for _ in range(3)]
        self._checked = threading.local()
        self.works = Works(
            self._rng,
            (
                (30, self.prefill),
                (30, self.decode),
                (15, self.part),
                (8, self.prefetched),
                (5, self.cancelled),
                (7, self.held),
                (3, self.rows_by_id),
                (2, self.together),
                (5, self.repeated),
            ),
        )

    def counts(self) -> dict[str, Any]:
        """How often what was read in place turned out void."""
        return {"dropped": self._dropped}

    def prefill(self) -> tuple[int, int]:
        """A long lookup."""
        return self._look_up(self._traffic.prefill())

    def decode(self) -> tuple[int, int]:
        """A short lookup."""
        return self._look_up(self._traffic.decode())

    def part(self) -> tuple[int, int]:
        """Some columns of some layers, in any order: a tensor-parallel rank, or one layer."""
        table, rng = self._table, self._rng
        layers = rng.permutation(table.layers)[: rng.integers(1, len(table.layers) + 1)]
        columns = rng.permutation(table.columns)[: rng.integers(1, len(table.columns) + 1)]
        return self._look_up(self._batch(), layers.tolist(), columns.tolist())

    def prefetched(self) -> tuple[int, int]:
        """Ask ahead, then look up: at once, or a moment later."""
        batch = self._batch()
        self._keep(self._table.prefetch(batch.tokens, batch.starts, batch.history, batch.dead))
        time.sleep(self._rng.choice([0.0, 0.005, 0.05]))
        return self._look_up(batch)

    def cancelled(self) -> tuple[int, int]:
        """Ask ahead and think better of it; look up all the same, half of the times."""
        batch = self._batch()
        handle = self._table.prefetch(batch.tokens, batch.starts, batch.history, batch.dead)
        time.sleep(self._rng.choice([0.0, 0.002]))
        handle.cancel()
        return self._look_up(batch) if self._rng.random() < 0.5 else (0, 0)

    def held(self) -> tuple[int, int]:
        """Read slots in place before and after a lookup that evicts many of them."""
        tier = self._table._tier
        assert isinstance(tier, BundleTier)
        batch, other = self._batch(), self._traffic.prefill()
        windows = self._table.spec.windows(batch.tokens, batch.starts, batch.history, batch.dead)
        row_ids = batch.row_ids(self._table.spec)
        read = False
        try:
            with tier.holding():
                slots = HeldSlots(tier, windows)
                readings = [room.rows(slots.shape) for room in self._rooms[1:]]
                slots.read(readings[0])
                checked, wrong = self._look_up(other)
                slots.read(readings[1])
                read = True
        except UnavailableError:
            if not read:
                raise
            # A sidecar that was still alive ended the lease: what was read in place is void.
            self._dropped += 1
            return checked, wrong
        columns = slots.columns
        for rows in readings:
            wrong += self._checker.wrong_rows(self._table.layers, row_ids, rows, columns)
            checked += int(columns.sum()) * len(self._table.layers)
        return checked, wrong

    def rows_by_id(self) -> tuple[int, int]:
        """Rows of one layer, for callers that hash themselves."""
        spec = self._table.spec
        layer = spec.layers[self._rng.integers(len(spec.layers))]
        ids = self._rng.integers(0, layer.rows, (self._rng.integers(1, 500), 1, 1))
        rows = self._table.lookup_rows(layer.layer, ids)
        return ids.size, self._checker.wrong_rows([layer.layer], ids, rows)

    def together(self) -> tuple[int, int]:
        """Two lookups by two threads at once."""
        batches = [self._batch(), self._batch()]
        return together(
            [partial(self._look_up, batch, room=room) for room, batch in enumerate(batches)]
        )

    def repeated(self) -> tuple[int, int]:
        """What is frequent, again and again: little but copying, while others evict."""
        batch, wanted = (
            self._traffic.frequent(),
            (len(self._table.layers), len(self._table.columns)),
        )
        checked, first_wrong = self._look_up(batch)
        wrong = first_wrong
        first, again = (
            room.rows((len(batch.tokens), *wanted)) for room in (self._rooms[0], self._rooms[1])
        )
        for _ in range(_REPEATS):
            self._table.lookup(batch.tokens, batch.starts, batch.history, batch.dead, out=again)
            wrong += min(checked, first_wrong + different_rows(first, again))
        return (1 + _REPEATS) * checked, wrong

    def _batch(self) -> Batch:
        return self._traffic.prefill() if self._rng.random() < 0.5 else self._traffic.decode()

    def _keep(self, handle: Prefetch) -> None:
        self._prefetches = [*self._prefetches[1 - _PREFETCHES_KEPT :], handle]

    @property
    def _checker(self) -> Checker:
        """Of this thread."""
        if not hasattr(self._checked, "checker"):
            self._checked.checker = Checker(self._told.table_seed, self._table.row_format)
        checker: Checker = self._checked.checker
        return checker

    def _look_up(
        self,
        batch: Batch,
        layers: list[int] | None = None,
        columns: list[int] | None = None,
        *,
        room: int = 0,
    ) -> tuple[int, int]:
        table = self._table
        row_ids = batch.row_ids(table.spec)
        layers = list(table.layers) if layers is None else layers
        places = [table.layers.index(layer) for layer in layers]
        row_ids = row_ids[:, places][:, :, columns if columns is not None else slice(None)]
        out = self._rooms[room].rows(row_ids.shape)
        rows = table.lookup(
            batch.tokens, batch.starts, batch.history, batch.dead, layers, columns, out
        )
        return row_ids.size, self._checker.wrong_rows(layers, row_ids, rows)


class _Stopping(threading.Event):
    """Set by SIGTERM."""

    def __init__(self) -> None:
        super().__init__()
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.set()


def run(facts: dict[str, Any], worker: Callable[[Table, Told], Worker] = Client) -> None:
    """Connect, and work until SIGTERM.

    Args:
        facts: fields of `Told`.
        worker: makes what works.
    """
    told, stopping = Told.of(facts), _Stopping()
    reporter = Reporter(told.serial)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    reporter.say("started")
    table = _connect(told, reporter, stopping)
    if table is not None:
        with table:
            watch = Watch(lambda: _attached(table), reporter)
            watch.start()
            _Shift(table, worker(table, told), reporter, stopping).work(told)
            watch.end()
    reporter.say("stopped")


def _connect(told: Told, reporter: Reporter, stopping: threading.Event) -> Table | None:
    while not stopping.is_set():
        try:
            return connect(
                told.target,
                told.table,
                timeout_s=LOOKUP_TIMEOUT_S,
                on_unavailable=told.on_unavailable,
            )
        except UnavailableError:
            reporter.say("waits")
            stopping.wait(_RETRY_S)
    return None


def _attached(table: Table) -> dict[str, Any]:
    """Counters of the tier that is attached to the sidecar."""
    tiers: list[dict[str, Any]] = table.stats()["tiers"]
    return next(tier for tier in tiers if tier["tier"] == "attached")


class _Shift:
    """Has a worker work, and tells of each piece."""

    def __init__(
        self, table: Table, worker: Worker, reporter: Reporter, stopping: threading.Event
    ) -> None:
        self._table = table
        self._worker = worker
        self._reporter = reporter
        self._stopping = stopping
        self._looked_at = 0.0

    def work(self, told: Told) -> None:
        """Until it is to stop."""
        works = self._worker.works
        if told.rehearses:
            for work in works.each:
                self._do(work)
            self._reporter.say("rehearsed")
        while not self._stopping.is_set():
            self._do(works.any())

    def _do(self, work: Work) -> None:
        began = time.monotonic()
        facts: dict[str, Any] = {"what": work.__name__, "rows": 0, "wrong": 0}
        try:
            facts["rows"], facts["wrong"] = work()
        except InThreadError as error:
            facts["failed"] = str(error)
        except EngramError as error:
            facts["failed"] = described(error)
        tier = _attached(self._table)
        counts = {name: tier[name] for name in ("hits", "misses", "fetches", "read_directly")}
        counts |= self._worker.counts()
        self._reporter.say("worked", seconds=time.monotonic() - began, **facts, **counts)
        # Without a sidecar it has less, which would make the rest look like growth.
        if tier["attached"] and began - self._looked_at > _RESOURCES_EVERY_S:
            self._looked_at = began
            self._reporter.say("resources", **resources())
