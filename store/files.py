"""Reading files that somebody else may have put there: regular ones only.

A pipe under a file's name would keep whoever opens it waiting for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular(path: Path) -> int:
    """Open a file read-only and return its descriptor, which the caller closes.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:  # NUL or a lone surrogate.
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def read_regular(path: Path) -> bytes:
    """All bytes of a file; errors as in `open_regular`."""
    with open(open_regular(path), "rb") as stream:
        return stream.read()
