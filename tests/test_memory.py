"""Shared memory and its seals, tried from real other processes."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from python_process import run_python

from engram.errors import ConfigError, ServiceError
from engram.ram.memory import SEALS_OF_READER, SEALS_OF_WRITER, Memory

SIZE = 3 * mmap.PAGESIZE
SEAL_WRITE = 0x08

# Each way to change memory by its descriptor or a map of it; run in another process.
ATTACKS = r"""
import ctypes, errno, fcntl, json, mmap, os, sys

descriptor, size = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
FAILED = ctypes.c_void_p(-1).value

def call(name, *arguments):
    found = getattr(libc, name)(*arguments)
    if found in (-1, FAILED):
        raise OSError(ctypes.get_errno(), name)
    return found

def mapped(protection=READ, flags=mmap.MAP_SHARED, fd=descriptor):
    return call("mmap", None, size, protection, flags, fd, 0)

def at(address):
    return ctypes.c_void_p(address), ctypes.c_size_t(size)

def reopened(flags):
    return os.open(f"/proc/self/fd/{descriptor}", flags)

def fallocate(mode, length):
    call("fallocate", descriptor, mode, ctypes.c_long(0), ctypes.c_long(length))

def moved():
    address = call("mremap", *at(mapped()), ctypes.c_size_t(2 * size), 1)
    call("mprotect", *at(address), BOTH)

def through_proc():
    address = mapped()
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"x")

def sent():
    source = os.memfd_create("source")
    os.write(source, b"x" * size)
    os.sendfile(descriptor, source, 0, size)

attacks = {
    "write": lambda: os.pwrite(descriptor, b"x", 0),
    "send": sent,
    "map writable": lambda: mapped(BOTH),
    "map, then make writable": lambda: call("mprotect", *at(mapped()), BOTH),
    "map, move and grow, then make writable": moved,
    "write through /proc/self/mem": through_proc,
    "free pages of a map": lambda: call("madvise", *at(mapped()), 9),
    "reopen and write": lambda: os.write(reopened(os.O_RDWR), b"x"),
    "reopen and map writable": lambda: mapped(BOTH, fd=reopened(os.O_RDWR)),
    "reopen to empty it": lambda: reopened(os.O_RDWR | os.O_TRUNC),
    "shrink": lambda: os.ftruncate(descriptor, 1),
    "grow": lambda: os.ftruncate(descriptor, 2 * size),
    "grow by allocating": lambda: fallocate(0, 2 * size),
    "grow by writing": lambda: os.pwrite(descriptor, b"x", size),
    "punch a hole": lambda: fallocate(3, size),
    "add a seal": lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0x08),
}
fates = {}
for name, attack in attacks.items():
    try:
        attack()
        fates[name] = "done"
    except OSError as error:
        fates[name] = errno.errorcode[error.errno]
print(json.dumps(fates))
"""
RESIZING = {
    "reopen to empty it",
    "shrink",
    "grow",
    "grow by allocating",
    "grow by writing",
    "add a seal",
}


def _fates(memory):
    done = subprocess.run(
        [sys.executable, "-c", ATTACKS, str(memory.descriptor), str(memory.size)],
        pass_fds=[memory.descriptor],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _descriptors():
    return len(os.listdir("/proc/self/fd"))


def _maps(name):
    return Path("/proc/self/maps").read_text().count(name)


def test_whoever_gets_the_writers_memory_can_only_read_it():
    memory = Memory.shared("engram-test", SIZE, SEALS_OF_WRITER)
    memory.bytes()[:] = pattern = np.arange(SIZE).astype(np.uint8)
    fates = _fates(memory)
    assert len(fates) == 16
    assert not [name for name, fate in fates.items() if fate not in ("EPERM", "EACCES", "EIO")]
    assert np.array_equal(memory.bytes(), pattern)
    assert os.fstat(memory.descriptor).st_size == SIZE
    memory.bytes()[0] = 99
    assert os.pread(memory.descriptor, 1, 0) == b"\x63"


def test_whoever_gets_a_readers_memory_can_write_but_not_resize_it():
    memory = Memory.shared("engram-test", SIZE, SEALS_OF_READER)
    fates = _fates(memory)
    assert {name for name, fate in fates.items() if fate == "EPERM"} == RESIZING
    others = {name: fate for name, fate in fates.items() if name not in RESIZING}
    # Linux writes into no shared map by that way, whatever its seals.
    assert others.pop("write through /proc/self/mem") == "EIO"
    assert set(others.values()) == {"done"}
    assert os.fstat(memory.descriptor).st_size == SIZE
    # What a hole takes away comes back as zeros, never as a signal.
    assert int(memory.bytes().sum()) == 0


def test_a_private_map_of_it_changes_nothing():
    memory = Memory.shared("engram-test", SIZE, SEALS_OF_WRITER)
    code = (
        "import mmap, sys; m = mmap.mmap(int(sys.argv[1]), 0, mmap.MAP_PRIVATE, 3); m[0] = 7; "
        "print(m[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(memory.descriptor)],
        pass_fds=[memory.descriptor],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "7"
    assert memory.bytes()[0] == 0


def test_what_is_written_here_is_seen_there_and_arrays_say_whether_they_can_be_written():
    memory = Memory.shared("engram-test", SIZE, SEALS_OF_WRITER)
    other = Memory.received(os.dup(memory.descriptor), SIZE, SEALS_OF_WRITER)
    assert memory.address % mmap.PAGESIZE == 0
    memory.words(3)[2] = 7 << 40
    assert other.words(3).tolist() == [0, 0, 7 << 40]
    assert not other.bytes().flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        other.bytes()[0] = 1
    other.populate()
    assert np.array_equal(other.bytes(), memory.bytes())


def test_a_map_lives_as_long_as_any_array_over_it_and_needs_no_descriptor():
    before = _descriptors()
    memory = Memory.shared("engram-counted", SIZE, SEALS_OF_WRITER)
    assert (_maps("engram-counted"), _descriptors()) == (1, before + 1)
    memory.close_descriptor()
    memory.close_descriptor()
    assert (memory.descriptor, _descriptors()) == (-1, before)
    part = memory.bytes()[8:16].view(np.uint64)
    del memory
    assert (_maps("engram-counted"), int(part[0])) == (1, 0)
    del part
    assert _maps("engram-counted") == 0
    Memory.shared("engram-counted", SIZE, SEALS_OF_WRITER)
    assert (_maps("engram-counted"), _descriptors()) == (0, before)


def test_private_memory_is_a_forks_own():
    script = """
