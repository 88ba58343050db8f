"""engram: hashed n-gram memory tables on SSD, served bit-exactly to model code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.errors import EngramError, RowIntegrityError
    from engram.remote import connect
    from engram.rows import RowFormat, Rows
    from engram.spec import NgramSpec
    from engram.table import Table, open

__version__ = "0.1.0"

# Resolved on first use (PEP 562), so that importing one part never pays for the others.
_HOMES = {
    "EngramError": "engram.errors",
    "NgramSpec": "engram.spec",
    "RowFormat": "engram.rows",
    "RowIntegrityError": "engram.errors",
    "Rows": "engram.rows",
    "Table": "engram.table",
    "connect": "engram.remote",
    "open": "engram.table",
}

__all__ = [
    "EngramError",
    "NgramSpec",
    "RowFormat",
    "RowIntegrityError",
    "Rows",
    "Table",
    "__version__",
    "connect",
    "open",
]


_PACKAGES = ("integrations", "nn")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"engram.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'engram' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
