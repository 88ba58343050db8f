"""Sizes in bytes as people write them: `8GiB`."""

from __future__ import annotations

import re

from engram.errors import ConfigError

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str | int) -> int:
    """Bytes in `text`: a number with B, KiB, MiB, GiB or TiB, or of bytes without a unit.

    Raises:
        ConfigError: anything else, negative numbers and decimal units included.
    """
    found = _SIZE.fullmatch(str(text).strip())
    if found is None or (found[2] or "B") not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write it like 512MiB or 8GiB")
    size = float(found[1]) * _UNITS[found[2] or "B"]
    if not size.is_integer():
        raise ConfigError(f"{text!r} is not a whole number of bytes; write it like 512MiB or 8GiB")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes in the largest unit of which there is at least one."""
    name, unit = "B", 1
    for candidate, factor in _UNITS.items():
        if factor <= size:
            name, unit = candidate, factor
    return f"{size / unit:.1f}".removesuffix(".0") + name
