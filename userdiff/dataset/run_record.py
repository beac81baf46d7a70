"""`run.json`: what decided the pixels, what they were computed with, how each run went; and the folder's lock."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from userdiff.identity import differences, identity_hash

RECORD_NAME = "run.json"
LOCK_NAME = ".userdiff.lock"
WRITERS_NAME = ".userdiff.writers"
WRITERS_SECONDS = 15.0  # for those of a job that was just killed to go
LOCK_SECONDS = 1.0  # whoever just looks whether a folder is held has it for an instant
NUMERICS_DEFAULTS = {"png_compress_level": 6}
"""What records say that do not say it."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@dataclass(kw_only=True)
class RunRecord:
    """The content of `run.json`."""

    identity: dict[str, Any]
    """What decides the pixels. Options at their default are left out, so a new option changes no hash."""
    numerics: dict[str, Any]
    """What may change their last bits: batch size, device, threads, library versions."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry a run, oldest first: when, by how many processes, what was asked for, how it ended."""
    manifest_sha256: str | None = None
    """Of the manifest as it was last published: one with another hash was damaged or edited since."""

    @property
    def run(self) -> str:
        """The identity hash: what every PNG carries as `userdiff_run`."""
        return identity_hash(self.identity)

    def to_bytes(self) -> bytes:
        """Give the file's content."""
        return (json.dumps({"run": self.run, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def read(cls, output_dir: Path) -> "RunRecord | None":
        """Read a folder's record; None where there is none, ValueError where it is damaged."""
        path = output_dir / RECORD_NAME
        try:
            content = json.loads(path.read_bytes())
            record = cls(**{key: content[key] for key in ("identity", "numerics", "history")})
            record.manifest_sha256 = content.get("manifest_sha256")
            kinds = [type(value) for value in (record.identity, record.numerics, record.history)]
            if kinds != [dict, dict, list] or not isinstance(record.numerics["batch_size"], int):
                raise TypeError(kinds)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged; restore it, or remove it (the images say themselves what they are), or start again "
                "with --overwrite"
            ) from error
        if content.get("run") != record.run:
            raise ValueError(
                f"{path} was edited, its identity no longer has the hash that the images carry; restore it, or start "
                "again with --overwrite"
            )
        return record


def changed_numerics(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Find the numerics in which two runs differ, as (name, old value, new value).

    What one of them does not note, since its device has no such thing or an earlier version did not ask, is no
    difference.
    """
    for name, before, after in differences({**NUMERICS_DEFAULTS, **old}, {**NUMERICS_DEFAULTS, **new}):
        if before is not None and after is not None:
            yield name, before, after


def now() -> str:
    """Give the time as the history notes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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
    """Hold a folder for one job; raises ValueError naming the holder where another job has it, or if none can hold it.

    A lock of the operating system: a killed job leaves none behind.
    """
    path = output_dir / LOCK_NAME
    lock, was_there = FileLock(path, timeout=LOCK_SECONDS, fallback_to_soft=False), path.exists()
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{output_dir} is in use by another job ({_holder(path)})") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not was_there:  # else it may be held, by a machine that mounts the folder with locks
            path.unlink(missing_ok=True)
        raise ValueError(
            f"the file system of {output_dir} keeps no locks ({error.strerror}), and only they keep a second job out; use "
            "a folder on another one, or have it mounted with locks (Lustre: -o flock)"
        ) from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        path.unlink(missing_ok=True)  # while held: whoever opened it meanwhile finds it gone and opens anew
        lock.release()


def lock_holder(output_dir: Path) -> str | None:
    """Who holds a folder now; None where nobody does, whatever a killed job left lying there. Needs to read, no more."""
    path = output_dir / LOCK_NAME
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(path)
    except OSError:
        return None
    return None


@contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Be known, to `wait_for_writers` on any machine, as a process that may write images."""
    with open(output_dir / WRITERS_NAME, "a+") as file:  # NFSv4 gives a shared lock only to who can read
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def wait_for_writers(output_dir: Path, seconds: float | None = None) -> None:
    """Wait until no process of an earlier job may write any more; raises ValueError if one still may.

    A process that was suspended, or cut off with its machine, outlives its job and the lock that its main process had.
    """
    path = output_dir / WRITERS_NAME
    deadline = time.monotonic() + (WRITERS_SECONDS if seconds is None else seconds)
    with open(path, "a") as file:
        while not _is_free(file):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"a process of an earlier job still has {output_dir} open for writing, maybe on another machine; end "
                    "it first, or use another folder"
                )
            time.sleep(0.1)
        path.unlink()  # nobody has it; whoever writes next makes a new one


def _is_free(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "unknown"
    except OSError:
        return "unknown"
