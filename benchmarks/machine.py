"""What a benchmark measures of the machine itself: its disk, its page cache, its processes."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def microseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def fio_rate(path: Path, seconds: int) -> float:
    """4 KiB random reads a second at queue depth 64, past the page cache, other ones each time."""
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed: apt install fio")
    command = [
        "fio",
        "--name=random",
        f"--filename={path}",
        "--readonly",
        "--rw=randread",
        "--randrepeat=0",
        "--bs=4k",
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=64",
        "--time_based",
        f"--runtime={seconds}",
        "--output-format=json",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(answer.stdout)["jobs"][0]["read"]["iops"])


_READER = """
import mmap, os, random, sys, threading, time
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
pages = os.fstat(file).st_size >> 12
until = time.monotonic() + float(sys.argv[2])
counts = []
def read():
    room, choose, count = mmap.mmap(-1, 4096), random.Random(), 0
    while time.monotonic() < until:
        os.preadv(file, [room], choose.randrange(pages) << 12)
        count += 1
    counts.append(count)
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(counts))
"""


def read_rate(path: Path, seconds: int) -> tuple[float, str]:
    """As `fio_rate`, or where there is no fio by 8 threads in a process for each core; and by what.

    Processes, because one interpreter would read no faster than it runs.
    """
    if shutil.which("fio") is not None:
        return fio_rate(path, seconds), "fio"
    command = [sys.executable, "-c", _READER, str(path), str(seconds)]
    readers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in os.sched_getaffinity(0)
    ]
    counts = [int(reader.communicate()[0]) for reader in readers]
    return sum(counts) / seconds, f"{len(readers)} processes of 8 threads"


def resident_share(path: Path) -> float:
    """The part of a file that is in the page cache, 0 to 1."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        whole = np.frombuffer(view, np.uint8)
        pages = np.empty(-(-whole.size // mmap.PAGESIZE), np.uint8)
        failed = _libc.mincore(whole.ctypes.data, whole.size, pages.ctypes.data)
        del whole
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return float((pages & 1).mean())


class QueueDepth:
    """Reads under way on average, on the device of a file, while the `with` block runs.

    Attributes:
        mean: None where the system does not say.
    """

    def __init__(self, path: Path) -> None:
        device = os.stat(path).st_dev
        self._stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        self.mean: float | None = None

    def __enter__(self) -> QueueDepth:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._read()
        if self._before and after:
            waited_s = (after[1] - self._before[1]) / 1000
            self.mean = waited_s / (after[0] - self._before[0])

    def _read(self) -> tuple[float, int] | None:
        try:
            return time.perf_counter(), int(self._stat.read_text().split()[3])
        except (OSError, IndexError):
            return None


def status_bytes(name: str, pid: int | str = "self") -> int:
    """A line of a process's status, like RssAnon or VmHWM, in bytes; 0 if it is not there."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def owned_bytes(pid: int) -> int:
    """Memory that a process owns: its private pages, and all shared memory it holds, in full.

    Shared memory counts by what was taken of it, also if no process has touched it yet. Pages of
    files are the system's.
    """
    shared: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:"):
                status = entry.stat()
                shared[status.st_ino] = status.st_blocks * 512
        except OSError:  # closed meanwhile
            continue
    return status_bytes("RssAnon", pid) + max(sum(shared.values()), status_bytes("RssShmem", pid))


def children() -> set[int]:
    """Processes that this one started and that still run."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that ended meanwhile
            found |= set(map(int, (task / "children").read_text().split()))
    return found
