"""Who may write to a dataset's folder: one job at a time, and no process of a job before it.

Both locks are the operating system's (`flock`), so that a killed process leaves none behind.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from userdiff.dataset.layout import LOCK_NAME, WRITERS_NAME

LOCK_SECONDS = 1.0  # whoever only looks whether a folder is held has its lock for an instant
WRITERS_SECONDS = 15.0  # for the writers of a job that was just killed to go
_POLL_SECONDS = 0.05
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make a folder where there is none, and remove it at the end if it is still empty."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def folder_lock(output_dir: Path) -> Iterator[None]:
    """Hold a folder for one job; raises ValueError, naming the holder, where another job has it.

    Raises ValueError too where the file system keeps no locks.
    """
    path = output_dir / LOCK_NAME
    was_there = path.exists()
    try:
        file = _acquire(path, LOCK_SECONDS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not was_there:  # else it may be held, by a machine that mounts the folder with locks
            path.unlink(missing_ok=True)
        raise ValueError(
            f"the file system of {output_dir} keeps no locks ({error.strerror}), and only they keep a second job out; use "
            "a folder on another one, or have it mounted with locks (Lustre: -o flock)"
        ) from error
    if file is None:
        raise ValueError(f"{output_dir} is in use by another job ({_holder(path)})")
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while held: whoever opened it meanwhile finds it gone, and opens it anew


def lock_holder(output_dir: Path) -> str | None:
    """Return who holds a folder now; None where nobody does. Needs to read the lock's file, no more."""
    path = output_dir / LOCK_NAME
    try:
        with open(path) as file:
            return None if _is_locked(file, fcntl.LOCK_SH) else _holder(path)
    except OSError:
        return None


@contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Be known to `wait_for_writers`, on any machine, as a process that may write images."""
    with open(output_dir / WRITERS_NAME, "a+") as file:  # NFSv4 gives a shared lock only to who can read
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def wait_for_writers(
    output_dir: Path, seconds: float | None = None, on_poll: Callable[[], None] = lambda: None
) -> None:
    """Wait until no process of an earlier job may write any more; raises ValueError if one still may.

    A process that was suspended, or cut off with its machine, outlives its job and the lock that its main process had.
    `seconds` is WRITERS_SECONDS where it is not given; `on_poll` is called in between, and what it raises ends the wait.
    """
    path = output_dir / WRITERS_NAME
    file = _acquire(path, WRITERS_SECONDS if seconds is None else seconds, on_poll)
    if file is None:
        raise ValueError(
            f"a process of an earlier job still has {output_dir} open for writing, maybe on another machine; end it first, "
            "or use another folder"
        )
    with file:
        path.unlink()  # while nobody has it; whoever writes next makes a new one


def _acquire(path: Path, seconds: float, on_poll: Callable[[], None] = lambda: None) -> TextIO | None:
    """Open a file and lock it exclusively; None where others hold it for so long."""
    deadline = time.monotonic() + seconds
    while True:
        file = open(path, "a+")  # noqa: SIM115 - the caller's, if it is locked
        try:
            if _is_locked(file, fcntl.LOCK_EX) and _is_still(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        if time.monotonic() > deadline:
            return None
        on_poll()
        time.sleep(_POLL_SECONDS)


def _is_locked(file: TextIO, kind: int) -> bool:
    """Try to lock a file; returns whether that was possible."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(file: TextIO, path: Path) -> bool:
    """Return whether an open file still has its name: whoever held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "unknown"
    except OSError:
        return "unknown"
