"""Reading back what an import wrote, in a process that shares no memory with the writer.

The import starts it (`python -m engram.store.readback`) and speaks with it by lines of JSON: one
request, one answer. It ends with its standard input, so it never outlives the import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from engram.errors import CorruptTableError, EngramError
from engram.rows import Bytes
from engram.store.datafile import check_structure, open_file
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES, BlockLayout
from engram.store.manifest import read_manifest
from engram.store.pack import ALL_SOUND, unpack_rows
from engram.store.tree import placed_values, read_meta

PIECE_BLOCKS = 256
"""Blocks that are read and verified at once: 1 MiB, which stays in the processor's cache."""


class Readback:
    """The import's side: hands over what to read back and waits for the verdict."""

    def __init__(self, directory: Path, layout: BlockLayout, table_seed: int) -> None:
        import engram

        paths = [str(Path(engram.__file__).parents[1]), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engram.store.readback"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
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
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def extent(self, page: int, layer: int, first_row: int, rows: int) -> str:
        """Read one extent back and return the digest of its rows.

        Raises:
            CorruptTableError: a check, slack or page header is not as it was written.
        """
        return str(self._ask({"extent": [page, layer, first_row, rows]}))

    def finish(self) -> None:
        """Verify `table.json` against the data file, LMDB's own pages included.

        Raises:
            CorruptTableError: they do not belong together.
        """
        self._ask({"finish": True})

    def _ask(self, question: dict[str, Any]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({**self._first, **question}) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        self._first = {}
        if not answer:
            raise CorruptTableError(
                "the process that reads the table back has died; free some memory and import again"
            )
        reply = json.loads(answer)
        if "error" in reply:
            raise CorruptTableError(
                f"the table could not be read back as it was written ({reply['error']}); "
                "check the device and the memory, then import again"
            )
        return reply["done"]


class _Reader:
    """The other process: reads by descriptor, into buffers of bounded size."""

    def __init__(self, directory: str, row_bytes: int, extent_blocks: int, table_seed: int) -> None:
        self._directory = Path(directory)
        self._layout = BlockLayout(row_bytes, extent_blocks)
        self._seed = table_seed
        self._descriptor = open_file(self._directory)
        self._span = np.empty(PIECE_BLOCKS * PAGE_BYTES, np.uint8)
        self._rows = np.empty((PIECE_BLOCKS * self._layout.rows_per_block, row_bytes), np.uint8)

    def extent(self, page: int, layer: int, first_row: int, rows: int) -> str:
        layout = self._layout
        state = xxhash.xxh3_128((rows * layout.row_bytes).to_bytes(8, "little"))
        start, left = page * PAGE_BYTES + PAGE_HEADER_BYTES, layout.value_bytes(rows)
        for first in range(0, rows, len(self._rows)):
            here = self._rows[: min(len(self._rows), rows - first)]
            span = self._span[: min(self._span.size, left)]
            self._read(span, start)
            bad = unpack_rows(span, layout, self._seed, layer, first_row + first, here)
            if bad != ALL_SOUND:
                raise CorruptTableError(f"layer {layer} row {first_row + first + bad}")
            state.update(here.data)
            start += span.size
            left -= span.size
        return state.hexdigest()

    def _read(self, into: Bytes, position: int) -> None:
        view = into.data
        while view:
            count = os.preadv(self._descriptor, [view], position)
            if not count:
                raise CorruptTableError(f"the data file ends at byte {position}")
            view = view[count:]
            position += count

    def finish(self) -> None:
        manifest, physical = read_manifest(self._directory)
        check_structure(self._descriptor, manifest, physical)
        placed = placed_values(self._descriptor, read_meta(self._descriptor))
        found = [
            (*_key_fields(value.key), value.page)
            for value in placed
            if not value.key.startswith(b"\xff\xff\xff\xff")
        ]
        expected = [
            (extent.layer, extent.first_row, page)
            for extent, page in zip(manifest.extents, physical.extent_pages, strict=True)
        ]
        if found != expected:
            raise CorruptTableError("LMDB's tree differs from the manifest")


def _key_fields(key: bytes) -> tuple[int, int]:
    return int.from_bytes(key[:4], "big"), int.from_bytes(key[4:], "big")


def main() -> None:
    """Answer requests until standard input ends."""
    reader: _Reader | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if reader is None:
                names = ("directory", "row_bytes", "extent_blocks", "table_seed")
                reader = _Reader(*(request[name] for name in names))
            if "extent" in request:
                reply = {"done": reader.extent(*request["extent"])}
            else:
                reader.finish()
                reply = {"done": ""}
        except (EngramError, OSError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
