"""Every error that engram raises on purpose, as one tree.

    EngramError
    |-- SpecError             a spec, tokenizer or checkpoint config that does not add up
    |   `-- SpecMismatchError a table of another spec than the caller's, the field named
    |-- TokenError            token ids, starts, history or dead positions that cannot be used
    |-- SelectionError        a layer, column or row that does not exist, a buffer of another shape
    |-- ModelError            a model in memory that cannot take its rows from a table
    |-- CheckpointError       a source checkpoint that is incomplete or not what the spec expects
    |-- StoreError            a table on disk that cannot be created or opened
    |   |-- DestinationError  the place to write to exists, is too small or is unsuitable
    |   `-- CorruptTableError bytes on disk that are not what was written
    |-- TraceError            a trace that is damaged, says too little, or is of another table
    |-- RowIntegrityError     single rows that could not be read or verified; the others are valid
    |-- ConfigError           a configuration or command-line value that cannot be used
    `-- ServiceError          the sidecar
        |-- UnavailableError  cannot be reached, or went away
        |-- UnknownTableError serves no table of that name
        |-- RequestError      refused the request as malformed or too large
        `-- OverloadError     has no room or time for the request now

A message is one line: what happened, then what to do. Nothing has changed when one is raised,
except where its class says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EngramError(Exception):
    """Base of all errors of this package."""


class SpecError(EngramError):
    """A spec, tokenizer or checkpoint config is incomplete or contradicts itself."""


class SpecMismatchError(SpecError):
    """Two specs that must agree do not.

    `field` names the first field that differs.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process pools; by default only the message would.
        return type(self), (str(self), self.field)


class TokenError(EngramError):
    """Token ids, `starts`, `history` or `dead` cannot be used with the spec."""


class SelectionError(EngramError):
    """A layer, column or row id does not exist, or an output buffer does not fit."""


class ModelError(EngramError):
    """A model in memory cannot take its rows from a table, or cannot be saved after it did."""


class CheckpointError(EngramError):
    """A source checkpoint lacks a tensor or file, or one has the wrong dtype, shape or size."""


class StoreError(EngramError):
    """A table on disk cannot be created, opened or read."""


class DestinationError(StoreError):
    """The destination exists, has too little space, or lies on an unsuitable file system."""


class CorruptTableError(StoreError):
    """A table's own structure (metas, tree, manifest, size) is not what was written."""


class TraceError(EngramError):
    """A trace of n-grams is damaged, of another format or table, or says too little."""


class RowIntegrityError(EngramError):
    """Some rows failed their check or could not be read.

    `layer` is the model's layer index of the first failed row, `row_ids` the failed row ids of
    that layer, `failures` all of them as `{layer: row_ids}`, `cause` why, if that is known. Rows
    that are not named are valid in the caller's output; the failed ones are unspecified. The
    message names the first eight of each layer.
    """

    def __init__(self, message: str, failures: dict[int, Sequence[int]], cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause
        self.failures = {layer: tuple(int(row) for row in rows) for layer, rows in failures.items()}
        self.layer, self.row_ids = next(iter(self.failures.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.failures, self.cause)

    @classmethod
    def of(
        cls,
        failures: dict[int, Sequence[int]],
        table: str,
        cause: str = "",
        *,
        served: bool = False,
    ) -> RowIntegrityError:
        """Build the message from the rows that failed in `table`, and why if that is known.

        `table` is the path to verify or, if `served`, the name a sidecar serves it as.
        """
        named = "; ".join(
            f"layer {layer} rows {', '.join(str(int(row)) for row in rows[:8])}"
            + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            for layer, rows in failures.items()
        )
        verify = (
            f"on the sidecar's host run 'engram verify' on the directory served as {table}"
            if served
            else f"run 'engram verify {table}'"
        )
        return cls(
            f"{table}: rows could not be read intact ({named}{': ' if cause else ''}{cause}); "
            f"{verify} and import the table again if it lists damage",
            failures,
            cause,
        )


class ConfigError(EngramError):
    """A configuration file, environment variable or command-line value cannot be used."""


class ServiceError(EngramError):
    """The sidecar could not serve a call."""


class UnavailableError(ServiceError):
    """The sidecar cannot be reached, went away, or what answers is not engram."""


class UnknownTableError(ServiceError):
    """The sidecar serves no table of that name."""


class RequestError(ServiceError):
    """The sidecar refused a request as malformed or over a limit."""


class OverloadError(ServiceError):
    """The sidecar has no room or time for the request now; try again later."""
