"""Other ways to get the rows of tokens: each is given row ids, and must hand out the same bytes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import lmdb
import mooncake_peer
import numpy as np
import numpy.typing as npt
from mooncake_peer import MooncakeMissingError, mooncake
from texts import Piece

import engram
from engram.errors import UnavailableError
from engram.rows import Rows
from engram.spec import NgramSpec
from engram.store.synth import SyntheticSource
from engram.table import Table

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

THREADS = 32
CHUNK_ROWS = 2048
_BUILT_ROWS = 100_000


class Peer(Protocol):
    """Reads the rows of a piece of text.

    Attributes:
        dear: too slow to be warmed with the whole text.
    """

    name: str
    dear: bool

    def make_room(self, tokens: int) -> None:
        """Get buffers for pieces of this length; before anything else."""

    def prepare(self, piece: Piece) -> Any:
        """Whatever `read` is to be spared."""

    def read(self, prepared: Any) -> None:
        """The lookup that is timed."""

    def packed(self) -> Bytes:
        """uint8 `[T, layers, columns, row_bytes]` that was read last."""


class Engram:
    """A table of engram: hashing and everything else is timed."""

    dear = False

    def __init__(self, name: str, table: Table) -> None:
        self.name = name
        self._table = table

    def make_room(self, tokens: int) -> None:
        shape = (tokens, len(self._table.layers), len(self._table.columns))
        self._out = Rows.empty(shape, self._table.row_format)

    def prepare(self, piece: Piece) -> Piece:
        return piece

    def read(self, prepared: Piece) -> None:
        self._table.lookup(prepared.tokens, history=prepared.history, out=self._out)

    def packed(self) -> Bytes:
        return self._out.packed()

    def rows(self, tokens: int) -> int:
        return tokens * len(self._table.layers) * len(self._table.columns)

    def misses(self) -> int:
        return int(self._table.stats()["tiers"][0]["misses"])


class _ByLayer:
    """What reads each layer's rows from a place of their own."""

    dear = False

    def __init__(self, spec: NgramSpec, row_bytes: int) -> None:
        self._spec = spec
        self._row_bytes = row_bytes

    def make_room(self, tokens: int) -> None:
        rows = tokens * self._spec.num_columns
        self._out = [np.empty((rows, self._row_bytes), np.uint8) for _ in self._spec.layers]

    def prepare(self, piece: Piece) -> Any:
        ids = self._spec.row_ids(piece.tokens, history=piece.history)
        return [np.ascontiguousarray(ids[:, at]).reshape(-1) for at in range(ids.shape[1])]

    def packed(self) -> Bytes:
        shape = (-1, self._spec.num_columns, self._row_bytes)
        return np.stack([rows.reshape(shape) for rows in self._out], axis=1)


class Memmap(_ByLayer):
    """Fancy indexing of `numpy.memmap` over flat files, chunks spread over threads."""

    name = f"numpy.memmap, {THREADS} threads, {CHUNK_ROWS:,} rows each"

    def __init__(self, files: list[Path], spec: NgramSpec, row_bytes: int) -> None:
        super().__init__(spec, row_bytes)
        self._maps = [np.memmap(file, np.uint8, "r").reshape(-1, row_bytes) for file in files]
        self._pool = ThreadPoolExecutor(THREADS)

    def read(self, prepared: list[Int64s]) -> None:
        def copy(layer: int, first: int) -> None:
            chunk = slice(first, first + CHUNK_ROWS)
            self._out[layer][chunk] = self._maps[layer][prepared[layer][chunk]]

        chunks = [
            self._pool.submit(copy, layer, first)
            for layer, ids in enumerate(prepared)
            for first in range(0, len(ids), CHUNK_ROWS)
        ]
        for chunk in chunks:
            chunk.result()

    def close(self) -> None:
        self._pool.shutdown()


class Torch(_ByLayer):
    """`torch.index_select` of single rows of a flat table in memory."""

    name = "torch.index_select, rows in memory"

    def __init__(self, files: list[Path], spec: NgramSpec, row_bytes: int) -> None:
        import torch

        super().__init__(spec, row_bytes)
        self._select, self._tensor = torch.index_select, torch.from_numpy
        flat = (np.fromfile(file, np.uint8).reshape(-1, row_bytes) for file in files)
        self._tables = [torch.from_numpy(rows) for rows in flat]

    def make_room(self, tokens: int) -> None:
        super().make_room(tokens)
        self._targets = [self._tensor(rows) for rows in self._out]

    def prepare(self, piece: Piece) -> Any:
        return [self._tensor(ids) for ids in super().prepare(piece)]

    def read(self, prepared: Any) -> None:
        for table, ids, target in zip(self._tables, prepared, self._targets, strict=True):
            self._select(table, 0, ids, out=target)


