"""One process of a Mooncake Store: what holds the rows, or what reads them over TCP.

    python mooncake_process.py '{"role": "store" | "reader", ...}'

It needs nothing but the package mooncake, so that this may live in an environment of its own.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import sys
from array import array
from pathlib import Path
from typing import Any

BUFFER_BYTES = 64 << 20


def _connected(host: str, master: str, segment_bytes: int) -> Any:
    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    failed = store.setup(host, "P2PHANDSHAKE", segment_bytes, BUFFER_BYTES, "tcp", "", master)
    if failed:
        raise SystemExit(f"the store cannot be set up: {failed}")
    return store


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def hold(host: str, master: str, files: list[str], part_bytes: int) -> None:
    """Put each file as objects of `part_bytes`, and stay until standard input ends."""
    total = sum(Path(file).stat().st_size for file in files)
    store = _connected(host, master, total + total // 2 + BUFFER_BYTES)
    for layer, name in enumerate(files):
        with Path(name).open("rb") as file:
            for part in iter(lambda f=file: f.read(part_bytes), b""):  # type: ignore[misc]
                number = (file.tell() - 1) // part_bytes
                if failed := store.put(f"{layer}-{number}", part):
                    raise SystemExit(f"object {layer}-{number} cannot be put: {failed}")
    _say(ready=True)
    sys.stdin.read()
    store.close()


class Reader:
    """Reads rows by id into a file that the parent maps too.

    Args:
        out: that file.
        row_bytes: of one row.
        part_rows: of one object.
    """

    def __init__(self, host: str, master: str, out: str, row_bytes: int, part_rows: int) -> None:
        self.store = _connected(host, master, 0)
        with Path(out).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if failed := self.store.register_buffer(self._address, len(self._map)):
            raise SystemExit(f"the buffer cannot be registered: {failed}")
        self._row_bytes = row_bytes
        self._part_rows = part_rows

    def prepare(self, ids: str, rows_of_layer: int) -> None:
        """Sort out the ranges of int64 row ids in a file, layer after layer."""
        wanted: dict[str, tuple[list[int], list[int]]] = {}
        for place, row in enumerate(array("q", Path(ids).read_bytes())):
            part, within = divmod(row, self._part_rows)
            key = f"{place // rows_of_layer}-{part}"
            targets, sources = wanted.setdefault(key, ([], []))
            targets.append(place * self._row_bytes)
            sources.append(within * self._row_bytes)
        self._keys = list(wanted)
        self._targets = [targets for targets, _ in wanted.values()]
        self._sources = [sources for _, sources in wanted.values()]
        self._sizes = [[self._row_bytes] * len(targets) for targets in self._targets]
        self._ranges = [[self._targets], [self._sources], [self._sizes]]

    def read(self) -> None:
        """All of them in one call."""
        got = self.store.get_into_ranges([self._address], [self._keys], *self._ranges)
        if got[0] != self._sizes:
            raise SystemExit("some ranges could not be read")


def main(arguments: list[str]) -> None:
    """Hold, or answer commands: JSON objects with `do` and its keyword arguments."""
    keywords = json.loads(arguments[0])
    if keywords.pop("role") == "store":
        hold(**keywords)
        return
    reader = Reader(**keywords)
    _say(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        getattr(reader, command.pop("do"))(**command)
        _say(done=True)
    reader.store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
