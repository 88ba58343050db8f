"""What `engram doctor` looks at: a sidecar's figures, its process, its tables, this machine."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

from engram.cli._readings import Reading

_PROC = Path("/proc")
_SYS = Path("/sys")
_LISTENING = "0A"
_CAP_IPC_LOCK = 14
_PIECE_BYTES = 1 << 30
"""Of a file asked about at once."""


@dataclass(frozen=True)
class TableFacts:
    """A table on disk.

    Attributes:
        path: its directory.
        file_system: type of the one it is on.
        rotates: whether the disk does; None if that is not known.
        file_bytes: size of its data file.
        cached_bytes: what of that is in the page cache; None where this user may not know.
    """

    path: Path
    file_system: str = ""
    rotates: bool | None = None
    file_bytes: int = 0
    cached_bytes: int | None = None


@dataclass(frozen=True)
class Facts:
    """All that is known; what is not known is such that nothing is wrong with it.

    Attributes:
        reading: figures of the sidecar; None where none was asked.
        tables: those it serves, or the one asked about.
        allowed_bytes: memory that the sidecar may have, of its machine and cgroups.
        memory_bytes, free_bytes: of the machine.
        swap_used_bytes: of the machine.
        numa_nodes: of the machine.
        arena_policy: which NUMA nodes the arena may be on, as `/proc/PID/numa_maps` says it.
        huge_pages: what `shmem_enabled` is set to.
        memlock_bytes: what a process of this user may lock.
        gpus: whether there are any.
        unseen: what could not be looked at, and why, for people.
    """

    reading: Reading | None = None
    tables: tuple[TableFacts, ...] = ()
    allowed_bytes: int | None = None
    memory_bytes: int = 0
    free_bytes: int = 0
    swap_used_bytes: int = 0
    numa_nodes: int = 1
    arena_policy: str = ""
    huge_pages: str = ""
    memlock_bytes: float = inf
    gpus: bool = False
    unseen: tuple[str, ...] = ()


def facts_of(reading: Reading | None, target: str | None, path: Path | None) -> Facts:
    """Look at everything that can be seen from here.

    Args:
        reading, target: figures of the sidecar, and where it gave them; None where none is asked.
        path: a table's directory besides.
    """
    from engram._channel import is_loopback, split_port
    from engram.errors import StoreError
    from engram.ram.limits import meminfo, memory_allowed

    tables = [table_facts(path)] if path is not None else []
    unseen: list[str] = []
    if reading is not None and target is not None:
        host, port = split_port(target)
        if not is_loopback(host):
            said = f"the machine, process and tables of {target}: run this on its host"
            return Facts(reading, tuple(tables), unseen=(said,))
        process = process_at(port, reading.life)
    else:
        process = None
    policy, allowed, served = "", None, list[Path]()
    if process is not None:
        try:
            served = [each for each in tables_of(process) if path is None or each != path.resolve()]
            policy = arena_policy(process)
            allowed = memory_allowed(process=process)
        except OSError as error:
            unseen.append(f"all of process {process} ({error.strerror}): run this as its user")
    elif reading is not None:
        unseen.append("the sidecar's process and tables: run this as its user, beside it")
    for each in served:
        try:
            tables.append(table_facts(each))
        except StoreError as error:
            # The process may see other directories than this one, being in a container.
            unseen.append(f"a table that is served: {error}")
    uncached = [str(each.path) for each in tables if each.cached_bytes is None]
    if uncached:
        unseen.append(f"the page cache of {', '.join(uncached)}: run this as its owner")
    return Facts(
        reading=reading,
        tables=tuple(tables),
        allowed_bytes=allowed,
        memory_bytes=meminfo(_PROC, "MemTotal"),
        free_bytes=meminfo(_PROC, "MemAvailable"),
        swap_used_bytes=meminfo(_PROC, "SwapTotal") - meminfo(_PROC, "SwapFree"),
        numa_nodes=max(1, len(list((_SYS / "devices/system/node").glob("node[0-9]*")))),
        arena_policy=policy,
        huge_pages=huge_pages(),
        memlock_bytes=_memlock_bytes(),
        gpus=Path("/dev/nvidiactl").exists(),
        unseen=tuple(unseen),
    )


def process_at(port: int, started: float) -> int | None:
    """The process that listens at a TCP port of this machine, if it may be seen.

    Args:
        started: when it did, in seconds since 1970; another that stands in for it is not it.
    """
    sockets = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    for process in filter(str.isdecimal, os.listdir(_PROC)):
        if sockets & set(_links(_PROC / process / "fd")):
            with suppress(OSError):
                return int(process) if abs(_started(process) - started) < 1 else None
    return None


def _memlock_bytes() -> float:
    """What this process may lock: all, where it has the capability to."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = (_PROC / "self" / "status").read_text()
    capabilities = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    privileged = capabilities is not None and int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1
    return inf if privileged or limit == resource.RLIM_INFINITY else limit