class Lmdb:
    """One LMDB key a row, one `get` each."""

    name = "LMDB, one key a row"
    dear = False

    def __init__(self, path: Path, spec: NgramSpec, row_bytes: int) -> None:
        self._spec = spec
        self._row_bytes = row_bytes
        self._environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)

    @staticmethod
    def build(path: Path, files: list[Path], row_bytes: int) -> None:
        room = 2 * sum(file.stat().st_size for file in files) + (64 << 20)
        with lmdb.open(str(path), map_size=room, sync=False) as environment:
            for layer, file in enumerate(files):
                rows = np.memmap(file, np.uint8, "r").reshape(-1, row_bytes)
                for first in range(0, len(rows), _BUILT_ROWS):
                    part = rows[first : first + _BUILT_ROWS]
                    keys = _keys(layer, np.arange(first, first + len(part)))
                    with environment.begin(write=True) as transaction:
                        pairs = zip(keys, (row.tobytes() for row in part), strict=True)
                        transaction.cursor().putmulti(pairs, append=True)

    def make_room(self, tokens: int) -> None:
        shape = (tokens, len(self._spec.layers), self._spec.num_columns, self._row_bytes)
        self._out = np.empty(shape, np.uint8)

    def prepare(self, piece: Piece) -> list[bytes]:
        ids = self._spec.row_ids(piece.tokens, history=piece.history)
        layers = np.broadcast_to(np.arange(ids.shape[1])[None, :, None], ids.shape)
        return _keys(layers.reshape(-1), ids.reshape(-1))

    def read(self, prepared: list[bytes]) -> None:
        flat: Any = memoryview(self._out.data).cast("B")
        width, at = self._row_bytes, 0
        with self._environment.begin(buffers=True) as transaction:
            get = transaction.get
            for key in prepared:
                flat[at : at + width] = get(key)
                at += width

    def packed(self) -> Bytes:
        return self._out

    def close(self) -> None:
        self._environment.close()


def _keys(layer: int | Int64s, ids: Int64s) -> list[bytes]:
    """Eight bytes a row: layer, then row id, so that they ascend as rows do."""
    packed = (np.asarray(layer, np.int64) << 40 | ids).astype(">u8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


def all_but_engram(
    stack: ExitStack, folder: Path, table: Table, source: SyntheticSource
) -> tuple[list[Peer], list[str]]:
    """Build what the peers read, below `folder`.

    Args:
        stack: closes them.
        table: whose rows they have, in `folder / "table"`.

    Returns:
        The peers; and what to say of those that cannot run here.
    """
    spec, row_bytes = table.spec, table.row_format.row_bytes
    files = _flat_files(folder, spec, row_bytes, source)
    Lmdb.build(folder / "rows", files, row_bytes)
    by_key, mapped = Lmdb(folder / "rows", spec, row_bytes), Memmap(files, spec, row_bytes)
    stack.callback(by_key.close)
    stack.callback(mapped.close)
    target = stack.enter_context(tcp_sidecar(folder / "table"))
    remote = stack.enter_context(engram.connect(target))
    found: list[Peer] = [by_key, mapped, Engram("rows over gRPC, TCP loopback", remote)]
    found.append(Torch(files, spec, row_bytes))
    try:
        found.append(stack.enter_context(mooncake(folder, files, spec, row_bytes)))
    except MooncakeMissingError as error:
        return found, [f"{mooncake_peer.NAME} left out: {error}"]
    return found, []


def _flat_files(
    folder: Path, spec: NgramSpec, row_bytes: int, source: SyntheticSource
) -> list[Path]:
    files = []
    for layer in spec.layers:
        path = folder / f"layer-{layer.layer}"
        with path.open("wb") as file:
            for first in range(0, layer.rows, _BUILT_ROWS):
                part = np.empty((min(_BUILT_ROWS, layer.rows - first), row_bytes), np.uint8)
                source.read(layer.layer, first, part)
                file.write(part.data)
        files.append(path)
    return files


@contextmanager
def tcp_sidecar(table: Path) -> Iterator[str]:
    """A sidecar that is reached over TCP on this host; ends with SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "engram", "serve", "--table", f"table={table}"]
    command += ["--listen", f"tcp:{target}", "--ram", "1GiB", "--http", "off"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                engram.connect(target, timeout_s=2.0).close()
                break
            except UnavailableError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield target
    finally:
        process.terminate()
        process.wait(timeout=60)
