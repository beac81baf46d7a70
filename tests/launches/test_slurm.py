"""The Slurm script, with stand-ins for `srun`, `scontrol` and, where no image is made, `accelerate`."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import model_flags
from tests.jobs import ROOT, finish, images_in, launch, run_job, start, tree, wait_for
from tests.processes import descendants, process_table, read_stat, send
from userdiff.dataset.run_record import RunEntry, RunRecord

SCRIPT = ROOT / "accelerate_configs" / "slurm.sh"

SCONTROL = r"""#!/bin/bash
case $1 in
    show) [[ $2 == hostnames && $3 =~ ^(.*)\[([0-9]+)-([0-9]+)\]$ ]] || exit 1
        for ((i = BASH_REMATCH[2]; i <= BASH_REMATCH[3]; i++)); do echo "${BASH_REMATCH[1]}$i"; done ;;
    requeue) echo "$2" >> "$TOY/requeued" ;;
    *) exit 1 ;;
esac
"""

# As Slurm's own on a cluster with `KillOnBadExit=1` and `WaitTime=1`: a task that fails takes the others along, a SIGTERM
# to srun itself kills them all, and so does the time after the first one's end.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
options = dict(kill_on_bad_exit="1", wait="1")
words = iter(sys.argv[1:])
for word in words:
    if not word.startswith("--"):
        break
    name, _, value = word[2:].partition("=")
    options[name.replace("-", "_")] = value
command = [word, *words]
assert options["cpus_per_task"] == os.environ["SLURM_CPUS_PER_TASK"]
numbers = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [
    subprocess.Popen(command, env=dict(os.environ, SLURM_NODEID=str(i), SLURM_PROCID=str(i))) for i in numbers
]
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
first_end = None
while None in [task.poll() for task in tasks]:
    if any(task.returncode for task in tasks) and options["kill_on_bad_exit"] != "0":
        [task.terminate() for task in tasks]
    if first_end is None and any(task.returncode is not None for task in tasks):
        first_end = time.monotonic()
    if first_end and options["wait"] != "0" and time.monotonic() - first_end > float(options["wait"]):
        [task.kill() for task in tasks]
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""

# Notes its command, writes the run.json that is laid out for it, and ends as it is told.
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" > "$TOY/command.$SLURM_NODEID"
if [[ $SLURM_NODEID == 0 ]]; then sleep "$LATER"; fi
if [[ $SLURM_NODEID == 0 && -f $TOY/next.json ]]; then mkdir -p "$OUT"; mv "$TOY/next.json" "$OUT/run.json"; fi
if [[ -n ${WAIT:-} ]]; then sleep 60 & touch "$TOY/waiting.$SLURM_NODEID"; wait; fi
exit "$LAUNCHER_STATUS"
"""


