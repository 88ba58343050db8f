"""The scrub: every byte of a table against what was written, every damaged block named.

It needs nothing of LMDB and trusts only `table.json`, which proves itself, so it also works on a
table that cannot be opened. Rows are read by plain reads, in pieces of 1 MiB.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram.errors import CorruptTableError, StoreError
from engram.store import datafile
from engram.store.manifest import Extent, Manifest, Physical, read_manifest
from engram.store.scrub import Damage, ExtentScrub

DAMAGE_MAX = 100_000
"""Damaged places that a report lists; all are counted."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass
class VerifyReport:
    """What a scrub found.

    Attributes:
        path: of the table.
        fingerprint: the table's, or None if its manifest is damaged.
        rows, blocks, bytes: how much was read and compared.
        seconds: how long it took.
        damage: what is damaged, in the order of the file; at most `DAMAGE_MAX` places.
        damaged_places: how many there are.
    """

    path: str
    fingerprint: str | None = None
    rows: int = 0
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    damage: list[Damage] = field(default_factory=list)
    damaged_places: int = 0

    @property
    def sound(self) -> bool:
        return self.damaged_places == 0

    def add(self, *damage: Damage) -> None:
        self.damaged_places += len(damage)
        self.damage += damage[: DAMAGE_MAX - len(self.damage)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"sound": self.sound, **asdict(self)}

    def lines(self) -> list[str]:
        """For people: one line for each damaged place, then one that sums up."""
        found = [str(damage) for damage in self.damage]
        if self.damaged_places > len(found):
            found.append(f"and {self.damaged_places - len(found):,} more")
        read = f"{self.rows:,} rows in {self.blocks:,} blocks read"
        verdict = (
            "every byte is as it was written"
            if self.sound
            else f"damaged places: {self.damaged_places:,}; import the table again"
        )
        return [*found, f"{self.path}: {read}; {verdict}"]


def verify_table(
    path: str | Path, *, progress: Progress | None = None, threads: int = 2
) -> VerifyReport:
    """Compare every byte of the table at `path` with its checks and digests.

    Args:
        path: the table's directory.
        progress: told of the bytes done, from this thread.
        threads: extents that are read at once.

    Raises:
        StoreError: there is no table, or one of a format that this engram does not read.
    """
    started = time.monotonic()
    directory = Path(path)
    report = VerifyReport(str(path))
    try:
        manifest, physical = read_manifest(directory)
    except CorruptTableError as error:
        report.add(Damage("manifest", message=str(error)))
        return report
    report.fingerprint = manifest.fingerprint
    try:
        descriptor = datafile.open_file(directory)
    except StoreError as error:
        report.add(Damage("file", message=str(error)))
        return report
    try:
        report.add(*_structure(descriptor, manifest, physical))
        _scrub(descriptor, manifest, physical, report, progress, threads)
    finally:
        os.close(descriptor)
    report.seconds = time.monotonic() - started
    return report


def _structure(descriptor: int, manifest: Manifest, physical: Physical) -> list[Damage]:
    """What opening the table would refuse; each part is looked at even if others are damaged."""
    found = []
    try:
        datafile.check_token_map(descriptor, manifest, physical)
    except CorruptTableError as error:
        found.append(Damage("token map", page=physical.token_map_page, message=str(error)))
    try:
        datafile.check_structure(descriptor, manifest, physical)
        datafile.read_embedded(descriptor, manifest, physical)
    except StoreError as error:
        if str(error) not in [damage.message for damage in found]:
            found.append(Damage("structure", message=str(error)))
    return found


def _scrub(
    descriptor: int,
    manifest: Manifest,
    physical: Physical,
    report: VerifyReport,
    progress: Progress | None,
    threads: int,
) -> None:
    scratch = threading.local()

    def scrub(number: int) -> list[Damage]:
        if not hasattr(scratch, "scrub"):
            scratch.scrub = ExtentScrub(descriptor, manifest.layout, manifest.table_seed)
        found: list[Damage] = scratch.scrub.run(
            number, manifest.extents[number], physical.extent_pages[number]
        )
        return found

    total = sum(manifest.layout.value_bytes(extent.rows) for extent in manifest.extents)
    with ThreadPoolExecutor(threads, thread_name_prefix="engram-verify") as pool:
        for extent, damage in _in_order(pool, scrub, manifest.extents, 2 * threads):
            report.add(*damage)
            report.rows += extent.rows
            report.blocks += manifest.layout.blocks(extent.rows)
            report.bytes += manifest.layout.value_bytes(extent.rows)
            if progress is not None:
                progress(report.bytes, total)


def _in_order(
    pool: ThreadPoolExecutor,
    scrub: Callable[[int], list[Damage]],
    extents: tuple[Extent, ...],
    ahead_max: int,
) -> Iterator[tuple[Extent, list[Damage]]]:
    """Each extent with its damage; few are ahead, since a wholly damaged one lists every row."""
    ahead: deque[tuple[Extent, Future[list[Damage]]]] = deque()
    for number, extent in enumerate(extents):
        ahead.append((extent, pool.submit(scrub, number)))
        if len(ahead) > ahead_max:
            done, future = ahead.popleft()
            yield done, future.result()
    for done, future in ahead:
        yield done, future.result()
