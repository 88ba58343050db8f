"""The clients of a run, as their supervisor knows them."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from engram.torture.plan import Plan
from engram.torture.processes import NurseryProcess


@dataclass
class ClientState:
    """One client.

    Attributes:
        place: which of the plan's clients it is; its successor has the same.
        heard_at: when it last said something, or was last continued.
        attached_at: when it last attached, or 0.
        pieces: of work it did.
        rehearsed: whether it has done each kind of work once, as told.
        stopped: by SIGSTOP.
        ending: told to end, or killed.
    """

    serial: int
    place: int
    heard_at: float = field(default_factory=time.monotonic)
    attached_at: float = 0.0
    pieces: int = 0
    rehearsed: bool = False
    stopped: bool = False
    ending: bool = False


class Clients:
    """Starts, hurts and hears clients.

    Args:
        facts: of `engram.torture.client.Told`, but what differs between clients.
    """

    def __init__(self, nursery: NurseryProcess, facts: dict[str, Any], plan: Plan) -> None:
        self.alive: dict[int, ClientState] = {}
        self._nursery = nursery
        self._facts = facts
        self._plan = plan
        self._started = 0

    def start(self, place: int, *, rehearses: bool = False) -> ClientState:
        """Start a client in `place`."""
        serial, self._started = self._started, self._started + 1
        own = {"serial": serial, "gpu": self._plan.of_gpu(place), "rehearses": rehearses}
        self._nursery.start({**self._facts, **own})
        self.alive[serial] = ClientState(serial, place)
        return self.alive[serial]

    def running(self) -> list[ClientState]:
        """Those that are neither stopped nor ending."""
        return [each for each in self.alive.values() if not each.stopped and not each.ending]

    def kill(self, client: ClientState) -> None:
        """SIGKILL."""
        client.ending = True
        self._nursery.signal(client.serial, signal.SIGKILL)

    def end(self, client: ClientState) -> None:
        """SIGTERM, on which it closes its table."""
        client.ending = True
        self._nursery.signal(client.serial, signal.SIGTERM)

    def halt(self, client: ClientState) -> None:
        """SIGSTOP."""
        client.stopped = True
        self._nursery.signal(client.serial, signal.SIGSTOP)

    def go_on(self, client: ClientState) -> None:
        """SIGCONT."""
        client.stopped, client.heard_at = False, time.monotonic()
        self._nursery.signal(client.serial, signal.SIGCONT)

    def hear(self) -> list[tuple[ClientState, dict[str, Any]]] | None:
        """What clients say that others must know; the rest is added up. None when the nursery
        has ended."""
        lines = self._nursery.lines.read()
        if lines is None:
            return None
        heard = []
        for line in lines:
            told = json.loads(line)
            client = self.alive.get(told["client"])
            if client is not None:
                client.heard_at = time.monotonic()
                heard.append((client, told))
        return heard

    def ask_for_stack(self, client: ClientState) -> None:
        """Have a client write where all its threads are to the log."""
        self._nursery.signal(client.serial, signal.SIGUSR1)
