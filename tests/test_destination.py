"""Destinations that are refused, before and after the work, with nothing changed."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
from pathlib import Path

import pytest
from array_source import BF16, SCHEMA, array_source
from python_process import run_python
from table_files import rows_of

from engram.errors import DestinationError
from engram.store import destination as place
from engram.store.manifest import Schema
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table


@pytest.mark.parametrize("what", ["directory", "file", "dangling link"])
def test_destination_that_exists(tmp_path, what):
    path = tmp_path / "table"
    {
        "directory": path.mkdir,
        "file": path.touch,
        "dangling link": lambda: path.symlink_to("nowhere"),
    }[what]()
    with pytest.raises(DestinationError, match="exists; remove it"):
        build_table(path, SCHEMA, array_source())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_destination_without_parent(tmp_path):
    with pytest.raises(DestinationError, match="is not a directory; create it"):
        build_table(tmp_path / "no" / "table", SCHEMA, array_source())


@pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "n" * 300 + "/table"])
def test_names_that_are_too_long(tmp_path, name):
    with pytest.raises(DestinationError, match=r"too long|is not a directory") as caught:
        build_table(tmp_path / name, SCHEMA, array_source())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_too_little_space_names_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "free_space", lambda directory: 1234)
    with pytest.raises(DestinationError, match=r"has 1234 bytes free, the table needs \d{6,};"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


MOUNTS = r"""
22 27 0:21 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /mnt rw shared:1 master:2 - xfs /dev/vdb rw
31 30 0:31 / /mnt/far\040away rw - nfs4 server:/x rw
32 22 0:32 / /mnt/over rw - ext4 /dev/vdc rw
33 22 0:33 / /mnt/over rw - fuse.sshfs host: rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/mnt", "xfs"),
        ("/mnt/far away/tables", "nfs4"),
        ("/mnt/farther", "xfs"),
        ("/mnt/over/y", "fuse.sshfs"),
    ],
)
def test_file_system_of_a_path(path, kind):
    assert place.file_system_of(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "ceph"])
def test_network_file_systems_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(place, "file_system_of", lambda path: kind)
    with pytest.raises(DestinationError, match=f"network file system \\({kind}\\)"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list(tmp_path.iterdir())


def test_second_import_into_the_same_destination(tmp_path):
    private = place.private_path(tmp_path / "table")
    private.mkdir()
    (private / "data.mdb").write_bytes(b"of the other import")
    descriptor = os.open(private, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DestinationError, match=r"another import into .* is running"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert (private / "data.mdb").read_bytes() == b"of the other import"
    os.close(descriptor)
    build_table(tmp_path / "table", SCHEMA, array_source())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_private_directory_of_someone_else(tmp_path, monkeypatch):
    private = place.private_path(tmp_path / "table")
    private.mkdir(mode=0o777)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(DestinationError, match=f"belongs to uid {real}"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    monkeypatch.undo()
    build_table(tmp_path / "table", SCHEMA, array_source())
    assert stat.S_IMODE((tmp_path / "table").stat().st_mode) == 0o700


def test_link_in_place_of_the_private_directory(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    place.private_path(tmp_path / "table").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DestinationError, match="remove what stands there"):
        build_table(tmp_path / "table", SCHEMA, array_source())
    assert not list((tmp_path / "elsewhere").iterdir())


def test_destination_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "table"

    def appear(done, total):
        if done == total:
            path.mkdir()

    with pytest.raises(DestinationError, match=r"cannot be renamed .* File exists"):
        build_table(path, SCHEMA, array_source(), progress=appear)
    assert not list(path.iterdir())
    assert [entry.name for entry in tmp_path.iterdir()] == ["table"]


def test_rename_without_help_of_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "_libc", object())
    build_table(tmp_path / "table", SCHEMA, array_source())
    (tmp_path / "other").mkdir()
    with pytest.raises(DestinationError, match="File exists"):
        place._rename_new(tmp_path / "table", tmp_path / "other")
    assert rows_of(tmp_path / "table").keys() == {1, 4}


LIMITED = """
import resource, signal, sys
from pathlib import Path
from engram.errors import DestinationError
from engram.rows import RowFormat
from engram.store.manifest import Schema
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

schema = Schema("{}", RowFormat("bf16", 32), ((1, 200000),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
try:
    build_table(Path(sys.argv[1]), schema, SyntheticSource(schema))
except DestinationError as error:
    print(error)
"""


def test_file_that_cannot_grow(tmp_path):
    """A limit on file size fails in the middle of a write, as a full disk does."""
    said = run_python(LIMITED, tmp_path / "table")
    assert "failed" in said
    assert "thrown away" in said
    assert "bytes free there" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB; needs the right to mount."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_disk_that_fills_up_meanwhile(small_disk):
    """The preflight passes; then someone else takes the space."""
    schema = Schema("{}", BF16, ((1, 200_000),))

    def fill(done, total):
        path = small_disk / "someone-elses"
        if not path.exists():
            path.write_bytes(bytes(14 << 20))

    with pytest.raises(DestinationError, match=r"failed .* with \d+ bytes free there"):
        build_table(
            small_disk / "table", schema, SyntheticSource(schema), extent_blocks=64, progress=fill
        )
    assert [entry.name for entry in small_disk.iterdir()] == ["someone-elses"]
    with pytest.raises(DestinationError, match="bytes free, the table needs"):
        build_table(small_disk / "table", schema, SyntheticSource(schema))
    (small_disk / "someone-elses").unlink()
    build_table(small_disk / "table", schema, SyntheticSource(schema), extent_blocks=64)
