"""Where the rows of a new table come from."""

from __future__ import annotations

import json
from typing import Any, Protocol

from engram.rows import Bytes
from engram.store.checks import seed_of
from engram.store.manifest import Schema


class RowSource(Protocol):
    """Packed rows by layer and row id, readable again and again with the same result.

    Attributes:
        digest: identity of the content; two sources of the same digest give the same rows.
        description: JSON-ready facts for people, kept in the manifest: kind, names, sizes.
    """

    digest: str
    description: dict[str, Any]

    def read(self, layer: int, first_row: int, out: Bytes) -> None:
        """Fill `out`, uint8 `[n, row_bytes]`, with rows `first_row` onwards of a model layer.

        Called from one thread at a time, with ascending rows.

        Raises:
            CheckpointError: the source lacks these rows or cannot be read.
        """


def table_seed_of(schema: Schema, source_digest: str) -> int:
    """Seed of a table's row checks: from its spec, its row format and the source's content."""
    row_format = json.dumps(schema.row_format.to_dict(), sort_keys=True)
    return seed_of(schema.spec.encode(), row_format.encode(), source_digest.encode())
