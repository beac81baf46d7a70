"""What the store and the file system sustain when computing takes no time: claims and published images a second.

    python -m benchmarks.store

Real processes around a real store, as under a launcher, each with the job's own loop; the model is instant and the
images are 8 pixels wide. All processes share this machine's cores with the store: what they reach is a lower bound for
as many machines.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

from userdiff.config import JobConfig, bundled_model
from userdiff.dataset.layout import file_name
from userdiff.diffusion import generate
from userdiff.job import launcher
from userdiff.job.plan import make_plan
from userdiff.job.store import Coordinator, connect
from userdiff.job.worker import make_images
from userdiff.shutdown import Shutdown

BATCH_SIZE = 64
START_SECONDS = 300  # for all processes, on a busy machine
MODEL = SimpleNamespace(
    identity={"seed": 42, "num_inference_steps": 20, "conditioning": "trained"},
    run="0" * 64,
    device=torch.device("cpu"),
    compiled="no",
)


def claim(coordinator: Coordinator, number: int, folder: Path) -> None:
    """Claim so many batches."""
    for _ in range(number):
        coordinator.next_batch()


def publish(coordinator: Coordinator, number: int, folder: Path) -> None:
    """Make so many images with the job's own loop, each process those of a user of its own."""
    plan = make_plan([coordinator.process_index + 1], number, BATCH_SIZE)
    (folder / file_name(coordinator.process_index + 1, 0)).parent.mkdir()
    numbers = iter(range(len(plan.batches) + 1))
    claim_shared = coordinator.next_batch

    def next_batch() -> int:
        claim_shared()  # costs what it costs; the others' numbers are not this process's
        return next(numbers)

    def instant(config: object, model: object, items: Sequence[object], on_step: Callable[[], None]) -> object:
        return generate.Batch(
            items=items,
            contradicts_range=torch.tensor(data=False),
            finite=torch.ones(len(items), dtype=torch.bool),
            pixels=torch.zeros(len(items), 8, 8, 3, dtype=torch.uint8),
        )

    config = JobConfig(**bundled_model(), output_dir=folder)
    with patch.object(generate, "start", instant), patch.object(coordinator, "next_batch", next_batch):
        make_images(config, MODEL, plan, coordinator, compress_level=6, on_step=coordinator.check)


WORK = {"claims": (claim, 5_000), "images": (publish, 5_000)}  # by each process


def work(name: str, folder: Path) -> None:
    """Be one process: wait until all are there, work, and tell how long it took."""
    act, number = WORK[name]
    with connect(Shutdown()) as coordinator:
        store = launcher.open_store()
        store.add("ready", 1)
        deadline = time.monotonic() + START_SECONDS
        while int(store.add("ready", 0)) < coordinator.num_processes:
            if time.monotonic() > deadline:
                sys.exit(f"not all processes were there after {START_SECONDS} s")
            time.sleep(0.01)
        started = time.monotonic()
        act(coordinator, number, folder)
        print(started, time.monotonic(), flush=True)


def measure(name: str, num_processes: int) -> float:
    """Have so many processes work at once; gives what all of them do in a second."""
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    place = {
        "TORCHELASTIC_RUN_ID": name,
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.store", "--work", name, "--folder", folder]
        processes = [
            subprocess.Popen(
                command, env={**os.environ, **place, "RANK": str(index), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
            )
            for index in range(num_processes)
        ]
        times = [list(map(float, process.communicate()[0].split())) for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a process failed")
    seconds = max(ended for _, ended in times) - min(started for started, _ in times)
    return num_processes * WORK[name][1] / seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.folder)
        return
    print("| processes | claims a second | images a second |\n|---|---|---|", flush=True)
    for number in args.num_processes:
        print(f"| {number} | {measure('claims', number):,.0f} | {measure('images', number):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
