"""Rows of one lookup that failed, gathered from its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engram.errors import RowIntegrityError


class Failures:
    """Failed rows: each once, however many parts name it."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, None]] = {}
        self._causes: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, rows: Mapping[int, Sequence[int]], cause: str) -> None:
        """Add rows by model layer, and why they failed."""
        for layer, failed in rows.items():
            self._rows.setdefault(layer, {}).update(dict.fromkeys(failed))
        if cause:
            self._causes[cause] = None

    @property
    def rows(self) -> dict[int, Sequence[int]]:
        """Row ids by model layer."""
        return {layer: list(failed) for layer, failed in self._rows.items()}

    @property
    def cause(self) -> str:
        """All causes, in words."""
        return ", ".join(self._causes)

    def raise_any(self, table: str, *, served: bool = False) -> None:
        """Raise for what failed, if anything did.

        Raises:
            RowIntegrityError: see `RowIntegrityError.of`.
        """
        if self._rows:
            raise RowIntegrityError.of(self.rows, table, self.cause, served=served)
