"""What a run leaves behind: processes, shared memory, names in /dev/shm."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_SHM = Path("/dev/shm")
_MEMFD = "/memfd:engram-"


def processes_named(text: str) -> list[int]:
    """Processes with `text` in their command lines, but this one."""
    found = []
    for process in _processes():
        with suppress(OSError):
            if text.encode() in (_PROC / str(process) / "cmdline").read_bytes():
                found.append(process)
    return found


def shared_memory_of(process: int) -> set[int]:
    """Inodes of engram's memfds that a process has open."""
    found = set()
    with suppress(OSError):
        for descriptor in (_PROC / str(process) / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(descriptor).startswith(_MEMFD):
                    found.add(descriptor.stat().st_ino)
    return found


def mappers_of(inodes: set[int]) -> list[int]:
    """Processes that have one of these memfds mapped or open."""
    return [
        process
        for process in _processes()
        if inodes & (_mapped_by(process) | shared_memory_of(process))
    ]


def _mapped_by(process: int) -> set[int]:
    found = set()
    with suppress(OSError):
        for line in (_PROC / str(process) / "maps").read_text().splitlines():
            if _MEMFD in line:
                found.add(int(line.split()[4]))
    return found


def _processes() -> Iterator[int]:
    return (
        int(place.name)
        for place in _PROC.iterdir()
        if place.name.isdecimal() and int(place.name) != os.getpid()
    )


def shared_memory_bytes() -> int:
    """Shared memory of the whole machine, other programs' too."""
    for line in (_PROC / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Shmem":
            return int(rest.split()[0]) * 1024
    return 0


def shm_names() -> set[str]:
    """Names in /dev/shm that could be engram's."""
    if not _SHM.is_dir():
        return set()
    return {name for name in os.listdir(_SHM) if "engram" in name}


def left_behind(name: str, inodes: set[int], names_before: set[str]) -> list[str]:
    """What is wrong after a run, once its processes had time to go; sentences.

    Args:
        name: in the command lines of its processes.
        inodes: of its shared memory.
        names_before: `shm_names` before it.
    """
    problems = []
    for _ in range(20):
        processes, mappers = processes_named(name), mappers_of(inodes)
        if not processes and not mappers:
            break
        time.sleep(0.1)
    if processes:
        problems.append(f"{len(processes)} processes were left behind")
    if mappers:
        problems.append(f"{len(mappers)} processes still map shared memory of the run")
    if names := shm_names() - names_before:
        problems.append(f"left in /dev/shm: {', '.join(sorted(names))}")
    return problems
