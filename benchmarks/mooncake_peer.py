"""Rows in a Mooncake Store on this host, read by ranges over TCP; optional, as it is not ours.

Install `mooncake-transfer-engine-non-cuda` beside engram, or name another environment's Python in
MOONCAKE_PYTHON. Master, store and reader are processes of their own, as they would be in use.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from texts import Piece

from engram.spec import NgramSpec

NAME = "Mooncake Store, ranges over TCP loopback"
_PART_ROWS = 60_000
_TOKENS_MAX = 2048


class MooncakeMissingError(Exception):
    """Why there is none here."""


class Mooncake:
    """A reader process and the memory that it reads into."""

    name = NAME
    dear = True

    def __init__(self, spec: NgramSpec, row_bytes: int, folder: Path, reader: _Process) -> None:
        self._spec = spec
        self._row_bytes = row_bytes
        self._ids = folder / "ids"
        self._reader = reader
        self._out: npt.NDArray[np.uint8] = np.memmap(folder / "out", np.uint8, "r+")

    def make_room(self, tokens: int) -> None:
        self._rows = tokens * self._spec.num_columns

    def prepare(self, piece: Piece) -> None:
        ids = self._spec.row_ids(piece.tokens, history=piece.history)
        self._ids.write_bytes(np.ascontiguousarray(ids.transpose(1, 0, 2)).tobytes())
        self._reader.ask(do="prepare", ids=str(self._ids), rows_of_layer=self._rows)

    def read(self, prepared: None) -> None:
        self._reader.ask(do="read")

    def packed(self) -> npt.NDArray[np.uint8]:
        layers, columns = len(self._spec.layers), self._spec.num_columns
        used = self._out[: layers * self._rows * self._row_bytes]
        by_layer = used.reshape(layers, -1, columns, self._row_bytes)
        return np.ascontiguousarray(by_layer.transpose(1, 0, 2, 3))


class _Process:
    """A `mooncake_process` that answers a line for each line."""

    def __init__(self, python: str, log: Any, **keywords: Any) -> None:
        program = Path(__file__).with_name("mooncake_process.py")
        self._process = subprocess.Popen(
            [python, str(program), json.dumps(keywords)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self._answer()

    def ask(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        # The package's own words may stand between ours.
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return
        raise MooncakeMissingError(f"its process ended with status {self._process.wait()}")

    def end(self) -> None:
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@contextmanager
def mooncake(
    folder: Path, files: list[Path], spec: NgramSpec, row_bytes: int
) -> Iterator[Mooncake]:
    """Put the rows of `files` into a store, and read from it.

    Raises:
        MooncakeMissingError: it is not installed, or does not run here.
    """
    python = os.environ.get("MOONCAKE_PYTHON", sys.executable)
    master_program = Path(python).with_name("mooncake_master")
    if not master_program.exists():
        raise MooncakeMissingError("mooncake-transfer-engine-non-cuda is not installed")
    if shutil.which(python) is None:
        raise MooncakeMissingError(f"MOONCAKE_PYTHON is {python}, which cannot be run")
    own = folder / "mooncake"
    own.mkdir()
    with (own / "out").open("wb") as out:
        out.truncate(_TOKENS_MAX * len(spec.layers) * spec.num_columns * row_bytes)
    with ExitStack() as stack:
        log = stack.enter_context((own / "log").open("wb"))
        master, metrics, *hosts = (f"127.0.0.1:{port}" for port in _free_ports(4))
        command = [str(master_program), "-rpc_address", "127.0.0.1"]
        command += ["-rpc_port", master.split(":")[1], "-metrics_port", metrics.split(":")[1]]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(_stop, process)
        time.sleep(1.0)
        part_bytes = _PART_ROWS * row_bytes
        names = [str(file) for file in files]
        store = {"role": "store", "host": hosts[0], "files": names, "part_bytes": part_bytes}
        stack.callback(_Process(python, log, master=master, **store).end)
        read = {"role": "reader", "host": hosts[1], "out": str(own / "out")}
        sizes = {"row_bytes": row_bytes, "part_rows": _PART_ROWS}
        reader = _Process(python, log, master=master, **read, **sizes)
        stack.callback(reader.end)
        yield Mooncake(spec, row_bytes, own, reader)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=20)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