import os
from engram.ram.memory import Memory
memory = Memory.private(5000)
memory.bytes()[0] = 1
child = os.fork()
if not child:
    memory.bytes()[0] = 2
    os._exit(0)
os.waitpid(child, 0)
print(memory.descriptor, memory.size, memory.bytes()[0])
"""
    assert run_python(script).split() == ["-1", "5000", "1"]


@pytest.mark.parametrize("size", [0, -1, 1 << 47, 1 << 70])
def test_private_memory_of_a_size_that_cannot_be(size):
    with pytest.raises(ConfigError, match="of memory cannot be had"):
        Memory.private(size)


@pytest.mark.parametrize(
    ("limit", "value", "hint"),
    [
        ("RLIMIT_NOFILE", 3, "Too many open files.; raise the limit of open files"),
        ("RLIMIT_AS", 1 << 20, "Cannot allocate memory.; give the RAM tier less"),
        ("RLIMIT_FSIZE", 4096, "File too large.; give the RAM tier less"),
    ],
)
def test_shared_memory_that_cannot_be_had_is_named_and_leaves_nothing(limit, value, hint):
    script = """
import os, resource, signal, sys
from engram.errors import ConfigError
from engram.ram.memory import SEALS_OF_WRITER, Memory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
which, before = getattr(resource, sys.argv[1]), len(os.listdir("/proc/self/fd"))
limits = resource.getrlimit(which)
resource.setrlimit(which, (int(sys.argv[2]), limits[1]))
try:
    Memory.shared("engram-test", 1 << 22, SEALS_OF_WRITER)
except ConfigError as error:
    resource.setrlimit(which, limits)
    print(error, len(os.listdir("/proc/self/fd")) - before)
"""
    said = run_python(script, limit, value)
    assert said.startswith("4MiB of memory cannot be had (")
    assert hint.replace(".;", ");") in said
    assert said.endswith(" 0\n")


def _regular(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDWR)


def _on_tmpfs(tmp_path):
    descriptor = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE)
    os.ftruncate(descriptor, SIZE)
    return descriptor


def _memfd(size=SIZE, seals=SEALS_OF_WRITER, flags=0):
    descriptor = os.memfd_create("engram-test", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _huge(tmp_path):
    try:
        return _memfd(2 << 20, SEALS_OF_WRITER, os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages for memory files: {error}")


OFFERS = {
    "a regular file": (_regular, SIZE),
    "a file in shared memory": (_on_tmpfs, SIZE),
    "a directory": (lambda path: os.open(path, os.O_RDONLY), SIZE),
    "a pipe": (lambda path: os.pipe()[0], SIZE),
    "a socket": (lambda path: socket.socket(socket.AF_UNIX).detach(), SIZE),
    "an event": (lambda path: os.eventfd(0), SIZE),
    "too small": (lambda path: _memfd(SIZE - 1), SIZE),
    "too large": (lambda path: _memfd(SIZE + 1), SIZE),
    "no seals": (lambda path: _memfd(seals=0), SIZE),
    "may shrink": (lambda path: _memfd(seals=SEALS_OF_WRITER & ~0x02), SIZE),
    "may grow": (lambda path: _memfd(seals=SEALS_OF_WRITER & ~0x04), SIZE),
    "may be written": (lambda path: _memfd(seals=SEALS_OF_READER), SIZE),
    "may be sealed": (lambda path: _memfd(seals=SEALS_OF_WRITER & ~0x01), SIZE),
    "huge pages": (_huge, 2 << 20),
}


@pytest.mark.parametrize("what", OFFERS)
def test_only_sealed_memory_of_the_right_size_is_taken(what, tmp_path):
    offer, size = OFFERS[what]
    descriptor = offer(tmp_path)
    before = _descriptors()
    with pytest.raises(ServiceError, match="shared memory c"):
        Memory.received(descriptor, size, SEALS_OF_WRITER)
    assert _descriptors() == before - 1


def test_memory_that_cannot_be_written_is_no_readers():
    sealed = _memfd(seals=SEALS_OF_READER | SEAL_WRITE)
    unwritable = os.open(f"/proc/self/fd/{_memfd(seals=SEALS_OF_READER)}", os.O_RDONLY)
    for descriptor in (sealed, unwritable):
        with pytest.raises(ServiceError, match="cannot be mapped"):
            Memory.received(descriptor, SIZE, SEALS_OF_READER, writable=True)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(descriptor)