def _links(folder: Path) -> Iterator[str]:
    try:
        for entry in os.scandir(folder):
            yield os.readlink(entry.path)
    except OSError:
        return  # it ended, or belongs to somebody else


def _started(process: str) -> float:
    booted = re.search(r"^btime (\d+)$", (_PROC / "stat").read_text(), re.MULTILINE)
    fields = (_PROC / process / "stat").read_text().rpartition(")")[2].split()
    return int(booted[1] if booted else 0) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def tables_of(process: int) -> list[Path]:
    """Directories of the tables that a process has mapped."""
    from engram.store.manifest import DATA_FILE

    found = re.findall(rf"(/.*)/{DATA_FILE}$", (_PROC / str(process) / "maps").read_text(), re.M)
    return [Path(name) for name in dict.fromkeys(found)]


def arena_policy(process: int) -> str:
    """NUMA policy of the process's shared memory; empty where the kernel tells none."""
    try:
        lines = (_PROC / str(process) / "numa_maps").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[1] for line in lines if "memfd:engram" in line), "")


def huge_pages(sys: Path = _SYS) -> str:
    """What `shmem_enabled` is set to; empty where there is none."""
    try:
        text = (sys / "kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return ""
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else ""


def table_facts(path: Path) -> TableFacts:
    """Facts of the table at `path`.

    Raises:
        StoreError: there is none, or its manifest is damaged.
    """
    from engram.store.destination import file_system_of
    from engram.store.manifest import DATA_FILE, read_manifest

    read_manifest(path)
    file = path / DATA_FILE
    return TableFacts(
        path, file_system_of(path), _rotates(path), file.stat().st_size, cached_bytes(file)
    )


def _rotates(path: Path) -> bool | None:
    device = os.stat(path).st_dev
    place = (_SYS / "dev/block" / f"{os.major(device)}:{os.minor(device)}").resolve()
    if place.name.startswith(("vd", "xvd")):
        return None  # a virtual disk says so by default, whatever it is on
    # A partition has no queue of its own.
    for folder in (place, place.parent):
        try:
            return (folder / "queue/rotational").read_text().strip() == "1"
        except OSError:
            continue
    return None


def cached_bytes(file: Path) -> int | None:
    """What of a file is in the page cache; None where this user may not know."""
    import numpy as np

    owner = file.stat().st_uid
    if os.geteuid() not in (0, owner) and not os.access(file, os.W_OK):
        return None  # the kernel would call all of it cached
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    pages = 0
    with file.open("rb") as opened:
        size = file.stat().st_size
        for begin in range(0, size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, size - begin)
            with mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=begin) as piece:
                there = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
                at = np.frombuffer(piece, np.uint8)
                failed = libc.mincore(at.ctypes.data, length, there.ctypes.data)
                del at  # else the piece could not be closed
                if failed:
                    return None
                pages += int((there & 1).sum())
    return pages * mmap.PAGESIZE
