"""Runs clients against a sidecar, kills both, and sees whether anybody minds."""

from __future__ import annotations

import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engram.torture import leaks
from engram.torture.clients import Clients, ClientState
from engram.torture.plan import Agenda, Plan, moments
from engram.torture.processes import NurseryProcess, SidecarProcess
from engram.torture.reports import resources
from engram.torture.table import TortureTable
from engram.torture.tally import Tally

TABLE = "torture"
_START_S_MAX = 60.0
_REHEARSAL_S_MAX = 300.0
_SETTLE_S = 1.0
_PIECES_ALONE = 9
_WARM_UP_S = 1.5
_READY_S_MIN = 2.0
_PERIOD_S = 0.5
_STACK_S = 1.0

Progress = Callable[[float, Tally], None]


class TortureError(Exception):
    """The run cannot go on; it counts as failed."""


def torture(plan: Plan, progress: Progress | None = None) -> Tally:
    """Run a plan.

    Args:
        progress: told now and then of the seconds done and what happened so far.

    Raises:
        ConfigError, StoreError: the table cannot be made or used.
    """
    place = Path(tempfile.mkdtemp(prefix="engram-torture-"))
    try:
        table = _table(plan, place)
        shared_before, names_before = leaks.shared_memory_bytes(), leaks.shm_names()
        run = _Run(plan, table, place, progress or (lambda seconds, tally: None))
        tally = run.tally
        try:
            run.all()
        except TortureError as error:
            tally.problems.append(str(error))
        finally:
            run.end()
        tally.problems += leaks.left_behind(str(place), run.shared_inodes, names_before)
        tally.shared_memory = (shared_before, leaks.shared_memory_bytes())
        tally.judge(plan)
        if tally.problems:
            tally.messages += run.last_words()
        return tally
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _table(plan: Plan, place: Path) -> TortureTable:
    path = plan.table or place / "table"
    if path.exists():
        return TortureTable.at(path)
    return TortureTable.make(path, plan.size, plan.seed, plan.row_format)


