"""What systemd is told, over real sockets: when ready, when stopping, and while it answers."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from sidecars import Sidecar

from engram.errors import ConfigError
from engram.service._notify import Notifier, Watchdog
from engram.service._self_check import answers, place_to_ask
from engram.service.sockets import parse_address

PERIOD_S = 1.5


@pytest.fixture(params=["path", "abstract"])
def listener(request, tmp_path):
    """A socket that hears, and how NOTIFY_SOCKET names it."""
    named = str(tmp_path / "n") if request.param == "path" else f"@engram-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + named[1:] if named[0] == "@" else named)
        heard.settimeout(10)
        yield heard, named


def _said(heard):
    return heard.recv(4096).decode().splitlines()


def test_messages_are_one_datagram_each(listener):
    heard, named = listener
    notifier = Notifier({"NOTIFY_SOCKET": named})
    notifier.ready("one table")
    notifier.alive()
    notifier.stopping()
    assert _said(heard) == ["READY=1", "STATUS=serving one table"]
    assert _said(heard) == ["WATCHDOG=1"]
    assert _said(heard)[0] == "STOPPING=1"


def test_nobody_listens(tmp_path, caplog):
    Notifier({}).ready("one table")
    assert not caplog.records
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("one table")
    (record,) = caplog.records
    assert "'READY=1'" in record.getMessage()


def test_the_period_is_only_for_whom_it_is_meant():
    told = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "3000000"}
    assert Notifier(told).period_s == 3
    assert Notifier({**told, "WATCHDOG_PID": str(os.getpid())}).period_s == 3
    assert Notifier({**told, "WATCHDOG_PID": "1"}).period_s == 0
    assert Notifier({"WATCHDOG_USEC": "3000000"}).period_s == 0


@pytest.mark.parametrize("period", ["0", "-1", "soon"])
def test_a_period_that_is_none_is_refused(period):
    with pytest.raises(ConfigError, match="unset it"):
        Notifier({"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": period})


def test_a_socket_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="unset it"):
        Notifier({"NOTIFY_SOCKET": "vsock:2:1234"})


def _broken(timeout_s):
    raise OSError("no descriptor is left")


@pytest.mark.parametrize("check", [lambda timeout_s: False, _broken], ids=["no", "broken"])
def test_the_watchdog_hears_nothing_of_a_sidecar_that_does_not_answer(listener, check):
    heard, named = listener
    heard.settimeout(0.5)
    told = {"NOTIFY_SOCKET": named, "WATCHDOG_USEC": "150000"}
    watchdog = Watchdog(Notifier(told), check)
    watchdog.start()
    with pytest.raises(TimeoutError):
        heard.recv(4096)
    watchdog.stop()
    watchdog.stop()


def test_where_a_sidecar_asks_itself():
    tcp, unix = parse_address("tcp:127.0.0.1:7070"), parse_address("unix:/run/s")
    assert place_to_ask([tcp, unix], encrypted=False) == "127.0.0.1:7070"
    assert place_to_ask([tcp, unix], encrypted=True) == "unix:/run/s"
    with pytest.raises(ConfigError, match="WatchdogSec"):
        place_to_ask([tcp], encrypted=True)


def test_nobody_answers_where_nobody_is(tmp_path):
    assert not answers(f"unix:{tmp_path / 'none'}", 1.0)


def test_a_sidecar_tells_its_life_and_is_silent_while_it_hangs(listener, tmp_path, monkeypatch):
    heard, named = listener
    monkeypatch.setenv("NOTIFY_SOCKET", named)
    monkeypatch.setenv("WATCHDOG_USEC", str(int(PERIOD_S * 1e6)))
    with Sidecar(tmp_path / "s.sock", {"one": {}}) as running:
        assert _said(heard)[0] == "READY=1"
        for _ in range(2):
            before = time.monotonic()
            assert _said(heard) == ["WATCHDOG=1"]
            assert time.monotonic() - before < PERIOD_S
        running.process.send_signal(signal.SIGSTOP)
        heard.settimeout(PERIOD_S)
        with pytest.raises(TimeoutError):
            # What was on its way may still come.
            _said(heard), _said(heard)
        running.process.send_signal(signal.SIGCONT)
        assert _said(heard) == ["WATCHDOG=1"]
        running.process.send_signal(signal.SIGTERM)
        while (said := _said(heard)) == ["WATCHDOG=1"]:
            pass
        assert said[0] == "STOPPING=1"
        assert running.process.wait(60) == 0


def test_a_sidecar_whose_socket_is_gone_is_not_alive(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "n"))
        heard.settimeout(PERIOD_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(PERIOD_S * 1e6)))
        with Sidecar(tmp_path / "s.sock", {"one": {}}) as running:
            assert _said(heard)[0] == "READY=1"
            running.socket.unlink()
            with pytest.raises(TimeoutError):
                _said(heard), _said(heard)
            assert running.process.poll() is None
            assert any("does not answer itself" in line for line in running.lines)
