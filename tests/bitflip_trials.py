"""Damages a table again and again and reports what goes unnoticed; run by `test_bitflips.py`.

A process of its own, since a miss may be a death by SIGBUS: then its exit status is the report.
Standard output gets one line of JSON: how many trials were made, and what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from store_tables import data_file, everything, expected, flip

from engram.errors import CorruptTableError, EngramError, RowIntegrityError
from engram.rows import Rows
from engram.store.layout import CHECK_BYTES, PAGE_BYTES, PAGE_HEADER_BYTES
from engram.store.manifest import MANIFEST_FILE, read_manifest
from engram.store.reader import StoreReader
from engram.store.verify import verify_table


class Trials:
    """One table, damaged and repaired in turn."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.rng = np.random.default_rng(seed)
        self.manifest, self.physical = read_manifest(path)
        self.layout = self.manifest.layout
        reader = StoreReader(path, guard=True)
        self.layers, self.row_ids = everything(reader)
        self.wanted = expected(reader, self.layers, self.row_ids)
        self.wrong: list[str] = []
        self.made = 0

    def expect(self, holds: bool, *what: object) -> None:
        if not holds:
            self.wrong.append(" ".join(map(str, what)))

    def lookups(self, guard: bool) -> dict[int, tuple[int, ...]] | None:
        """Failed rows of a lookup of all rows, None if the table does not open."""
        try:
            reader = StoreReader(self.path, guard=guard)
        except CorruptTableError:
            return None
        out = Rows.empty((len(self.row_ids),), self.manifest.row_format)
        failures: dict[int, tuple[int, ...]] = {}
        try:
            reader.gather(self.layers, self.row_ids, np.arange(len(self.row_ids)), out)
        except RowIntegrityError as error:
            failures = error.failures
        model_layers = np.array(reader.layers)[self.layers]
        failed = np.zeros(len(self.row_ids), bool)
        for layer, rows in failures.items():
            failed |= (model_layers == layer) & np.isin(self.row_ids, rows)
        same = (out.packed() == self.wanted).all(axis=1)
        self.expect(bool((same | failed).all()), "wrong rows handed out")
        reader.close()
        return failures

    def block_damage(self) -> list[tuple[object, ...]]:
        report = verify_table(self.path, threads=1)
        return [(each.kind, each.extent, each.block, each.rows) for each in report.damage]

    def flip_in_a_row(self) -> None:
        number = int(self.rng.integers(len(self.manifest.extents)))
        extent = self.manifest.extents[number]
        row = int(self.rng.integers(extent.rows))
        block, slot = divmod(row, self.layout.rows_per_block)
        held = min(self.layout.rows_per_block, extent.rows - block * self.layout.rows_per_block)
        start = (self.physical.extent_pages[number] + block) * PAGE_BYTES + PAGE_HEADER_BYTES
        byte = int(self.rng.integers(self.layout.row_bytes + CHECK_BYTES))
        if byte < self.layout.row_bytes:
            at = start + slot * self.layout.row_bytes + byte
        else:
            check = start + held * self.layout.row_bytes + slot * CHECK_BYTES
            at = check + byte - self.layout.row_bytes
        bit = int(self.rng.integers(8))
        flip(data_file(self.path), at, bit)
        row += extent.first_row
        failures = self.lookups(guard=bool(self.made % 2))
        self.expect(failures == {extent.layer: (row,)}, "row", extent.layer, row, failures)
        found = self.block_damage()
        self.expect(found == [("row check", number, block, (row,))], "verify", at, found)
        flip(data_file(self.path), at, bit)

    def flip_in_lmdbs_own_pages(self) -> None:
        """In metas and tree: pages that hold neither rows nor token map."""
        first, count = self.physical.token_map_page, self.physical.token_map_bytes
        token_map = () if first is None else range(first, first + 1 + count // PAGE_BYTES)
        file = data_file(self.path)
        page = self.rng.choice(
            [page for page in self.pages_without_rows() if page not in token_map]
        )
        at = int(page) * PAGE_BYTES + int(self.rng.integers(PAGE_BYTES))
        bit = int(self.rng.integers(8))
        flip(file, at, bit)
        self.expect(self.lookups(guard=bool(self.made % 2)) is None, "opened", at)
        found = {kind for kind, *_ in self.block_damage()}
        self.expect(found == {"structure"}, "verify", at, found)
        flip(file, at, bit)

    def flip_elsewhere(self) -> None:
        """In `table.json`, the headers of extents, or the pages that hold no rows."""
        where = int(self.rng.integers(10))
        if where == 0:
            file = self.path / MANIFEST_FILE
            at = int(self.rng.integers(file.stat().st_size))
        elif where == 1:
            file = data_file(self.path)
            page = self.rng.choice(self.physical.extent_pages)
            at = int(page) * PAGE_BYTES + int(self.rng.integers(PAGE_HEADER_BYTES))
        else:
            file = data_file(self.path)
            at = int(self.rng.choice(self.pages_without_rows())) * PAGE_BYTES
            at += int(self.rng.integers(PAGE_BYTES))
        bit = int(self.rng.integers(8))
        flip(file, at, bit)
        failures = self.lookups(guard=bool(self.made % 2))
        self.expect(not failures, "rows failed", file.name, at, failures)
        self.expect(failures is None or where == 1, "opened", file.name, at)
        found = {kind for kind, *_ in self.block_damage()}
        allowed = {"header", "structure"} if where == 1 else {"structure", "token map", "manifest"}
        self.expect(bool(found) and found <= allowed, "verify", file.name, at, found)
        flip(file, at, bit)

    def pages_without_rows(self) -> list[int]:
        taken = set()
        for extent, page in zip(self.manifest.extents, self.physical.extent_pages, strict=True):
            taken |= set(range(page, page + self.layout.blocks(extent.rows)))
        return sorted(set(range(self.physical.file_bytes // PAGE_BYTES)) - taken)

    def cut(self) -> None:
        """Cut the file: refused when opened, and the missing blocks are listed."""
        file = data_file(self.path)
        whole = file.read_bytes()
        size = int(self.rng.integers(len(whole)))
        os.truncate(file, size)
        self.expect(self.lookups(guard=bool(self.made % 2)) is None, "opened, cut at", size)
        found = [each[:3] for each in self.block_damage() if each[0] not in _OF_THE_TABLE]
        missing = [
            ("missing", number, block)
            for number, extent in enumerate(self.manifest.extents)
            for block in range(self.layout.blocks(extent.rows))
            if (self.physical.extent_pages[number] + block + 1) * PAGE_BYTES > size
        ]
        self.expect(found == missing, "verify, cut at", size)
        file.write_bytes(whole)

    def repeat(self, trial: str, times: int) -> None:
        for _ in range(times):
            try:
                getattr(self, trial)()
            except EngramError as error:
                self.expect(False, trial, error)
            self.made += 1


_OF_THE_TABLE = ("structure", "token map", "file", "manifest")


def main() -> None:
    trials = Trials(Path(sys.argv[1]), seed=int(sys.argv[2]))
    for argument in sys.argv[3:]:
        trial, times = argument.split("=")
        trials.repeat(trial, int(times))
    trials.expect(verify_table(trials.path).sound, "the table was not repaired between trials")
    print(json.dumps([trials.made, trials.wrong]))


if __name__ == "__main__":
    main()
