"""Sidecar processes for tests: over tables on disk, or over the plain model with faults.

As a program it is a sidecar itself: `python sidecars.py JSON` with {"listen", "tables", "ram",
"tls", "http", "limits"}, where a table is a directory or a dict of `Model` fields.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from engram.errors import RowIntegrityError
from engram.rows import RowFormat

START_SECONDS_MAX = 60


class Sidecar:
    """A running process; `address` is where to connect."""

    def __init__(
        self, socket: Path, tables: dict, *, listen=(), tls=None, ram="4MiB", http="off", **limits
    ):
        self.socket = socket
        self.address = f"unix:{socket}"
        self.told = {
            "listen": [self.address, *listen],
            "tables": tables,
            "tls": tls,
            "ram": ram,
            "http": http,
            "limits": limits,
        }
        self.start()

    def start(self) -> None:
        told = json.dumps(self.told, default=str)
        self.process = subprocess.Popen(
            [sys.executable, __file__, told], stderr=subprocess.PIPE, text=True, env=environment()
        )
        self.lines: list[str] = []
        ready = threading.Event()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        ready.wait(START_SECONDS_MAX)
        if not self.lines or "ready" not in self.lines[-1]:
            self.process.kill()
            raise AssertionError(f"the sidecar did not start: {self.lines}")

    def _read(self, ready: threading.Event) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if "ready" in line:
                ready.set()
        ready.set()

    @property
    def http(self) -> str:
        """HOST:PORT of its HTTP, if it was given one."""
        return self.lines[-1].partition("metrics at http://")[2].partition("/")[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self.process.poll() is None:
            self.kill()


def remote_table(address: str, name: str | None = None, **options):
    """A table asked for over gRPC alone, as a client on another host would."""
    from engram.remote import RemoteTier
    from engram.table import Table

    return Table(RemoteTier(address, name, **options))


def environment() -> dict[str, str]:
    tests = Path(__file__).resolve().parent
    paths = [str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def model_tier(seed=1, damaged=(), delay_s=0.0, **changes):
    """The plain model over small Qwen4Exp rows; `damaged` rows fail, every read waits first."""
    from conftest import small_qwen
    from dict_tier import DictTier

    class SlowTier(DictTier):
        def read(self, *arguments):
            time.sleep(delay_s)
            try:
                super().read(*arguments)
            except RowIntegrityError as error:
                raise RowIntegrityError.of(error.failures, "model", "by design") from None

    spec = small_qwen(**changes)
    rows = {(layer, row) for layer, row in damaged}
    tier = SlowTier(spec, RowFormat("bf16", spec.dim), seed, rows)
    tier.fingerprint = f"{seed:032x}"
    return tier


def main(told: dict) -> int:
    from engram.service.config import Config
    from engram.service.server import open_table, run

    models = {
        Path(f"/model/{name}"): t for name, t in told["tables"].items() if isinstance(t, dict)
    }
    config = Config.model_validate(
        {
            "listen": told["listen"],
            "table": [
                {"name": name, "path": f"/model/{name}" if isinstance(table, dict) else table}
                for name, table in told["tables"].items()
            ],
            "tls": told["tls"],
            "ram": told["ram"],
            "http": told["http"],
            "limits": told["limits"],
        }
    )
    return run(config, lambda p: model_tier(**models[p]) if p in models else open_table(p))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
