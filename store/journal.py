"""What a killed import has safely written: the notes from which the next one goes on.

A note is made only after everything before it was synced and read back. It is of use only while
the same kernel runs, because only then does the page cache still hold what was never synced.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram.store.checks import digest
from engram.store.destination import sync_path
from engram.store.files import read_regular

JOURNAL_FILE = "journal.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Identity of the running kernel: another one after every boot."""
    return _BOOT_ID.read_text().strip()


@dataclass(frozen=True)
class Journal:
    """Progress of one import.

    Attributes:
        identity: what the import makes and of what; another identity cannot be resumed.
        boot: `boot_id()` when it was written.
        digests: content digest of every extent written, synced and read back, in order.
    """

    identity: dict[str, Any]
    boot: str
    digests: tuple[str, ...] = ()

    def write(self, directory: Path) -> None:
        """Replace the journal in one step; it is on the device afterwards."""
        fresh = directory / f"{JOURNAL_FILE}.new"
        body = asdict(self)
        fresh.write_text(json.dumps({"digest": _digest(body), **body}))
        sync_path(fresh)
        os.replace(fresh, directory / JOURNAL_FILE)
        sync_path(directory)

    @classmethod
    def read(cls, directory: Path) -> Journal | None:
        """The journal found there, or None where there is none that can be read."""
        try:
            fields = json.loads(read_regular(directory / JOURNAL_FILE))
            if fields.pop("digest") != _digest(fields):
                return None
            return cls(**{**fields, "digests": tuple(fields["digests"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def _digest(body: dict[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True).encode())
