"""Several machines for real, as launches on loopback: one slow, one late, one that does not share the folder."""

import socket
import sys
from collections import Counter

import pytest

from tests.checkpoints import model_flags
from tests.jobs import ROOT, finish, free_port, last_run, run_job, start, tree
from tests.processes import our_tracebacks

UNLIKE = """
import os, sys, time
from pathlib import Path
from userdiff.diffusion import generate
from userdiff.dataset import manifest
from userdiff.job import run as runner
from userdiff import cli

FIRST, SLOW, LATE = "012"
here, out = os.environ["GROUP_RANK"], Path(sys.argv[-1])
append, load_model, start_batch = manifest.PartWriter.append, runner.load_model, generate.start

def wait_for(condition, what):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    sys.exit(f"machine {here} has waited a minute {what}")

def num_images():
    return len(list(out.glob("user_*/*.png")))

def load_late(*args):
    if here == LATE:
        wait_for(lambda: num_images() >= 8, "for images of those that are not late")
    return load_model(*args)

def start_in_turn(*args):
    Path(f"{out}.{here}.claimed").touch()
    if num_images() >= 40:  # leave some to each
        wait_for(lambda: len(list(out.parent.glob("*.claimed"))) == 3, "for the others to claim a batch")
    time.sleep(2 if here == SLOW else 0)
    return start_batch(*args)

def append_and_tell(self, row):
    append(self, row)
    with open(f"{out}.{here}.made", "a") as file:
        print(row.file_name, file=file)

manifest.PartWriter.append, runner.load_model, generate.start = append_and_tell, load_late, start_in_turn
sys.exit(cli.generate(sys.argv[1:], prog="batch_generate.py"))
"""

IMPATIENT = """
import sys
from userdiff.job import output_folder
output_folder.NUM_LOOKS = 10
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@pytest.fixture
def start_machines(tmp_path):
    """Start a job as so many machines of one process each would, each in a folder of its own; gives their launchers."""
    started = []

    def start_all(number, script, *flags):
        path = tmp_path / "batch_generate.py"
        path.write_text(script)
        config = ROOT / "accelerate_configs" / "cpu.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        command += ["--num_machines", number, "--num_processes", number, "--num_cpu_threads_per_process", 1]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
        for machine in range(number):
            folder = tmp_path / f"machine-{machine}"
            folder.mkdir()
            started.append(start([*command, "--machine_rank", machine, path, "--device", "cpu", *flags], cwd=folder))
        return started

    yield start_all
    for launcher in started:  # their processes miss them
        launcher.kill()


def test_a_slow_and_a_late_machine_each_make_what_they_can(checkpoint, start_machines, tmp_path):
    """The late one loads its models only when it sees images that the others have made: they do not wait for it."""
    flags = [*model_flags(checkpoint), "--num_inference_steps", 2, "--num_images_per_user", 24, "--batch_size", 4]
    out = tmp_path / "out"
    for status, _, stderr in [finish(launcher) for launcher in start_machines(3, UNLIKE, *flags, "--output_dir", out)]:
        assert status == 0, stderr
    assert run_job(*flags, "--output_dir", tmp_path / "plain") == 0
    assert tree(out) == tree(tmp_path / "plain")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "plain").iterdir()}
    assert last_run(out)["published"] == 120
    made = [(tmp_path / f"out.{machine}.made").read_text().splitlines() for machine in range(3)]
    assert Counter(name for names in made for name in names) == Counter(
        name for name in tree(out) if name.startswith("user_")
    )  # each once
    first, slow, late = map(len, made)
    assert 0 < slow < first
    assert late > 0


def test_a_machine_that_does_not_share_the_folder_ends_the_job_before_anything_is_written(
    checkpoint, start_machines, tmp_path
):
    launchers = start_machines(2, IMPATIENT, *model_flags(checkpoint), "--output_dir", "out")
    ends = [finish(launcher) for launcher in launchers]
    host = socket.gethostname()
    line = (
        f"batch_generate.py: error: --output_dir: {host} does not see what {host} wrote to {tmp_path / 'machine-0/out'}; "
        "needed: a folder that all machines share\n"
    )
    assert [stderr.count(line) for _, _, stderr in ends] == [1, 0]
    for status, stdout, stderr in ends:
        assert status == 1  # the launcher's own
        assert "exitcode  : 2" in stderr
        assert stderr.count("error: --") == stderr.count(line)
        assert our_tracebacks(stderr) == []
        assert stdout == ""
    for machine in range(2):
        assert list((tmp_path / f"machine-{machine}").iterdir()) == []
