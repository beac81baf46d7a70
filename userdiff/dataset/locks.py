"""Locks that keep a dataset's folder to one job at a time, and keep the writers of an earlier job out.

Both locks belong to the operating system (`flock`), so a killed process leaves none behind, but a file without a lock.
"""

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from userdiff.dataset.files import check_regular, open_file
from userdiff.dataset.layout import LOCK_NAME, WRITERS_NAME

LOCK_SECONDS = 1.0  # a process that only checks whether a folder is held has its lock for an instant
WRITERS_SECONDS = 15.0  # time for the writers of a job that was just killed to exit
_POLL_SECONDS = 0.05
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_HOLDER = b"process "
_HOLDER_BYTES = 300


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
    was_there = os.path.lexists(path)
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
        file.write(f"{_HOLDER.decode()}{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # some file systems remove no open file; a file without a lock bars nobody
                path.unlink()  # while held: whoever opened it meanwhile finds it gone, and opens it anew


def lock_holder(output_dir: Path) -> str | None:
    """Return which process holds a folder now, or None. Only needs permission to read the lock's file."""
    path = output_dir / LOCK_NAME
    try:
        if not is_lock(path):
            return None
        with open_file(path) as file:
            return None if _is_locked(file, fcntl.LOCK_SH) else _holder(path)
    except OSError:
        return None


@contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Hold a shared lock while this process may write images; `wait_for_writers` on any machine waits for it.

    Whoever is the last to have it removes its file: one that was suspended may outlive the job.
    """
    path = output_dir / WRITERS_NAME
    while True:
        file = _open(path)
        fcntl.flock(file, fcntl.LOCK_SH)  # NFSv4 grants it only on a file open for reading
        if _is_still(file, path):
            break
        file.close()
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                if _is_locked(file, fcntl.LOCK_EX) and _is_still(file, path):
                    path.unlink()


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
    with file, suppress(OSError):
        path.unlink()  # while nobody has it; whoever writes next makes a new one


def is_lock(path: Path) -> bool:
    """Return whether a file is one that a job locks: no link, with no other name, and with nothing but the job's in it."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return False
    with suppress(PermissionError), open_file(path) as file:
        content = file.read(_HOLDER_BYTES + 1)
        return not content or (content.startswith(_HOLDER) and len(content) <= _HOLDER_BYTES)
    return True  # another user's


def _open(path: Path) -> IO[Any]:
    """Open a lock's file, which is made where there is none; raises ValueError for what no job has made.

    One that another user's job has left, and that cannot be written to, is open for reading alone.
    """
    with suppress(FileNotFoundError):
        if not is_lock(path):
            raise ValueError(f"{path} is no lock of a job's; move it away")
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor, mode = os.open(path, flags | os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o666), "a+"
    except PermissionError as error:
        if not path.exists():
            raise  # it is the folder that cannot be written to
        try:
            descriptor, mode = os.open(path, flags | os.O_RDONLY), "r"
        except PermissionError:
            raise error from None
    try:
        check_regular(descriptor, path)
        return open(path, mode, opener=lambda *_: descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _acquire(path: Path, seconds: float, on_poll: Callable[[], None] = lambda: None) -> IO[Any] | None:
    """Open a file and lock it exclusively; returns None if others still hold it after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            file = _open(path)
            try:
                is_ours = _is_locked(file, fcntl.LOCK_EX) and _is_still(file, path)
                if is_ours and file.writable():
                    return file
                if is_ours:  # now; another user's job left it. The next one is made anew
                    path.unlink()
            except BaseException:
                file.close()
                raise
        except PermissionError as error:
            if os.path.lexists(path) and os.access(path.parent, os.W_OK):
                raise ValueError(
                    f"{path} is another user's ({error.strerror}); remove it if no job of theirs runs"
                ) from error
            raise
        file.close()
        if is_ours:
            continue
        if time.monotonic() > deadline:
            return None
        on_poll()
        time.sleep(_POLL_SECONDS)


def _is_locked(file: IO[Any], kind: int) -> bool:
    """Try to lock a file without waiting; returns whether that succeeded."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(file: IO[Any], path: Path) -> bool:
    """Return whether an open file still has its name: the process that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        with open_file(path) as file:
            return file.read(_HOLDER_BYTES).decode(errors="replace") or "unknown"
    except OSError:
        return "unknown"