class _Run:
    """A run under way."""

    def __init__(self, plan: Plan, table: TortureTable, place: Path, progress: Progress) -> None:
        self.tally = Tally()
        self.shared_inodes: set[int] = set()
        self._plan = plan
        self._table = table
        self._progress = progress
        self._socket = place / "s.sock"
        self._ram = int(table.row_bytes * plan.ram_percent / 100)
        self._log = place / "clients.log"
        self._rng = np.random.default_rng([plan.seed, 1 << 32])
        self._agenda = Agenda()
        self._selector = selectors.DefaultSelector()
        self._sidecar: SidecarProcess | None = None
        self._waiting: dict[int, ClientState] = {}
        self._waiting_fetch: dict[int, ClientState] = {}
        self._began = time.monotonic()
        self._rehearses = True
        self._faults_over = False
        self._nursery = NurseryProcess(str(place), self._log, gpu=plan.gpu_clients > 0)
        self._selector.register(self._nursery.lines.descriptor, selectors.EVENT_READ)
        facts = {
            "target": f"unix:{self._socket}",
            "table": TABLE,
            "table_seed": table.seed if plan.table_seed is None else plan.table_seed,
            "traffic_seed": plan.seed,
            "seed": plan.seed,
            "on_unavailable": plan.on_unavailable,
            "gpu_device": plan.gpu_device,
        }
        self._clients = Clients(self._nursery, facts, plan)

    def all(self) -> None:
        """Rehearse, hurt, wind down, with measurements in between."""
        self._rehearse()
        self._rehearses = False
        self.tally.sidecar_before = self._without_clients()
        self.tally.forget()
        for number in range(self._plan.clients):
            self._clients.start(number)
        self._began = time.monotonic()
        self._schedule()
        self._until_time(self._began + self._plan.seconds)
        self._faults_over = True
        self._until(lambda: self._ready, _START_S_MAX, "the sidecar does not start again")
        self.tally.sidecar_after = self._without_clients()
        self._stop_sidecar()

    def _rehearse(self) -> None:
        """Everything once, with all the time in the world: what is compiled on first use is then
        there for all processes, and nobody is taken to hang who compiles."""
        self._start_sidecar()
        self._until(lambda: self._ready, _REHEARSAL_S_MAX, "the sidecar does not start")
        places = self._plan.one_of_each_kind
        clients = [self._clients.start(place, rehearses=True) for place in places]
        self._until(
            lambda: all(client.rehearsed for client in clients),
            _REHEARSAL_S_MAX,
            "a first client gets nowhere",
        )
        self._end_sidecar()
        if self._plan.on_unavailable == "direct":
            goals = [(client, client.pieces + _PIECES_ALONE) for client in clients]
            self._until(
                lambda: all(client.pieces > goal for client, goal in goals),
                _REHEARSAL_S_MAX,
                "a first client gets nowhere without a sidecar",
            )
        self._start_sidecar()
        self._until(
            lambda: self._ready and all(map(self._attached, clients)),
            _REHEARSAL_S_MAX,
            "a first client is not attached again",
        )
        self._until_time(time.monotonic() + _WARM_UP_S)

    def _schedule(self) -> None:
        plan, began = self._plan, self._began
        kinds = (
            (plan.kill_sidecar_every_s, plan.seconds - plan.calm_s, self._kill_sidecar),
            (plan.kill_client_every_s, plan.seconds, self._kill_client),
            (plan.stop_client_every_s, plan.seconds, self._stop_client),
        )
        for every_s, until_s, action in kinds:
            for moment in moments(self._rng, every_s, until_s):
                self._agenda.at(began + moment, action)

    # Faults

    def _kill_sidecar(self) -> None:
        sidecar = self._sidecar
        now = time.monotonic()
        if sidecar is None or now > self._began + self._plan.seconds - self._plan.calm_s:
            return
        if not sidecar.ready_at or now < sidecar.ready_at + _READY_S_MIN:
            return self._agenda.at(now + _READY_S_MIN / 4, self._kill_sidecar)
        self._note_sidecar(sidecar)
        self._late(now)
        self._end_sidecar()
        self.tally.faults["sidecar killed"] += 1
        if self._rng.random() < 0.5:
            self._start_sidecar()
        else:
            self._agenda.at(time.monotonic() + self._rng.uniform(0.3, 3.0), self._start_sidecar)

    def _end_sidecar(self) -> None:
        sidecar, self._sidecar = self._sidecar, None
        if sidecar is not None:
            self._selector.unregister(sidecar.lines.descriptor)
            sidecar.kill()

    def _note_sidecar(self, sidecar: SidecarProcess) -> None:
        with suppress(OSError):
            self.tally.at_most(resources(sidecar.process.pid))
            self.shared_inodes |= leaks.shared_memory_of(sidecar.process.pid)

    def _start_sidecar(self) -> None:
        self._sidecar = SidecarProcess(self._table.path, TABLE, self._socket, self._ram)
        self._selector.register(self._sidecar.lines.descriptor, selectors.EVENT_READ)

    def _victim(self) -> ClientState | None:
        victims = [each for each in self._clients.running() if each.place > 0]
        if self._faults_over or not victims:
            return None
        return victims[self._rng.integers(len(victims))]

    def _kill_client(self) -> None:
        if victim := self._victim():
            self._clients.kill(victim)
            self.tally.faults["client killed"] += 1
            self._forget(victim)
            self._clients.start(victim.place)

    def _stop_client(self) -> None:
        if victim := self._victim():
            self._clients.halt(victim)
            self.tally.faults["client stopped"] += 1
            self._forget(victim)
            self._agenda.at(
                time.monotonic() + self._rng.uniform(0.2, 4.0), self._clients.go_on, victim
            )

    # What is heard

    def _attached(self, client: ClientState) -> bool:
        return self._sidecar is not None and client.attached_at > self._sidecar.started_at

    @property
    def _ready(self) -> bool:
        return self._sidecar is not None and self._sidecar.ready_at > 0

    def _until_time(self, when: float) -> None:
        while (left := when - time.monotonic()) > 0:
            self._turn(left)

    def _until(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TortureError(f"{otherwise} within {seconds:.0f} s")
            self._turn(_PERIOD_S)

    def _turn(self, longest_s: float) -> None:
        """Wait for something to happen, and see to it."""
        self._selector.select(self._agenda.wait_s(min(longest_s, _PERIOD_S)))
        self._hear_sidecar()
        self._hear_clients()
        self._agenda.run_due()
        self._look_for_hangs()
        self._progress(time.monotonic() - self._began, self.tally)

    def _hear_sidecar(self) -> None:
        sidecar = self._sidecar
        if sidecar is None:
            return
        if sidecar.hear():
            self.tally.starts_s.append(sidecar.ready_at - sidecar.started_at)
            self._expect_recovery(sidecar)
        if sidecar.process.poll() is not None:
            raise TortureError(f"the sidecar died by itself: {' / '.join(sidecar.said)}")

    def _expect_recovery(self, sidecar: SidecarProcess) -> None:
        for client in self._clients.running():
            if self._attached(client):
                self.tally.recoveries_s.append(max(0.0, client.attached_at - sidecar.ready_at))
                self._waiting_fetch[client.serial] = client
            elif client.attached_at:
                self._waiting[client.serial] = client
                self._waiting_fetch[client.serial] = client

    def _late(self, now: float) -> None:
        """The sidecar is about to be killed: who is still waiting has waited until now."""
        assert self._sidecar is not None
        for _ in self._waiting:
            self.tally.recoveries_s.append(now - self._sidecar.ready_at)
            self.tally.faults["client not attached until next kill"] += 1
        self._waiting.clear()
        self._waiting_fetch.clear()

    def _forget(self, client: ClientState) -> None:
        self._waiting.pop(client.serial, None)
        self._waiting_fetch.pop(client.serial, None)

    def _hear_clients(self) -> None:
        heard = self._clients.hear()
        if heard is None:
            raise TortureError("the process that starts clients died by itself")
        for client, told in heard:
            getattr(self, f"_client_{told['event']}")(client, told)

    def _client_started(self, client: ClientState, told: dict[str, Any]) -> None:
        self.tally.faults["client started"] += 1

    def _client_waits(self, client: ClientState, told: dict[str, Any]) -> None:
        pass

    _client_stopped = _client_waits

    def _client_attached(self, client: ClientState, told: dict[str, Any]) -> None:
        client.attached_at = told["at"]
        if self._waiting.pop(client.serial, None) and self._sidecar is not None:
            self.tally.recoveries_s.append(max(0.0, told["at"] - self._sidecar.ready_at))

    def _client_fetched(self, client: ClientState, told: dict[str, Any]) -> None:
        if self._waiting_fetch.pop(client.serial, None) and self._sidecar is not None:
            self.tally.fetches_s.append(max(0.0, told["at"] - self._sidecar.ready_at))

    def _client_rehearsed(self, client: ClientState, told: dict[str, Any]) -> None:
        client.rehearsed = True

    def _client_worked(self, client: ClientState, told: dict[str, Any]) -> None:
        client.pieces += 1
        self.tally.worked(told)

    def _client_resources(self, client: ClientState, told: dict[str, Any]) -> None:
        if client.place == 0:
            names = ("descriptors", "maps", "threads", "private_bytes", "shared_bytes")
            self.tally.gathered.append({name: told[name] for name in names})

    def _client_exited(self, client: ClientState, told: dict[str, Any]) -> None:
        del self._clients.alive[client.serial]
        self._forget(client)
        if client.ending and told["status"] in (0, -signal.SIGKILL, -signal.SIGTERM):
            return  # by SIGTERM if that came before it was ready for one
        if self._rehearses:
            raise TortureError(f"a first client died by itself with status {told['status']}")
        self.tally.problems.append(f"a client died by itself with status {told['status']}")
        if not client.ending and not self._faults_over:
            self._clients.start(client.place)

    def _look_for_hangs(self) -> None:
        now = time.monotonic()
        patience_s = _REHEARSAL_S_MAX if self._rehearses else self._plan.hang_after_s
        for client in self._clients.running():
            if now - client.heard_at > patience_s:
                self.tally.problems.append(
                    f"a client said nothing for {now - client.heard_at:.0f} s"
                )
                self._clients.ask_for_stack(client)
                client.ending = True
                self._agenda.at(now + _STACK_S, self._replace, client)

    def _replace(self, client: ClientState) -> None:
        self._clients.kill(client)
        if not self._faults_over:
            self._clients.start(client.place)

    # The end

    def _without_clients(self) -> dict[str, int]:
        """Resources of the sidecar after all clients have ended in order."""
        for client in list(self._clients.alive.values()):
            if client.stopped:
                self._clients.go_on(client)
            if not client.ending:
                self._clients.end(client)
        self._until(lambda: not self._clients.alive, self._plan.hang_after_s, "clients do not end")
        self._until_time(time.monotonic() + _SETTLE_S)
        assert self._sidecar is not None
        self._note_sidecar(self._sidecar)
        return resources(self._sidecar.process.pid)

    def _stop_sidecar(self) -> None:
        sidecar, self._sidecar = self._sidecar, None
        assert sidecar is not None
        self._selector.unregister(sidecar.lines.descriptor)
        try:
            status = sidecar.stop()
        except subprocess.TimeoutExpired:
            sidecar.kill()
            raise TortureError("the sidecar does not end on SIGTERM") from None
        if status:
            raise TortureError(f"the sidecar ended with status {status}")

    def end(self) -> None:
        """End all processes; safe at any point."""
        self._end_sidecar()
        self._nursery.end()
        self._selector.close()

    def last_words(self) -> list[str]:
        """The end of what clients wrote to their log."""
        with suppress(OSError):
            return self._log.read_text(errors="replace").splitlines()[-200:]
        return []
