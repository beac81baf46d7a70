import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.definitions import files_in
from tests.jobs import ROOT
from userdiff.dataset import locks
from userdiff.dataset.layout import LOCK_NAME, WRITERS_NAME
from userdiff.dataset.locks import folder_lock, lock_holder, made_folder, wait_for_writers, writing

HOLDER = """
import sys
from pathlib import Path
from userdiff.dataset.locks import folder_lock

with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)


@contextmanager
def held_by_another_process(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def assert_refused(folder, what):
    with pytest.raises(ValueError, match=what), folder_lock(folder):
        pass


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_second_job_is_refused_by_the_name_of_the_first_until_that_has_gone(tmp_path, is_killed):
    with held_by_another_process(tmp_path) as holder:
        who = f"process {holder.pid} on {socket.gethostname()}"
        for _ in range(2):  # a refusal does not wipe out who the holder is
            assert_refused(tmp_path, rf"in use .*\({who}\)")
            assert lock_holder(tmp_path) == who
        if is_killed:
            holder.kill()
        holder.communicate("" if is_killed else "go on\n")
        assert (tmp_path / LOCK_NAME).exists() == is_killed
        assert lock_holder(tmp_path) is None
        with folder_lock(tmp_path):
            assert_refused(tmp_path, rf"\(process {os.getpid()} on")  # and of no holder before
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_gives_the_folder_back_and_only_its_own(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(KeyError), folder_lock(tmp_path), folder_lock(other):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with folder_lock(tmp_path):
        pass


def test_a_lock_whose_file_was_removed_by_its_holder_is_taken_on_the_new_file(tmp_path, monkeypatch):
    """A holder removes the file just before it gives the lock back: who waited has locked a file without a name."""
    flock = fcntl.flock
    path = tmp_path / LOCK_NAME
    removed = []

    def flock_after_removal(file, operation):
        if not removed:
            removed.append(path.unlink())
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with folder_lock(tmp_path):
        assert path.exists()
        assert_refused(tmp_path, "in use")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_what_helps(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert_refused(tmp_path, f"keeps no locks.*{os.strerror(number)}.*a folder on another one")
    assert list(tmp_path.iterdir()) == []
    held = tmp_path / LOCK_NAME  # by a machine that has locks there
    held.touch()
    assert_refused(tmp_path, "keeps no locks")
    assert held.exists()


def test_locks_work_as_on_nfs(tmp_path, monkeypatch):
    """NFSv4 gives a shared lock only to who can read the file, an exclusive one only to who can write it."""
    flock = fcntl.flock

    def flock_of_nfs(file, operation):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        refused = {os.O_WRONLY: fcntl.LOCK_SH, os.O_RDONLY: fcntl.LOCK_EX}.get(mode, 0)
        if operation & refused:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    with folder_lock(tmp_path), writing(tmp_path):
        assert lock_holder(tmp_path)
    wait_for_writers(tmp_path, seconds=0)
    assert list(tmp_path.iterdir()) == []


# Processes that may still write


def test_a_process_that_may_still_write_is_waited_for_and_then_refused(tmp_path):
    with writing(tmp_path), writing(tmp_path), pytest.raises(ValueError, match="a process of an earlier job still has"):
        wait_for_writers(tmp_path, seconds=0.1)
    wait_for_writers(tmp_path, seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_goes_is_waited_for(tmp_path):
    held, gone = threading.Event(), threading.Event()

    def write():
        with writing(tmp_path):
            held.set()
            gone.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    assert held.wait(60)
    wait_for_writers(tmp_path, seconds=60, on_poll=gone.set)
    assert gone.is_set()
    writer.join(60)


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with made_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with made_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


# Locks that are none


def to_somebodys_file(make):
    def prepare(path):
        (path.parent / "thesis.txt").write_text("my only copy")
        make(path, path.parent / "thesis.txt")

    return prepare


NO_LOCKS = {
    "hard link": to_somebodys_file(lambda path, other: path.hardlink_to(other)),
    "link": to_somebodys_file(lambda path, other: path.symlink_to(other)),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("prepare", NO_LOCKS.values(), ids=NO_LOCKS)
@pytest.mark.parametrize("name", [LOCK_NAME, WRITERS_NAME])
def test_what_is_no_lock_is_not_written_to(tmp_path, prepare, name):
    prepare(tmp_path / name)
    before = files_in(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    for hold in (folder_lock, lambda path: nullcontext(wait_for_writers(path)), writing):
        if (hold is folder_lock) == (name == LOCK_NAME):
            with pytest.raises(ValueError, match=f"{name} is no lock of a job's"), hold(tmp_path):
                pass
    assert lock_holder(tmp_path) is None
    assert (files_in(tmp_path), sorted(path.name for path in tmp_path.iterdir())) == before


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from userdiff.dataset import locks

os.setgid(65534), os.setuid(65534)
folder = Path(sys.argv[1])
try:
    with locks.folder_lock(folder):
        locks.wait_for_writers(folder, seconds=0)
        with locks.writing(folder):
            print("held", (folder / ".userdiff.lock").read_text().startswith("process"))
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize(
    ("folder_mode", "mode", "is_held", "said"),
    [
        (0o777, 0o644, False, "held True"),
        (0o777, 0o644, True, "is in use by another job (process 7"),
        (0o777, 0o600, False, "another user's (Permission denied); remove it"),
        (0o1777, 0o644, False, "another user's (Operation not permitted); remove it"),
        (0o755, 0o644, False, "PermissionError"),
    ],
)
def test_a_lock_that_another_users_job_left_bars_nobody_for_ever(folder_mode, mode, is_held, said):
    with tempfile.TemporaryDirectory() as above:  # pytest's folders are closed to others
        Path(above).chmod(0o755)
        folder = Path(above) / "out"
        folder.mkdir()
        folder.chmod(folder_mode)
        for name in (LOCK_NAME, WRITERS_NAME):
            (folder / name).write_text("process 7")
            (folder / name).chmod(mode)
        with open(folder / LOCK_NAME) as lock:
            if is_held:
                fcntl.flock(lock, fcntl.LOCK_EX)
            command = [sys.executable, "-c", AS_ANOTHER_USER, str(folder)]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert said in done.stdout


def test_the_last_writer_leaves_no_file_behind(tmp_path):
    with writing(tmp_path):
        with writing(tmp_path):
            assert (tmp_path / WRITERS_NAME).exists()
        assert (tmp_path / WRITERS_NAME).exists()
        with pytest.raises(ValueError, match="a process of an earlier job"):
            wait_for_writers(tmp_path, seconds=0)
    assert not (tmp_path / WRITERS_NAME).exists()


def test_a_writer_whose_file_is_removed_while_it_waits_for_it_takes_the_new_one(tmp_path, monkeypatch):
    """Else the next job would not see it."""
    flock, removed = fcntl.flock, []

    def remove_and_lock(file, kind):
        if not removed:
            removed.append((tmp_path / WRITERS_NAME).unlink())
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with writing(tmp_path), pytest.raises(ValueError, match="a process of an earlier job"):
        wait_for_writers(tmp_path, seconds=0)
