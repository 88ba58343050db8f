"""The place where a table will stand, and the private directory in which it is made.

Everything is written into `.NAME.importing` beside the destination and becomes visible by one
rename. The directory's own lock keeps two imports apart; it is kept after a kill, so that the
next import can go on, and removed after an error.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram.errors import DestinationError

NETWORK_FILE_SYSTEMS = re.compile(
    r"9p|afs|beegfs|ceph|cifs|coda|glusterfs|gpfs|lustre|ncpfs|nfs4?|orangefs|pvfs2|smb3|smbfs|"
    r"fuse\.(ceph|gcsfuse|glusterfs|juicefs|rclone|s3fs|sshfs)"
)
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def private_path(destination: Path) -> Path:
    """The directory in which the table of `destination` is made."""
    return destination.with_name(f".{destination.name}.importing")


def check_destination(destination: Path, needed_bytes: int) -> None:
    """Refuse a destination that cannot take a table, before anything is written.

    Raises:
        DestinationError: it exists, its parent is no writable directory, lies on a network file
            system or has less space than needed; both numbers are named.
    """
    if os.path.lexists(destination):
        raise DestinationError(f"{destination} exists; remove it or choose another destination")
    parent = destination.parent
    # Unlike Path.is_dir this is False, too, where a name is too long.
    if not os.path.isdir(parent):
        raise DestinationError(f"{parent} is not a directory; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DestinationError(f"{parent} cannot be written to by uid {os.geteuid()}")
    kind = file_system_of(parent)
    if NETWORK_FILE_SYSTEMS.fullmatch(kind):
        raise DestinationError(
            f"{parent} lies on a network file system ({kind}); tables need a local disk"
        )
    free_bytes = free_space(parent) + _allocated(private_path(destination))
    if free_bytes < needed_bytes:
        raise DestinationError(
            f"{parent} has {free_bytes} bytes free, the table needs {needed_bytes}; "
            "free some space or choose another destination"
        )


def free_space(directory: Path) -> int:
    """Bytes that an unprivileged process may still write there."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _allocated(directory: Path) -> int:
    try:
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise DestinationError(
            f"{directory}, in which the table would be made, cannot be used: {error.strerror}; "
            "choose another destination"
        ) from None


def file_system_of(path: Path, mounts: str | None = None) -> str:
    """Type of the file system that holds `path`, by the longest mount point above it.

    Args:
        mounts: text in the form of `/proc/self/mountinfo`, which is read when left out.
    """
    text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    target = path.resolve()
    longest, kind = -1, ""
    for line in text.splitlines():
        fields = line.split()
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        # Of two mounts on one point the later line is the one on top.
        if len(point.parts) >= longest and target.is_relative_to(point):
            longest, kind = len(point.parts), fields[fields.index("-") + 1]
    return kind


@contextmanager
def private_directory(destination: Path) -> Iterator[Path]:
    """Create or take over the private directory and hold its lock.

    After an `Exception` it is removed with all it holds; after an interrupt it stays, so that the
    import can be resumed.

    Raises:
        DestinationError: another import into this destination is running.
    """
    directory = private_path(destination)
    descriptor = _lock(directory, destination)
    try:
        yield directory
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _lock(directory: Path, destination: Path) -> int:
    while True:
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(
                directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DestinationError(
                f"{directory} cannot be created: {error.strerror}; remove what stands there"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DestinationError(
                f"another import into {destination} is running; wait for it or stop it"
            ) from None
        # Between open and lock its owner may have renamed or removed it: then it is not the one.
        if _same_file(descriptor, directory):
            _require_ours(descriptor, directory)
            return descriptor
        os.close(descriptor)


def _require_ours(descriptor: int, directory: Path) -> None:
    """In a shared directory someone else may have made one of that name, to read or change it."""
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        os.close(descriptor)
        raise DestinationError(f"{directory} belongs to uid {owner}; have it removed first")
    os.fchmod(descriptor, 0o700)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def sync_path(path: Path) -> None:
    """Wait until a file or directory is on the device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(directory: Path, destination: Path) -> None:
    """Give the finished directory its name: at once, whole, and never over something else.

    Raises:
        DestinationError: the destination came into being meanwhile.
    """
    for entry in sorted(directory.iterdir()):
        sync_path(entry)
    sync_path(directory)
    _rename_new(directory, destination)
    sync_path(destination.parent)


def _rename_new(source: Path, target: Path) -> None:
    """rename(2) that fails where `target` exists."""
    renameat2 = getattr(_libc, "renameat2", None)
    code = errno.ENOSYS
    if renameat2 is not None:
        ctypes.set_errno(0)
        failed = renameat2(
            _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
        )
        code = ctypes.get_errno() if failed else 0
    if code in (errno.ENOSYS, errno.EINVAL):
        # Not known here. A plain rename replaces at most an empty directory.
        code = errno.EEXIST if os.path.lexists(target) else 0
        if not code:
            source.rename(target)
    if code:
        raise DestinationError(
            f"the table cannot be renamed to {target}: {os.strerror(code)}; "
            "choose another destination"
        )
