"""What clients ask of a sidecar, and what they are told when it fails: said, logged and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from engram._counters import Counters, Histogram
from engram._wire import FAULTS, fault_of
from engram.errors import EngramError
from engram.proto.v1 import engram_pb2 as pb

_SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

_log = logging.getLogger("engram.service")


def _reason(code: int) -> str:
    name: str = pb.ErrorCode.Name(code)
    return name.removeprefix("ERROR_CODE_").lower()


METHODS = ("fetch", "lookup", "prefetch")
REASONS = tuple(_reason(fault.code) for fault in FAULTS)
"""Why requests are rejected."""


class Traffic:
    """Requests of all clients.

    Args:
        tables: names of those that are served.

    Attributes:
        rejected: counts of requests that were refused or failed as a whole, by reason.
        sizes: by table and method, how many n-grams requests named.
    """

    def __init__(self, tables: Iterable[str]) -> None:
        self.rejected = Counters(*REASONS)
        self.sizes = {(table, method): Histogram(_SIZES) for table in tables for method in METHODS}

    def asked(self, table: str, method: str, ngrams: int) -> None:
        """Count a request that was well-formed."""
        self.sizes[table, method].add(ngrams)

    def reject(self, error: Exception) -> None:
        """Count a request that ended with `error`."""
        self.rejected.add(**{_reason(fault_of(error).code): 1})

    def packed(self, error: Exception, doing: str) -> pb.Error:
        """`error` for a client, counted; one that is a defect of ours goes to the log.

        Args:
            doing: what failed, for the log.
        """
        self.reject(error)
        message = str(error)
        if not isinstance(error, EngramError):
            _log.error("%s failed", doing, exc_info=error)
            message = "the sidecar failed on this request; its log says more"
        return pb.Error(code=fault_of(error).code, message=message)
