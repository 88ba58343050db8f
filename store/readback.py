"""Reading back what an import wrote, in a process that shares no memory with the writer.

The import starts it (`python -m engram.store.readback`) and speaks with it by lines of JSON: one
request, one answer. It ends with its standard input, so it never outlives the import.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from engram.errors import CorruptTableError, EngramError
from engram.rows import Bytes
from engram.store.datafile import check_structure, open_file, read_embedded
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES, BlockLayout
from engram.store.manifest import read_manifest
from engram.store.pack import ALL_SOUND, unpack_rows

PIECE_BLOCKS = 512
"""Blocks that are read and verified at once: 2 MiB, which stay in the processor's cache."""
_IDLE_SECONDS = 20


class Readback:
    """The import's side: hands over what to read back and waits for the verdict."""

    def __init__(self, directory: Path, layout: BlockLayout, table_seed: int) -> None:
        idle = _idle_process()
        self._may_have_ended = idle is not None
        self._process = idle or _start_process()
        self._first = {
            "directory": str(directory),
            "row_bytes": layout.row_bytes,
            "extent_blocks": layout.extent_blocks,
            "table_seed": table_seed,
        }

    def __enter__(self) -> Readback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not _idle:
            _idle.append((os.getpid(), self._process))
        else:
            _end(self._process)

    def extent(self, page: int, layer: int, first_row: int, rows: int) -> str:
        """Read one extent back and return the digest of its rows.

        Raises:
            CorruptTableError: a check, slack or page header is not as it was written.
        """
        return str(self._ask({"extent": [page, layer, first_row, rows]}))

    def finish(self) -> None:
        """Verify `table.json` against the data file: LMDB's own pages, manifest and token map.

        Raises:
            CorruptTableError: they do not belong together.
        """
        self._ask({"finish": True})

    def _ask(self, question: dict[str, Any]) -> Any:
        question, self._first = {**self._first, **question}, {}
        may_have_ended, self._may_have_ended = self._may_have_ended, False
        try:
            return _exchange(self._process, question)
        except _DeadError:
            if not may_have_ended:
                raise
        _end(self._process)
        self._process = _start_process()
        return _exchange(self._process, question)


class _DeadError(CorruptTableError):
    """The other process has ended."""


def _exchange(process: subprocess.Popen[str], question: dict[str, Any]) -> Any:
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        answer = stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise _DeadError(
            "the process that reads the table back has died; free memory, import again"
        )
    reply = json.loads(answer)
    if "error" in reply:
        raise CorruptTableError(
            f"the table could not be read back as it was written ({reply['error']}); "
            "check the device and the memory, then import again"
        )
    return reply["done"]


_idle: list[tuple[int, subprocess.Popen[str]]] = []
"""At most one process that waits for the next import, with the id of the process it belongs to.
It ends by itself after `_IDLE_SECONDS`. Starting one costs about as much as a small import."""


def _start_process() -> subprocess.Popen[str]:
    import engram

    paths = [str(Path(engram.__file__).parents[1]), *filter(None, sys.path)]
    return subprocess.Popen(
        [sys.executable, "-m", "engram.store.readback"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def warm_up() -> None:
    """Start the process of the next import now, while the caller has other things to prepare."""
    if not _idle:
        _idle.append((os.getpid(), _start_process()))


def _idle_process() -> subprocess.Popen[str] | None:
    """The waiting process, unless it was inherited by a fork. It may have ended meanwhile."""
    owner, process = _idle.pop() if _idle else (0, None)
    return process if owner == os.getpid() else None


@atexit.register
def _end_idle() -> None:
    while _idle:
        owner, process = _idle.pop()
        if owner == os.getpid():
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class _Reader:
    """The other process: reads into buffers of bounded size.

    It opens the file for every request, since an import that starts over makes a new one.
    """

    def __init__(self, directory: str, row_bytes: int, extent_blocks: int, table_seed: int) -> None:
        self._directory = Path(directory)
        self._layout = BlockLayout(row_bytes, extent_blocks)
        self._seed = table_seed
        self._span = np.empty(PIECE_BLOCKS * PAGE_BYTES, np.uint8)
        self._rows = np.empty((PIECE_BLOCKS * self._layout.rows_per_block, row_bytes), np.uint8)

    def extent(self, page: int, layer: int, first_row: int, rows: int) -> str:
        layout = self._layout
        state = xxhash.xxh3_128((rows * layout.row_bytes).to_bytes(8, "little"))
        start, left = page * PAGE_BYTES + PAGE_HEADER_BYTES, layout.value_bytes(rows)
        with self._data_file() as descriptor:
            os.posix_fadvise(descriptor, start, left, os.POSIX_FADV_WILLNEED)
            for first in range(0, rows, len(self._rows)):
                here = self._rows[: min(len(self._rows), rows - first)]
                span = self._span[: min(self._span.size, left)]
                _fill(descriptor, span, start)
                bad = unpack_rows(span, layout, self._seed, layer, first_row + first, here)
                if bad != ALL_SOUND:
                    raise CorruptTableError(f"layer {layer} row {first_row + first + bad}")
                state.update(here.data)
                start += span.size
                left -= span.size
        return state.hexdigest()

    @contextmanager
    def _data_file(self) -> Iterator[int]:
        descriptor = open_file(self._directory)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """What opening the table does, so that none is published that cannot be opened."""
        manifest, physical = read_manifest(self._directory)
        with self._data_file() as descriptor:
            check_structure(descriptor, manifest, physical)
            read_embedded(descriptor, manifest, physical)


def _fill(descriptor: int, into: Bytes, position: int) -> None:
    view = into.data
    while view:
        count = os.preadv(descriptor, [view], position)
        if not count:
            raise CorruptTableError(f"the data file ends at byte {position}")
        view = view[count:]
        position += count


def main() -> None:
    """Answer requests until standard input ends, or none comes for a while between imports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(_IDLE_SECONDS)
    reader: _Reader | None = None
    for line in sys.stdin:
        signal.alarm(0)
        request = json.loads(line)
        try:
            if reader is None:
                names = ("directory", "row_bytes", "extent_blocks", "table_seed")
                reader = _Reader(*(request[name] for name in names))
            if "extent" in request:
                reply = {"done": reader.extent(*request["extent"])}
            else:
                reader.finish()
                reply = {"done": "finished"}
        except (EngramError, OSError) as error:
            reply = {"error": str(error)}
        if "finish" in request:
            reader = None
            signal.alarm(_IDLE_SECONDS)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    # The import may be killed while it is being answered.
    with suppress(BrokenPipeError):
        main()
    # Nothing is left to be torn down, and numba takes half a second to do it.
    os._exit(0)
