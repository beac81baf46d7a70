"""Running jobs in tests: one process, N played in one, and real launches."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import HashStore

from tests.processes import Job
from userdiff.cli import generate
from userdiff.config import parse_args
from userdiff.diffusion.model import load_model
from userdiff.job import store_client
from userdiff.job.group import JobIsOverError
from userdiff.job.run import run_process
from userdiff.job.store import Coordinator

ROOT = Path(__file__).parent.parent


def run_job(*flags: object) -> int:
    """Run a whole job in this process, through its command line."""
    return generate([str(flag) for flag in flags])


def play_processes(num_processes: int, *flags: object) -> list[int]:
    """Play N processes of one job in this one, a thread each, around one store; gives each one's exit status."""
    config = parse_args([str(flag) for flag in flags])
    model = load_model(config, torch.device("cpu"), "no")
    store = HashStore()

    def play(process_index: int) -> int:
        try:
            with Coordinator(lambda: store, process_index, num_processes) as coordinator:
                return run_process(config, model, coordinator)
        except JobIsOverError as over:  # before this one has come
            return over.exit_status

    with patch.object(store_client, "PULSE_SECONDS", 0.1), ThreadPoolExecutor(num_processes) as threads:
        return list(threads.map(play, range(num_processes)))


def launch(
    num_processes: int,
    *flags: object,
    launcher_flags: Sequence[str] = (),
    threads: int = 1,
    script: Path | str = "batch_generate.py",
    config: str = "cpu.yaml",
    launcher: str = "accelerate.commands.launch",
) -> subprocess.Popen:
    """Start a job with real processes, as the README says."""
    command = [sys.executable, "-m", launcher]
    command += ["--config_file", f"accelerate_configs/{config}", "--num_processes", str(num_processes)]
    command += ["--num_cpu_threads_per_process", str(threads), *launcher_flags]
    command += [str(script), "--device", "cpu", *map(str, flags)]
    return start(command)


def start_machines(number: int, processes_each: int, flags: Sequence[object], script: Path) -> list[Job]:
    """Start a job as so many machines would, each with a launcher of its own; returns the launchers."""
    network = ["--num_machines", str(number), "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return [
        Job(
            launch(
                number * processes_each,
                *flags,
                launcher_flags=[*network, "--machine_rank", str(machine)],
                script=script,
                launcher="tests.startup.patient_for_a_second",
            )
        )
        for machine in range(number)
    ]


def start(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    path = [environment.pop("PYTHONPATH", str(ROOT)), str(ROOT / "tests" / "startup")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment}
    return subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen, timeout: float = 180) -> tuple[int, str, str]:
    """Wait for a process: (exit status, stdout, stderr)."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


def tree(output_dir: Path) -> dict[str, str]:
    """Every image and the manifest, by relative path: what must not depend on how the job was run."""
    files = [*output_dir.glob("user_*/*"), output_dir / "manifest.csv"]
    return {str(file.relative_to(output_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def images_in(output_dir: Path) -> list[Path]:
    """Every PNG of a user's folder, temporaries apart."""
    return sorted(output_dir.glob("user_*/[!.]*.png"))


def last_run(output_dir: Path) -> dict[str, Any]:
    """Return the last entry of the history in `run.json`."""
    return json.loads((output_dir / "run.json").read_text())["history"][-1]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for something that will be so when all is well; no test depends on how long it takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> int:
    """Find a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
