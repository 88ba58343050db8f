"""Has clients ready at once: a process that has imported everything, and forks them.

`python -m engram.torture.nursery NAME [gpu]`: reads lines of JSON, {"start": facts of a client} or
{"signal": number, "client": serial}, and ends its clients and itself at the end of its input. It
says of each client when it `exited`, with its `status`, negative for a signal. Only it waits for
its clients, so a signal never meets another process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any

from engram.torture import client
from engram.torture.processes import GPU
from engram.torture.reports import Reporter

_REAP_S = 0.02


class Nursery:
    """Clients by serial."""

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}

    def run(self) -> dict[str, Any] | None:
        """Obey until the end of input; in a client, what it is told."""
        lines = b""
        while True:
            self._reap()
            if not select.select([0], [], [], _REAP_S)[0]:
                continue
            arrived = os.read(0, 1 << 16)
            if not arrived:
                self._end()
                return None
            *whole, lines = (lines + arrived).split(b"\n")
            for line in whole:
                if (facts := self._obey(json.loads(line))) is not None:
                    return facts

    def _obey(self, said: dict[str, Any]) -> dict[str, Any] | None:
        if "start" in said:
            facts: dict[str, Any] = said["start"]
            process = os.fork()
            if process == 0:
                return facts
            self._processes[facts["serial"]] = process
        elif said["client"] in self._processes:
            os.kill(self._processes[said["client"]], said["signal"])
        return None

    def _reap(self) -> None:
        for serial, process in list(self._processes.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                del self._processes[serial]
                Reporter(serial).say("exited", status=os.waitstatus_to_exitcode(status))

    def _end(self) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in self._processes.values():
            os.waitpid(process, 0)


def main() -> None:
    """The nursery; in its children, a client."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides
    if GPU in sys.argv:
        import engram.torture.gpu_client  # noqa: F401 - once for all that are forked
    facts = Nursery().run()
    if facts is not None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _run(facts)


def _run(facts: dict[str, Any]) -> None:
    if facts["gpu"]:
        from engram.torture import gpu_client

        gpu_client.run(facts)
    else:
        client.run(facts)


if __name__ == "__main__":
    main()
    sys.exit(0)
