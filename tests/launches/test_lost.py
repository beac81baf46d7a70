"""Machines and processes that are lost, suspended, late or come back: the others complete the dataset."""

import json
import signal
import socket
import sys

import pytest

from tests.checkpoints import model_flags
from tests.jobs import free_port, images_in, last_run, run_job, start, start_machines, tree, wait_for
from tests.processes import Job, our_tracebacks, send

IMPATIENT = """
import sys
import time
from pathlib import Path
from userdiff.diffusion import generate as diffusion
from userdiff.job import store_client

store_client.LOST_AFTER_PULSES = 5
start, num_begun = diffusion.start, 0

def start_if_open(config, model, items, on_step):
    global num_begun
    num_begun += 1
    while num_begun > 5 and not Path({gate!r}).exists():
        on_step()
        time.sleep(0.02)
    return start(config, model, items, on_step)

diffusion.start = start_if_open
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 2, "--batch_size", 4, "--num_images_per_user", 150]


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert run_job(*flags, "--output_dir", folder) == 0
    return tree(folder)


@pytest.fixture
def gate(tmp_path):
    """Each process claims a sixth batch, and computes none of it before this file is there."""
    return tmp_path / "gate"


@pytest.fixture
def impatient(gate, tmp_path):
    """batch_generate.py with the gate, and without the minute after which a process is lost."""
    script = tmp_path / "batch_generate.py"
    script.write_text(IMPATIENT.format(gate=str(gate)))
    return script


@pytest.fixture
def jobs():
    """Launchers of a test, ended with all that they have started."""
    started: list[Job] = []
    yield started
    for job in started:
        job.end({})


def parts(out):
    return {path.name for path in out.glob("manifest.part-*")}


@pytest.mark.parametrize("what", ["a machine is killed", "a machine is told to end"])
def test_a_loss_costs_its_unfinished_batches_and_not_the_job(flags, reference, gate, impatient, jobs, tmp_path, what):
    out, each = tmp_path / "out", 2
    jobs += start_machines(2, each, [*flags, "--output_dir", out], impatient)
    first, second = jobs
    wait_for(lambda: len(images_in(out)) == 2 * each * 5 * 4)  # 5 batches of 4 of each process
    family = second.family()
    if what == "a machine is killed":
        send([second.process.pid, *family], signal.SIGKILL)
    else:
        second.process.terminate()
    assert second.wait(60, family)
    gate.touch()
    assert first.wait(120, first.family())
    assert (first.process.returncode, our_tracebacks(first.stderr)) == (0, [])
    assert second.process.returncode != 0
    assert tree(out) == reference
    how = "stopped by SIGTERM" if what == "a machine is told to end" else "no sign of life"
    lost = [f"process {index} on {socket.gethostname()}, {how}" for index in range(each, 2 * each)]
    assert last_run(out)["lost"] == lost
    assert f"Lost: 2 of 4 processes were lost ({'; '.join(lost)}); the others made what was left\n" in first.stdout
    for which in lost:
        assert f"Warning: {which}: lost, the others make what it leaves\n" in first.stderr
    line = f"batch_generate.py: stopped by SIGTERM; what is done is kept in {out}, the rest is left to the other machines\n"
    assert second.stderr.count(line) == (what == "a machine is told to end")


def test_a_process_that_was_suspended_does_no_harm_when_it_goes_on(flags, reference, gate, impatient, jobs, tmp_path):
    """Here when all have ended and the store has gone with the first launcher; chaos wakes it at any time."""
    out = tmp_path / "out"
    jobs += start_machines(2, 1, [*flags, "--output_dir", out], impatient)
    first, second = jobs
    wait_for(lambda: len(images_in(out)) == 2 * 5 * 4)
    (pid,) = [pid for pid, stat in second.family().items() if stat.parent == second.process.pid]
    send([pid], signal.SIGSTOP)
    gate.touch()
    assert first.wait(120, first.family())
    assert tree(out) == reference
    send([pid], signal.SIGCONT)
    assert second.wait(120, second.family())
    for job in jobs:
        assert (job.process.returncode, our_tracebacks(job.stderr)) == (0, [])
    assert tree(out) == reference
    assert not parts(out)


# torchrun, whose machines come and go


def test_machines_of_an_elastic_launch_come_late_go_and_come_back(flags, reference, gate, impatient, jobs, tmp_path):
    """torchrun restarts all processes whenever a machine joins, without counting it; the folder goes on.

    With its own store it does not let a machine in that comes late (torch 2.13): the first one forgets to say where that is.
    """
    out, port = tmp_path / "out", free_port()

    def join():
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=1:2",
            "--nproc_per_node=1",
            "--max_restarts=3",
        ]
        command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_conf=last_call_timeout=1"]
        command += [impatient, "--device", "cpu", *flags, "--output_dir", out]
        jobs.append(Job(start(command, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")))
        return jobs[-1]

    def are_by(numbers):
        """Whether the runs so far were of so many processes, and those of the last one make images now."""
        if not (out / "run.json").exists():
            return False
        history = json.loads((out / "run.json").read_text())["history"]
        return [run["num_processes"] for run in history] == numbers and len(parts(out)) == numbers[-1]

    first = join()
    wait_for(lambda: are_by([1]))
    second = join()
    wait_for(lambda: are_by([1, 2]))
    send([second.process.pid, *second.family()], signal.SIGKILL)
    third = join()
    wait_for(lambda: are_by([1, 2, 2]))
    gate.touch()
    wait_for(lambda: last_run(out)["state"] == "ended")
    assert tree(out) == reference
    for job in (first, third):
        assert job.wait(120, job.family())
        assert our_tracebacks(job.stderr) == []
        assert job.process.returncode == 0
