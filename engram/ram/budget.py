"""How much memory a RAM tier may have."""

from __future__ import annotations

import os
from pathlib import Path

from engram.errors import ConfigError
from engram.sizes import format_size, parse_size

_CGROUPS = Path("/sys/fs/cgroup")


def memory_allowed() -> int:
    """Bytes that this process may use: the machine's memory, or its cgroup's limit if less."""
    allowed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _cgroup_limits():
        allowed = min(allowed, limit)
    return allowed


def _cgroup_limits() -> list[int]:
    """Limits of this process's cgroup (version 2) and of all above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    if name is None:
        return []
    folder = _CGROUPS / name.lstrip("/")
    limits = []
    for place in (folder, *folder.parents):
        if not place.is_relative_to(_CGROUPS):
            break
        try:
            text = (place / "memory.max").read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            limits.append(int(text))
    return limits


def ram_budget(asked: int | str | None, *, most: int | None = None) -> int:
    """Bytes for the RAM tier.

    Args:
        asked: a size; None for a quarter of the memory allowed, and no more than `most`.

    Raises:
        ConfigError: no size, or more than this process may use.
    """
    allowed = memory_allowed()
    if asked is None:
        quarter = allowed // 4
        return quarter if most is None else min(quarter, most)
    budget = parse_size(asked)
    if budget > allowed:
        raise ConfigError(
            f"a RAM tier of {format_size(budget)} is more than the {format_size(allowed)} this "
            "process may use; give it less, or raise the memory limit"
        )
    return budget
