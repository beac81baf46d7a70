"""How a process learns that it is to end, and that it does so in time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.jobs import ROOT
from userdiff.shutdown import GRACE_SECONDS, Failed, Shutdown, Stopped


@pytest.fixture(autouse=True)
def terminal():
    """The tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_everything_is_put_back(number):
    before, files = signal.getsignal(number), len(list(Path("/proc/self/fd").iterdir()))
    with Shutdown().listen() as shutdown:
        shutdown.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as raised:
            shutdown.check()
        assert raised.value.exit_status == 128 + number
        assert 0 < shutdown.seconds_left() <= GRACE_SECONDS
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert not [thread for thread in threading.enumerate() if thread.name == "shutdown"]


def test_the_first_reason_counts_whoever_brings_it():
    with Shutdown().listen() as shutdown:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=shutdown.set, args=(Failed("too late"),)).start()
        assert str(shutdown.reason) == "stopped by SIGINT"
        seen = []
        with pytest.raises(Stopped):
            seen.extend(shutdown.checked(["a file"]))
        assert seen == []


def test_a_reason_that_comes_late_kills_nobody(monkeypatch):
    monkeypatch.setattr("userdiff.shutdown.GRACE_SECONDS", 0.0)
    with Shutdown().listen() as shutdown:
        pass
    shutdown.set(Failed("too late"))
    time.sleep(0.2)


def test_an_orphan_counts_as_told_to_terminate(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Shutdown().listen() as shutdown:
        shutdown.check()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        deadline = time.monotonic() + 20
        while shutdown.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (shutdown.reason.exit_status, shutdown.reason.is_alone) == (143, True)


def test_a_shell_that_ends_takes_no_job_with_it_whatever_a_launch_left_in_the_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with Shutdown().listen() as shutdown:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        time.sleep(0.6)  # two looks
        shutdown.check()


PARENT = """
import subprocess, sys
child = "import os, sys; sys.path[:0] = [os.getcwd()]; from userdiff.shutdown import Shutdown; print(Shutdown()._has_launcher)"
sys.exit(subprocess.call([sys.executable, "-c", child]))
"""


@pytest.mark.parametrize(
    ("name", "more", "is_launcher"),
    [
        ("accelerate", ["launch"], True),
        ("accelerate-launch", [], True),
        ("accelerate/commands/launch.py", [], True),
        ("scheduler.py", ["--note", "accelerate launch"], False),
        ("accelerated.py", [], False),
    ],
)
def test_accelerate_is_known_by_its_command_line(name, more, is_launcher, tmp_path):
    """Of a single process it says nothing in the environment."""
    script = tmp_path / name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, script, *more], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout == f"{is_launcher}\n"


def test_a_hangup_that_is_ignored_stays_so():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Shutdown().listen() as shutdown:
            os.kill(os.getpid(), signal.SIGHUP)
            shutdown.check()
    finally:
        signal.signal(signal.SIGHUP, before)


# What hears no signal

DEAF = """
import ctypes, sys
from userdiff import shutdown
shutdown.GRACE_SECONDS = 0.5
it = shutdown.Shutdown()
with it.listen(), it.last_words(lambda reason: print("last", reason)), it.last_words(lambda reason: print("first", reason)):
    print("listening", flush=True)
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)  # without end, and Python's handlers never run
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_wait_inside_a_library_ends_with_the_grace_and_last_words_are_said(number):
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        time.sleep(0.5)  # until it waits
        process.send_signal(number)
        try:
            stdout, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    name = signal.Signals(number).name
    assert (process.returncode, stdout) == (128 + number, f"first stopped by {name}\nlast stopped by {name}\n")


SILENCED = """
import os, signal, threading
from userdiff import shutdown
shutdown.GRACE_SECONDS, shutdown.LAST_SECONDS = 0.3, 0.5
it = shutdown.Shutdown()
wait_for_ever = threading.Event().wait
with it.listen(), it.last_words(lambda reason: print("the last one")), it.last_words(lambda reason: wait_for_ever()):
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for_ever()
"""


def test_last_words_that_a_disk_keeps_back_hold_up_neither_the_end_nor_the_others():
    done = subprocess.run([sys.executable, "-c", SILENCED], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (143, "the last one\n")


ORDERLY = """
import os, signal, time
from userdiff import shutdown
shutdown.GRACE_SECONDS = 0.3
it = shutdown.Shutdown()
try:
    with it.listen(), it.last_words(lambda reason: print("torn")):
        os.kill(os.getpid(), signal.SIGTERM)
        it.check()
finally:
    time.sleep(0.6)  # once it is over, nothing ends the process any more
    print("in order")
"""


def test_an_orderly_end_is_not_torn():
    done = subprocess.run([sys.executable, "-c", ORDERLY], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, "in order\n")
    assert "Stopped: stopped by SIGTERM" in done.stderr


LOADING = """
import os, signal, sys, threading
threading.Timer(float(sys.argv.pop(1)), os.kill, (os.getpid(), signal.SIGTERM)).start()
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@pytest.mark.parametrize("seconds", ["0.3", "2"], ids=["torch is imported", "a little later"])
def test_a_signal_while_a_job_starts_is_one_line(seconds, tmp_path):
    command = [sys.executable, "-c", LOADING, seconds, "--output_dir", tmp_path / "out", "--num_images_per_user", "900"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 143
    last = done.stderr.splitlines()[-1]
    assert last.startswith("batch_generate.py: stopped by SIGTERM; ")
    assert last.endswith("the same command goes on from there")
    assert "Traceback" not in done.stderr
