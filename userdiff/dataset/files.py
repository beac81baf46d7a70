"""Opening the files of a dataset's folder: regular ones alone, never waited for, and no larger than makes sense.

A FIFO would be waited for without end, a device may never end, and a sparse file of a terabyte takes no room on a disk.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path) -> BinaryIO:
    """Open a regular file, or the one that a link leads to, for reading; raises OSError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK, a FIFO would block
    try:
        check_regular(descriptor, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of `max_bytes` at most; raises OSError for a larger one, and for anything else."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, more than a job writes", str(path))
        return file.read(max_bytes)


def check_regular(descriptor: int, path: Path) -> None:
    """Raise OSError, naming the path, if what was opened is a folder, a FIFO, a device or the like."""
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(kind):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.ENOTSUP, "not a regular file, move it away", str(path))