class Toy:
    """A cluster of two machines, both this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.jobs: list[subprocess.Popen] = []
        self.install("scontrol", SCONTROL)
        self.install("srun", SRUN)
        shutil.copy(SCRIPT, folder / "slurm_script")  # slurmd runs a copy, from its spool

    def install(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def sbatch(self, *flags: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        path = [str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_GPUS_ON_NODE": "",
            "SLURM_RESTART_COUNT": "",
        }
        toy = {"PATH": os.pathsep.join(path), "TOY": str(self.folder), "OUT": str(self.out)}
        canned = {"LATER": "0", "LAUNCHER_STATUS": "0"}
        command = ["bash", self.folder / "slurm_script", *flags]
        self.jobs.append(start(command, cwd, **{**slurm, **toy, **canned, **environment}))
        return self.jobs[-1]

    def end(self) -> None:
        """Leave nothing running, whatever failed."""
        for job in self.jobs:
            if job.poll() is None:
                send([*descendants(job.pid, process_table()), job.pid], signal.SIGKILL)
                job.wait(timeout=30)

    def requeued(self) -> list[str]:
        return (self.folder / "requeued").read_text().split() if (self.folder / "requeued").exists() else []

    def command(self, machine: int = 0) -> list[str]:
        """What `accelerate` was given there."""
        return (self.folder / f"command.{machine}").read_text().splitlines()

    def job_flags(self) -> list[str]:
        command = self.command()
        return command[command.index("batch_generate.py") + 1 :]


@pytest.fixture
def toy(tmp_path):
    toy = Toy(tmp_path)
    yield toy
    toy.end()


@pytest.fixture
def played(toy):
    """A cluster on which nothing is computed."""
    toy.install("accelerate", ACCELERATE)
    return toy


def history(*states: str, published: int = 8) -> bytes:
    """Return the run.json after runs that ended so, the last of them with so many images."""
    record = RunRecord(identity={"seed": 42}, numerics={"batch_size": 4})
    for hour, state in enumerate(states):
        entry = RunEntry(
            started=f"2026-01-01T{hour:02}:00:00+00:00",
            ended=None if state == "running" else f"2026-01-01T{hour:02}:50:00+00:00",
            state=state,
            cause='process 1 on node2: "state": "stopped by signal 15"' if state == "failed" else None,
            num_processes=2,
            user_ids="1-5",
            num_images_per_user=7,
            numerics=record.numerics,
            published=published if hour == len(states) - 1 else 4,
            failed=[(1, 2)] if state == "ended" else [],
        )
        record.history.append(entry)
    return record.to_bytes()


STOPPED = "stopped by signal 15"
REFUSED = None  # a typo, or another model: nothing is written


@pytest.mark.parametrize(
    ("before", "after", "launcher_status", "again"),
    [
        (None, history(STOPPED), 1, True),
        (history(STOPPED), history(STOPPED, STOPPED), 1, True),
        (history("failed"), history("failed", STOPPED), 1, True),
        (history(STOPPED, "failed"), history(STOPPED), 1, True),  # with --overwrite
        (None, REFUSED, 1, False),
        (history(STOPPED), REFUSED, 1, False),
        (None, history(STOPPED, published=0), 1, False),
        (history(STOPPED), history(STOPPED, STOPPED, published=0), 1, False),
        (None, history("failed"), 1, False),
        (history(STOPPED), history(STOPPED, "failed"), 1, False),
        (history(STOPPED), history(STOPPED, "running"), 137, False),  # killed
        (history(STOPPED), history(STOPPED, "ended"), 1, False),  # but for an image that is not finite
        (history(STOPPED), history(STOPPED, "ended"), 0, False),
    ],
)
def test_only_a_turn_that_was_stopped_and_made_images_is_queued_again(played, before, after, launcher_status, again):
    if before:
        played.out.mkdir()
        (played.out / "run.json").write_bytes(before)
    if after:
        (played.folder / "next.json").write_bytes(after)
    job = played.sbatch("--output_dir", played.out, LAUNCHER_STATUS=str(launcher_status))
    status, _, stderr = finish(job, timeout=30)
    assert status == launcher_status
    assert stderr == ""
    assert played.requeued() == (["4711"] if again else [])


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--output_dir=a folder"], "a folder"),
        (["--overwrite", "--output_dir", "elsewhere", "--output_dir", "a folder"], "a folder"),  # the last one counts
        (["--seed", "7", "--user_ids", "1", "3-5"], "generated_images"),
    ],
)
def test_it_reads_the_record_of_the_folder_that_the_job_has_and_starts_again_only_once(played, tmp_path, flags, folder):
    for turn in ("", "1"):
        (tmp_path / "next.json").write_bytes(history(*[STOPPED] * (2 if turn else 1)))
        canned = {"OUT": str(tmp_path / folder), "LAUNCHER_STATUS": "1", "SLURM_RESTART_COUNT": turn}
        assert finish(played.sbatch(*flags, cwd=tmp_path, **canned), timeout=30)[0] == 1
        assert played.job_flags() == (flags if not turn else [flag for flag in flags if flag != "--overwrite"])
    assert played.requeued() == ["4711", "4711"]


@pytest.mark.parametrize(("gpus", "config", "total"), [("8", "multi_node", 16), ("", "cpu", 6)])
def test_one_launcher_a_machine_and_a_process_a_gpu_or_core(played, gpus, config, total):
    assert finish(played.sbatch(SLURM_GPUS_ON_NODE=gpus, SLURM_CPUS_PER_TASK="3"), timeout=30)[0] == 0
    for machine in (0, 1):
        command = played.command(machine)
        assert command[0] == "launch"
        named = command[1 : command.index("batch_generate.py")]
        given = dict(zip(named[::2], named[1::2], strict=True))
        assert given == {
            "--machine_rank": str(machine),
            "--config_file": f"accelerate_configs/{config}.yaml",
            "--num_machines": "2",
            "--num_processes": str(total),
            "--num_cpu_threads_per_process": "1",
            "--main_process_ip": "127.0.0.1",
            "--main_process_port": "24711",
        }
        assert (ROOT / given["--config_file"]).is_file()


def test_the_first_launcher_to_leave_takes_nobody_along(played):
    """The main process writes its record when the others have left."""
    (played.folder / "next.json").write_bytes(history(STOPPED))
    job = played.sbatch("--output_dir", played.out, LATER="1.5", LAUNCHER_STATUS="1")
    assert finish(job, timeout=30)[0] == 1
    assert played.requeued() == ["4711"]


def test_a_cancelled_job_is_not_queued_again(played):
    """Slurm sends SIGTERM to the tasks and to the script."""
    (played.folder / "next.json").write_bytes(history(STOPPED))
    job = played.sbatch("--output_dir", played.out, WAIT="1", LAUNCHER_STATUS="1")
    wait_for(lambda: len(list(played.folder.glob("waiting.*"))) == 2, 30)
    family = list(descendants(job.pid, process_table()))
    send([*family, job.pid], signal.SIGTERM)
    assert finish(job, timeout=30)[0] == -signal.SIGTERM
    assert played.requeued() == []


# A real job


def free_job_number() -> str:
    """Find a job number whose port is free."""
    for number in range(os.getpid() % 10000, 20000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number % 10000)) != 0:
                return str(number)
    raise AssertionError


def tasks_of(job: subprocess.Popen) -> list[int]:
    """Every process that srun started: to these Slurm sends its signal, not to srun nor to the script."""
    table = process_table()
    (srun,) = (pid for pid, stat in table.items() if stat.parent == job.pid)
    return list(descendants(srun, table))


def test_a_stopped_job_is_queued_again_and_the_next_turn_completes_it(checkpoint, toy, tmp_path):
    flags = [*model_flags(checkpoint), "--num_inference_steps", 2, "--num_images_per_user", 30, "--batch_size", 4]
    flags += ["--device", "cpu", "--overwrite", "--output_dir"]
    number = free_job_number()
    job = toy.sbatch(*flags, toy.out, SLURM_JOB_ID=number)
    wait_for(lambda: len(images_in(toy.out)) >= 8 or job.poll() is not None)
    tasks = tasks_of(job)
    send(tasks, signal.SIGTERM)
    status, stdout, stderr = finish(job, timeout=60)
    assert status == 1
    assert stdout.startswith("Turn 1 on 127.0.0.[1-2]\n")
    assert "by 2 processes on cpu" in stdout
    assert "stopped by SIGTERM; " in stderr
    assert not any((stat := read_stat(pid)) and stat.state not in "ZX" for pid in tasks)
    assert toy.requeued() == [number]
    made = {path: path.stat().st_mtime_ns for path in images_in(toy.out)}
    assert 8 <= len(made) < 150

    fewer = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "127.0.0.[1-1]"}  # one job number, another allocation
    status, stdout, stderr = finish(toy.sbatch(*flags, toy.out, SLURM_JOB_ID=number, SLURM_RESTART_COUNT="1", **fewer))
    assert status == 0, stderr
    assert "by 1 process on cpu" in stdout
    assert f"{len(made)} already there, {150 - len(made)} to make" in stdout
    assert toy.requeued() == [number]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert run_job(*flags, tmp_path / "plain") == 0
    assert tree(toy.out) == tree(tmp_path / "plain")


CRASHES_ONCE = """
import os
import signal
import sys
from userdiff.cli import generate
from userdiff.dataset.manifest import PartWriter

