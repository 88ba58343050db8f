"""How much memory a RAM tier may take: what the machine and the process's cgroups allow."""

from __future__ import annotations

import os
from pathlib import Path

from engram.errors import ConfigError
from engram.sizes import format_size

DEFAULT_SHARE = 4
"""The part of it that a RAM tier takes when nobody says how much."""
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def memory_allowed(
    proc: Path = _PROC, cgroups: Path = _CGROUPS, process: int | str = "self"
) -> int:
    """Bytes that a process may have at most: of the machine, or of a cgroup above it.

    Args:
        proc, cgroups: where procfs and the cgroup hierarchies are mounted.
        process: its number in procfs; this one when left out.
    """
    limits = [meminfo(proc, "MemTotal")]
    for line in (proc / str(process) / "cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers:
            limits += _limits_above(cgroups, place, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_above(cgroups / "memory", place, "memory.limit_in_bytes")
    return min(limits)


def check_budget(budget: int) -> None:
    """Refuse a RAM tier before its memory is taken, which could end this or another process.

    Raises:
        ConfigError: it is larger than what is allowed, or than what is free.
    """
    allowed, free = memory_allowed(), meminfo(_PROC, "MemAvailable")
    if budget > allowed:
        raise ConfigError(
            f"a RAM tier of {format_size(budget)} is more than the {format_size(allowed)} that "
            "this process may have; give it less"
        )
    if budget > free:
        raise ConfigError(
            f"a RAM tier of {format_size(budget)} is more than the {format_size(free)} that are "
            "free; give it less, or stop what takes the memory"
        )


def meminfo(proc: Path, name: str) -> int:
    """Bytes that `/proc/meminfo` says under a name.

    Raises:
        ConfigError: it does not say it.
    """
    for line in (proc / "meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    raise ConfigError(f"{proc / 'meminfo'} names no {name}; name the RAM tier's size yourself")


def _limits_above(root: Path, place: str, name: str) -> list[int]:
    """Limits of a cgroup and all those it is in, as far as they can be seen from here."""
    found = []
    # In a container the path may be the host's, of which only the end is mounted here, as root.
    groups = [root]
    for part in Path(os.path.normpath(place)).parts[1:]:
        groups.append(groups[-1] / part)
    for group in groups:
        try:
            limit = (group / name).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            found.append(int(limit))
    return found
