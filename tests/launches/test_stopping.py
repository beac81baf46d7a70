"""Nothing hangs: signals, machines that are gone, launchers that no longer answer."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from tests.checkpoints import model_flags
from tests.definitions import files_in
from tests.jobs import (
    finish,
    images_in,
    last_run,
    launch,
    play_processes,
    run_job,
    start,
    start_machines,
    wait_for,
)
from tests.processes import Job, our_tracebacks, send, still_alive
from userdiff.dataset.manifest import PartWriter
from userdiff.shutdown import Failed
from userdiff.tools.status import read_status

IMPATIENT = """
import sys
from userdiff.job import store_client
store_client.LOST_AFTER_PULSES = 5
from datetime import timedelta
from userdiff.job import launcher
launcher.CONNECT_TIMEOUT = timedelta(seconds=8)
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 2, "--batch_size", 4, "--num_images_per_user", 8]


@pytest.fixture
def impatient(tmp_path):
    """batch_generate.py, but for the minute after which a process is given up."""
    script = tmp_path / "batch_generate.py"
    script.write_text(IMPATIENT)
    return script


def kill_job(job):
    family = job.family()
    send([job.process.pid, *family], signal.SIGKILL)
    assert job.wait(30, family)


# Signals


ENDLESS = """
import sys, time
from diffusers import UNet2DConditionModel
forward, passes = UNet2DConditionModel.forward, []

def forward_for_ever(self, *args, **options):
    passes.append(None)
    while len(passes) > 5:  # the third batch; the first pass was the one that tries whether there can be any
        time.sleep(0.01)
    return forward(self, *args, **options)

UNet2DConditionModel.forward = forward_for_ever
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_pass_that_would_never_end(flags, tmp_path, number):
    out = tmp_path / "out"
    job = start([sys.executable, "-c", ENDLESS, *flags, "--output_dir", out])
    wait_for(lambda: len(images_in(out)) == 8)
    job.send_signal(number)
    exit_status, _, stderr = finish(job, timeout=30)
    assert exit_status == 128 + number
    name = signal.Signals(number).name
    assert stderr.splitlines()[-1] == (
        f"batch_generate.py: stopped by {name}; 8 of 40 images are in {out}, the same command goes on from there"
    )
    entry = last_run(out)
    assert (entry["state"], entry["published"], entry["cause"]) == (f"stopped by signal {number.value}", 8, None)
    assert len(images_in(out)) == 8
    assert not list(out.glob("user_*/.*"))  # nothing half-written


SLOW_DISK = """
import sys, time
from userdiff.job import worker
seconds, publish, calls = float(sys.argv.pop(1)), worker.publish, []

def publish_slowly(path, *args, **options):
    calls.append(path)
    time.sleep(seconds if len(calls) > 1 else 0)
    return publish(path, *args, **options)

worker.publish = publish_slowly
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@pytest.mark.parametrize("seconds", [1, 1000])
@pytest.mark.parametrize("size", [64, 8], ids=["a batch is handed over", "all is handed over"])
def test_a_slow_disk_holds_up_no_stop(flags, tmp_path, seconds, size):
    """A second for an image, or a disk that no longer answers; 64 images in a batch took half a minute and more."""
    out = tmp_path / "out"
    job = [*flags, "--batch_size", size, "--num_images_per_user", size, "--user_ids", 1, 2, 3, "--output_dir", out]
    process = start([sys.executable, "-c", SLOW_DISK, seconds, *job])
    wait_for(lambda: len(images_in(out)) >= 1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    exit_status, _, stderr = finish(process, timeout=25)
    assert exit_status == 143
    (line,) = [line for line in stderr.splitlines() if line.startswith("batch_generate.py: ")]
    assert line.startswith("batch_generate.py: stopped by SIGTERM; ")
    assert last_run(out)["state"] == "stopped by signal 15"


def test_a_stop_with_overwrite_says_to_leave_it_out(flags, tmp_path, capsys, monkeypatch):
    forward = UNet2DConditionModel.forward

    def forward_and_stop(self, latents, *args, **options):
        if len(latents) > 1:  # not where it is tried whether a pass can be computed at all
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, latents, *args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward_and_stop)
    assert run_job(*flags, "--overwrite", "--output_dir", tmp_path) == 143
    assert capsys.readouterr().err.endswith("the same command, without --overwrite, goes on from there\n")


