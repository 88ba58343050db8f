"""What clients tell the supervisor: one JSON line per event, on one pipe for all of them.

A line is written by one system call and shorter than what a pipe takes in whole, so that lines of
several processes never mix, and one that is killed leaves no half of a line.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

LINE_BYTES_MAX = 4096
_MESSAGE_CHARACTERS = 300


class Reporter:
    """Writes the lines of one client.

    Args:
        serial: of the client; no two have the same.
        descriptor: of the pipe.
    """

    def __init__(self, serial: int, descriptor: int = 1) -> None:
        self._serial = serial
        self._descriptor = descriptor

    def say(self, event: str, **facts: Any) -> None:
        """Write an event, with the time by the monotonic clock, which all processes share."""
        told = {"client": self._serial, "event": event, "at": time.monotonic(), **facts}
        line = json.dumps(told).encode() + b"\n"
        assert len(line) <= LINE_BYTES_MAX
        os.write(self._descriptor, line)


def described(error: BaseException) -> str:
    """Class and message of an error, cut to fit a line."""
    return f"{type(error).__name__}: {error}"[:_MESSAGE_CHARACTERS]


def resources(process: int | str = "self") -> dict[str, int]:
    """Descriptors, memory maps and bytes of memory of a process.

    `private_bytes` are its own pages, `shared_bytes` pages of shared memory that it has mapped.

    Raises:
        OSError: there is no such process.
    """
    place = Path("/proc") / str(process)
    status = dict(
        line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line
    )
    if "RssAnon" not in status:
        raise ProcessLookupError(process)
    return {
        "descriptors": len(os.listdir(place / "fd")),
        "maps": (place / "maps").read_bytes().count(b"\n"),
        "threads": int(status["Threads"]),
        "private_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "shared_bytes": int(status["RssShmem"].split()[0]) * 1024,
    }


class Watch(threading.Thread):
    """Tells when a table is attached to another sidecar, and when that first served a Fetch.

    Args:
        stats: of the table's fastest tier.
    """

    _PERIOD_S = 0.02

    def __init__(self, stats: Any, reporter: Reporter) -> None:
        super().__init__(name="torture-watch", daemon=True)
        self._stats = stats
        self._reporter = reporter
        self._ended = threading.Event()

    def run(self) -> None:
        boot_id, fetches, fetched = "", 0, True
        while not self._ended.wait(self._PERIOD_S):
            now = self._stats()
            if now["attached"] and now["boot_id"] != boot_id:
                boot_id, fetches, fetched = now["boot_id"], now["fetches"], False
                self._reporter.say("attached", boot_id=boot_id, reattached=now["reattached"])
            elif not fetched and now["fetches"] > fetches:
                fetched = True
                self._reporter.say("fetched", boot_id=boot_id)

    def end(self) -> None:
        """Stop telling."""
        self._ended.set()
        self.join()
