"""The processes under torture, as their supervisor holds them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

STOP_S_MAX = 60.0
GPU = "gpu"
"""An argument of the nursery's: that there will be clients of the GPU tier."""
_LINES_KEPT = 20


class Lines:
    """Whole lines out of a pipe that is read bit by bit."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)
        self._rest = b""

    def read(self) -> list[str] | None:
        """Lines that are there; None at the end."""
        try:
            arrived = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        if not arrived:
            return None
        *whole, self._rest = (self._rest + arrived).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


class SidecarProcess:
    """`engram serve`, from its start on.

    Attributes:
        started_at: by the monotonic clock.
        ready_at: when it said so, or 0.
        said: its last lines.
        killed: whether it was killed on purpose.
    """

    def __init__(self, table: Path, name: str, socket: Path, ram: int) -> None:
        command = [sys.executable, "-m", "engram", "serve", "--listen", f"unix:{socket}"]
        command += ["--table", f"{name}={table}", "--ram", str(ram), "--http", "off"]
        self.started_at = time.monotonic()
        self.ready_at = 0.0
        self.killed = False
        self.said: deque[str] = deque(maxlen=_LINES_KEPT)
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self.process.stderr is not None
        self.lines = Lines(self.process.stderr.fileno())

    def hear(self) -> bool:
        """Read what it says; whether it is the first to say that it is ready."""
        heard = self.lines.read() or []
        self.said += heard
        if not self.ready_at and any(line.endswith("ready") for line in heard):
            self.ready_at = time.monotonic()
            return True
        return False

    def kill(self) -> None:
        """SIGKILL."""
        self.killed = True
        self.process.kill()
        self.process.wait()
        self._close()

    def stop(self) -> int:
        """SIGTERM; its exit status.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        self.killed = True
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_S_MAX)
        self._close()
        return status

    def _close(self) -> None:
        assert self.process.stderr is not None
        self.process.stderr.close()


class NurseryProcess:
    """`engram.torture.nursery`, see there.

    Args:
        name: in its command line and that of its clients.
        log: where they write what is wrong with them.
        gpu: whether there are to be clients of the GPU tier.
    """

    def __init__(self, name: str, log: Path, *, gpu: bool = False) -> None:
        command = [sys.executable, "-m", "engram.torture.nursery", name]
        if gpu:
            command.append(GPU)
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        assert self.process.stdout is not None
        self.lines = Lines(self.process.stdout.fileno())

    def start(self, facts: dict[str, Any]) -> None:
        """Start a client; see `engram.torture.client.Told`."""
        self._say({"start": facts})

    def signal(self, serial: int, number: int) -> None:
        """Send a client a signal, if it still runs."""
        self._say({"client": serial, "signal": number})

    def _say(self, said: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(said).encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """End it and all its clients."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