@pytest.mark.parametrize("number", [1, 7, 40], ids=["the first image", "one of them", "the last image"])
def test_a_signal_while_overwrite_looks_through_the_images_removes_none(flags, tmp_path, monkeypatch, capsys, number):
    """Pillow raises a dozen kinds of errors for a broken PNG, and all are caught: a signal must not be one of them."""
    job = [*flags, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    (tmp_path / "manifest.csv").unlink()  # as after a kill: each image explains itself
    open_image, opened, before = Image.open, [], files_in(tmp_path)

    def open_and_stop(*args, **options):
        opened.append(args)
        if len(opened) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return open_image(*args, **options)

    monkeypatch.setattr(Image, "open", open_and_stop)
    assert run_job(*job, "--overwrite") == 143
    assert len(opened) == number
    assert capsys.readouterr().err.splitlines()[-1].startswith("batch_generate.py: stopped by SIGTERM; ")
    assert files_in(tmp_path) == before


def test_the_others_stop_when_one_process_fails_and_one_cause_is_told(flags, tmp_path, monkeypatch):
    """Process 1 fails in the midst of its work; the others are in a pass without end."""
    forward, append = UNet2DConditionModel.forward, PartWriter.append

    def append_or_fail(self, row):
        if "part-00001" in str(self._path):
            raise OSError(5, "Input/output error", str(self._path))
        append(self, row)

    def slow_forward(self, *args, **options):
        time.sleep(0.1)
        return forward(self, *args, **options)

    monkeypatch.setattr(PartWriter, "append", append_or_fail)
    monkeypatch.setattr(UNet2DConditionModel, "forward", slow_forward)
    with pytest.raises((Failed, OSError), match=r"Input/output error"):
        play_processes(3, *flags, "--num_images_per_user", 200, "--output_dir", tmp_path)
    entry = last_run(tmp_path)
    assert entry["state"] == "failed"
    assert entry["cause"].startswith(f"process 1 on {socket.gethostname()}: ")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_takes_nobody_long_and_the_main_process_speaks_once(flags, tmp_path, killed):
    job = Job(launch(3, *flags, "--num_images_per_user", 2000, "--output_dir", tmp_path))
    wait_for(lambda: len(images_in(tmp_path)) >= 4 and len(list(tmp_path.glob("manifest.part-*"))) == 3)
    time.sleep(2)  # for the main process to have heard of all of them
    family = job.family()
    mark = f"\0RANK={killed}\0".encode()
    send([next(pid for pid in family if mark in Path(f"/proc/{pid}/environ").read_bytes())], signal.SIGKILL)
    assert job.wait(60, family)
    assert our_tracebacks(job.stderr) == []
    assert job.stderr.count("batch_generate.py: stopped by SIGTERM; ") == (killed != 0)
    assert (
        "Signal 9 (SIGKILL)" in job.stderr
    )  # the launcher says who died; where it was the main process, nobody else can
    if killed != 0:  # by the launcher, and the main process can tell why
        cause = f"no sign of life from process {killed} on {socket.gethostname()}"
        assert f"stopped by SIGTERM; {cause}; " in job.stderr
        status = read_status(tmp_path)
        assert (status.state, status.detail) == ("stopped by SIGTERM", cause)


# Machines and launchers


def test_a_launcher_that_is_stopped_is_waited_for_and_the_job_goes_on_with_it(flags, tmp_path, impatient):
    """As by Ctrl-Z and fg: the processes are no part of the terminal's job, but the store is its launcher's."""
    out = tmp_path / "out"
    job = Job(launch(2, *flags, "--num_images_per_user", 400, "--output_dir", out, script=impatient))
    wait_for(lambda: len(images_in(out)) >= 4)
    family = job.family()
    job.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(20)  # four times as long as one that does not answer gets, and longer than torch's store waits
        assert last_run(out)["state"] == "running"
        job.process.send_signal(signal.SIGCONT)
        assert job.wait(120, family)
    finally:
        job.end(family)
    pid = job.process.pid
    assert job.stdout.count(f", as long as process {pid} is stopped; fg, or kill -CONT {pid}, goes on\n") == 1
    assert job.process.returncode == 0
    assert last_run(out)["published"] == 2000


def test_a_signal_while_the_launcher_is_stopped_ends_its_processes(flags, tmp_path, impatient):
    out = tmp_path / "out"
    job = Job(launch(2, *flags, "--num_images_per_user", 5000, "--output_dir", out, script=impatient))
    wait_for(lambda: len(images_in(out)) >= 4)
    family = job.family()
    job.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(2)
        workers = {pid: stat for pid, stat in family.items() if pid != job.process.pid}
        send(list(workers), signal.SIGTERM)
        wait_for(lambda: not still_alive(workers), 20)
        assert last_run(out)["state"] == "stopped by signal 15"
    finally:
        job.end(family)
    assert job.stderr.count("batch_generate.py: stopped by SIGTERM; ") == 1
    assert our_tracebacks(job.stderr) == []


def two_machines(flags, impatient):
    """Two launches on loopback, as two machines would start them."""
    return start_machines(2, 1, flags, impatient)


def test_a_lost_first_machine_ends_the_job_on_the_other(flags, tmp_path, impatient):
    out = tmp_path / "out"
    first, second = two_machines([*flags, "--num_images_per_user", 5000, "--output_dir", out], impatient)
    wait_for(lambda: len(images_in(out)) >= 4)
    kill_job(first)
    assert second.wait(90, second.family())
    assert our_tracebacks(second.stderr) == []
    assert "error: lost contact with the launcher on 127.0.0.1:" in second.stderr
    assert read_status(out).state == "killed"
