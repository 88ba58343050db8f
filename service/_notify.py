"""What systemd is told: ready, stopping, and alive as long as the sidecar answers its own question.

The protocol is one datagram a message, as sd_notify(3) says; nothing is sent where nobody listens.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping

from engram.errors import ConfigError

CHECKS_OF_A_PERIOD = 3
"""One may fail, and one may take its whole time, before the period is over."""

_log = logging.getLogger("engram.service")


class Notifier:
    """Sends messages to who started this process, if that wants any.

    Args:
        environment: `os.environ` when None.

    Raises:
        ConfigError: NOTIFY_SOCKET or WATCHDOG_USEC is of no form that is known.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        told = os.environ if environment is None else environment
        self._place = _place(told.get("NOTIFY_SOCKET", ""))
        self.period_s = _period(told) if self._place else 0.0
        """Seconds within which `alive` must be said again and again; 0.0 for never."""

    def ready(self, status: str) -> None:
        """All is open and served.

        Args:
            status: one line for people.
        """
        self._send(f"READY=1\nSTATUS=serving {status}")

    def stopping(self) -> None:
        """No new work is taken from now on."""
        self._send("STOPPING=1\nSTATUS=finishing what runs")

    def alive(self) -> None:
        """Start the period anew."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._place:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1.0)
                sender.sendto(message.encode(), self._place)
        except OSError as error:
            # Serving goes on: that nobody hears it is for who started this process to judge.
            _log.error("NOTIFY_SOCKET cannot be told %r: %s", message.partition("\n")[0], error)


class Watchdog:
    """Says that the sidecar is alive each time that it was seen to be, from `start` to `stop`.

    Nothing is said after a check that failed or hangs: who listens then ends the sidecar.

    Args:
        notifier: who is told; its period says how often.
        check: whether the sidecar serves, found within the seconds it is given.
    """

    def __init__(self, notifier: Notifier, check: Callable[[float], bool]) -> None:
        self._notifier = notifier
        self._check = check
        self._pause_s = notifier.period_s / CHECKS_OF_A_PERIOD
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engram-watchdog", daemon=True)

    def start(self) -> None:
        """Begin, if anybody wants to hear it; the first check comes a part of a period later."""
        if self._pause_s:
            self._thread.start()

    def stop(self) -> None:
        """Say nothing any more. Safe to call twice."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._pause_s):
            try:
                serves = self._check(self._pause_s)
            except Exception as error:
                _log.error("the sidecar's check of itself failed", exc_info=error)
                continue
            if serves:
                self._notifier.alive()
            elif not self._over.is_set():
                _log.error("the sidecar does not answer itself; the watchdog is not told")


def _place(named: str) -> str:
    """Address of the socket, which may be an abstract one."""
    if not named:
        return ""
    if named[0] not in "/@":
        raise ConfigError(
            f"NOTIFY_SOCKET is {named!r}, but only paths and abstract sockets (@name) are known; "
            "unset it"
        )
    return "\0" + named[1:] if named[0] == "@" else named


def _period(told: Mapping[str, str]) -> float:
    given = told.get("WATCHDOG_USEC", "")
    meant_for = told.get("WATCHDOG_PID", "")
    # The variables are inherited, and another process may be the one that is watched.
    if not given or (meant_for and meant_for != str(os.getpid())):
        return 0.0
    if not given.isdecimal() or int(given) == 0:
        raise ConfigError(f"WATCHDOG_USEC is {given!r}, no number of microseconds; unset it")
    return int(given) / 1e6