append, rows = PartWriter.append, []

def append_or_die(self, row):
    append(self, row)
    rows.append(row)
    if len(rows) == 6 and os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

PartWriter.append = append_or_die
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


def test_a_group_that_the_launcher_restarts_after_a_crash_goes_on(checkpoint, tmp_path):
    flags = [*model_flags(checkpoint), "--num_inference_steps", 2, "--num_images_per_user", 30, "--batch_size", 4]
    script = tmp_path / "batch_generate.py"
    script.write_text(CRASHES_ONCE)
    out = tmp_path / "out"
    job = launch(2, *flags, "--overwrite", "--output_dir", out, launcher_flags=["--max_restarts", "1"], script=script)
    status, stdout, stderr = finish(job)
    assert status == 0, stderr
    first, second = re.findall(r"(\d+) already there, (\d+) to make", stdout)
    assert first == ("0", "150")
    assert int(second[0]) >= 6
    assert "Done: 150 of 150 images" in stdout
    assert [entry.state for entry in RunRecord.read(out).history] == ["running", "ended"]
    assert run_job(*flags, "--output_dir", tmp_path / "plain") == 0
    assert tree(out) == tree(tmp_path / "plain")


DIES_BEFORE_IT_BEGINS = """
import os
import signal
import sys
from userdiff.cli import generate
from userdiff.job import run

load_model = run.load_model

def load_or_die(*args):
    if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return load_model(*args)

run.load_model = load_or_die
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


def test_a_group_that_died_before_it_began_leaves_overwrite_to_the_next(checkpoint, tmp_path):
    """It was ignored after any restart, and what was to be replaced was kept."""
    flags = [*model_flags(checkpoint), "--num_inference_steps", 1, "--num_images_per_user", 2]
    out = tmp_path / "out"
    assert run_job(*flags, "--seed", 7, "--output_dir", out) == 0
    script = tmp_path / "batch_generate.py"
    script.write_text(DIES_BEFORE_IT_BEGINS)
    job = launch(2, *flags, "--overwrite", "--output_dir", out, launcher_flags=["--max_restarts", "1"], script=script)
    status, stdout, stderr = finish(job)
    assert status == 0, stderr
    assert "Removed: 10 images of earlier runs" in stdout
    assert run_job(*flags, "--output_dir", tmp_path / "plain") == 0
    assert tree(out) == tree(tmp_path / "plain")


# The text


def test_every_line_has_its_comment():
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    for before, line in itertools.pairwise(lines):
        is_code = not line.startswith("# ") and line not in {"", "#", "done", "}", ")", "fi"}
        assert not is_code or before.startswith("# ") or re.fullmatch(r".*\S +# \S.*", line), line
        assert len(line) <= 120, line


def test_what_sbatch_reads_comes_before_the_first_command_and_says_when_to_stop():
    """Sbatch reads nothing of what follows a command."""
    lines = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    options = {line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")}
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= options
    (when,) = (option for option in options if option.startswith("--signal="))
    name, seconds = re.fullmatch(r"--signal=(\w+)@(\d+)", when).groups()  # to the tasks; `B:` would be to the script
    assert f"SIG{name}" == "SIGTERM"  # what ends a launcher; NCCL takes SIGUSR1 for itself
    assert int(seconds) >= 60  # a job ends in ten; the disk may be slow


def test_shellcheck_finds_nothing():
    process = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", SCRIPT], check=False, capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stdout) == (0, "")
