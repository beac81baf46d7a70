"""Locks that keep a dataset's folder to one job at a time, and keep the writers of an earlier job out.

Both locks belong to the operating system (`flock`), so a killed process leaves none behind.
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

LOCK_SECONDS = 1.0  # a process that only checks whether a folder is held has its lock for an instant
WRITERS_SECONDS = 15.0  # time for the writers of a job that was just killed to exit
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
    """Lock a folder for one job; raises ValueError if another job has it, or if the file system has no locks."""
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
    """Return which process holds a folder now, or None. Only needs permission to read the lock's file."""
    path = output_dir / LOCK_NAME
    try:
        with open(path) as file:
            return None if _is_locked(file, fcntl.LOCK_SH) else _holder(path)
    except OSError:
        return None


@contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Hold a shared lock while this process may write images; `wait_for_writers` on any machine waits for it."""
    with open(output_dir / WRITERS_NAME, "a+") as file:  # NFSv4 grants a shared lock only on a file open for reading
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def wait_for_writers(
    output_dir: Path, seconds: float | None = None, on_poll: Callable[[], None] = lambda: None
) -> None:
    """Wait until no process of an earlier job can write any more; raises ValueError if one still can.

    A process that was suspended, or cut off with its machine, outlives its job and the lock that its main process had.
    seconds: by default WRITERS_SECONDS. on_poll: is called between attempts, and what it raises ends the wait.
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
    """Open a file and lock it exclusively; returns None if others still hold it after `seconds`."""
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
    """Try to lock a file without waiting; returns whether that succeeded."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(file: TextIO, path: Path) -> bool:
    """Return whether an open file still has its name: the process that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "unknown"
    except OSError:
        return "unknown"
