"""Processes of which one is three times as slow, starts late, or is lost: batches that are claimed against a static split.

    python -m benchmarks.straggler

Real processes, each with the job's own loop, around a real store; the model sleeps, so cores do not matter. The clock
starts when all are ready, but for one that is late. One that is lost is killed without a word; the others miss it after a
minute, and make its batches again.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

from userdiff.config import JobConfig, bundled_model
from userdiff.dataset.layout import file_name
from userdiff.dataset.run_record import RunEntry, RunRecord, now
from userdiff.diffusion import generate
from userdiff.job import launcher
from userdiff.job.plan import Plan, make_plan
from userdiff.job.run import make_missing
from userdiff.job.store import connect
from userdiff.job.worker import make_images
from userdiff.shutdown import Shutdown

BATCH_SIZE = 4
SLOWNESS = 3
START_SECONDS = 300  # for all processes, on a busy machine
MODEL = SimpleNamespace(
    identity={"seed": 42, "num_inference_steps": 20, "conditioning": "trained"},
    run="0" * 64,
    device=torch.device("cpu"),
    compiled="no",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run."""

    num_batches: int
    batch_seconds: tuple[float, ...]
    """Of each process; the first is the main one."""
    late: float = 0
    """Seconds by which the last process comes late."""
    lost: float = 0
    """Seconds after which the last process is killed; 0 for never."""

    def delays(self) -> list[float]:
        """Return the seconds after which each process is there."""
        return [0.0] * (len(self.batch_seconds) - 1) + [self.late]

    def lost_process(self) -> int | None:
        """Return the process that is killed; None for none."""
        return len(self.batch_seconds) - 1 if self.lost else None

    def ideal(self) -> float:
        """Return the seconds of the best split if batches could be cut at will."""
        return self._shortest(lambda seconds, of_batch: seconds / of_batch)

    def ideal_of_whole_batches(self) -> float:
        """Return the seconds of the best split there is."""
        return self._shortest(lambda seconds, of_batch: math.floor(seconds / of_batch + 1e-6))

    def _shortest(self, num_made: Callable[[float, float], float]) -> float:
        def is_enough(seconds: float) -> bool:
            places = zip(self.batch_seconds, self.delays(), strict=True)
            ends = [seconds] * len(self.batch_seconds)
            if self.lost:
                ends[-1] = min(seconds, self.lost)
            made = [num_made(max(0.0, end - delay), one) for (one, delay), end in zip(places, ends, strict=True)]
            return sum(made) >= self.num_batches

        low, high = 0.0, self.num_batches * max(self.batch_seconds) + self.late
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return high

    def plan(self) -> Plan:
        """Plan so many full batches."""
        return make_plan([1], self.num_batches * BATCH_SIZE, BATCH_SIZE)


def work(case: Case, output_dir: Path, *, is_static: bool) -> None:
    """Be one process of a case: wait until all are there, make images, and tell when it was done and how many."""
    with connect(Shutdown()) as coordinator:
        index, plan = coordinator.process_index, case.plan()
        store = launcher.open_store()
        made = 0

        def sleep(config: object, model: object, items: Sequence[object], on_step: Callable[[], None]) -> object:
            nonlocal made
            time.sleep(case.batch_seconds[index])
            made += 1
            return generate.Batch(
                items=items,
                contradicts_range=torch.tensor(data=False),
                finite=torch.ones(len(items), dtype=torch.bool),
                pixels=torch.zeros(len(items), 8, 8, 3, dtype=torch.uint8),
            )

        store.add("ready", 1)
        wait_for(lambda: int(store.add("ready", 0)) == coordinator.num_processes)
        if is_static:
            own = iter([*range(index, case.num_batches, coordinator.num_processes), case.num_batches])
            coordinator.next_batch = own.__next__
        config = JobConfig(**bundled_model(), output_dir=output_dir)
        with patch.object(generate, "start", sleep):
            if coordinator.is_main_process:
                (output_dir / file_name(1, 0)).parent.mkdir(parents=True)
                store.set("begun", str(time.monotonic()))
                make_missing(config, MODEL, plan, record_of(plan), coordinator)
            for packed in coordinator.waves():
                time.sleep(case.delays()[index])
                if index == case.lost_process():
                    time_left = case.lost - (time.monotonic() - float(store.get("begun")))
                    threading.Timer(time_left, os.kill, args=(os.getpid(), signal.SIGKILL)).start()
                wave = Plan.from_bytes(packed)
                make_images(config, MODEL, wave, coordinator, compress_level=6, on_step=coordinator.check)
        seconds = time.monotonic() - float(store.get("begun"))
        store.set(f"ended/{index}", f"{seconds} {made}")


def record_of(plan: Plan) -> RunRecord:
    """Return a record as a job that begins has it."""
    numerics = {"batch_size": BATCH_SIZE, "png_compress_level": 6}
    entry = RunEntry(
        started=now(), num_processes=1, user_ids="1", num_images_per_user=plan.num_images_per_user, numerics=numerics
    )
    return RunRecord(identity=MODEL.identity, numerics=numerics, history=[entry])


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait, but not for ever."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"not all processes were there after {START_SECONDS} s")
        time.sleep(0.01)


def measure(case: Case, *, is_static: bool) -> tuple[float, list[int]]:
    """Run a case: the seconds until the last process was done, and how many batches each has made."""
    number = len(case.batch_seconds)
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.straggler", "--work", str(Path(folder) / "out")]
        command += ["--num_batches", str(case.num_batches), "--late", str(case.late)]
        command += ["--lost", str(case.lost)]
        command += ["--batch_seconds", *map(str, case.batch_seconds), *(["--static"] if is_static else [])]
        place = {
            "TORCHELASTIC_RUN_ID": "bench",
            "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.port),
        }
        processes = [
            subprocess.Popen(command, env={**os.environ, **place, "RANK": str(index), "OMP_NUM_THREADS": "1"})
            for index in range(number)
        ]
        if [index for index, process in enumerate(processes) if process.wait()] not in ([], [case.lost_process()]):
            sys.exit("a process failed")
        num_images = len(list(Path(folder).glob("out/user_01/generated_*.png")))
        if num_images != case.num_batches * BATCH_SIZE:
            sys.exit(f"{num_images} images, expected {case.num_batches * BATCH_SIZE}")
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    keys = [f"userdiff/bench/ended/{index}" for index in range(number)]
    ends = [
        client.get(key).decode().split() if client.check([key]) else ("0", "0") for key in keys
    ]  # the lost one says nothing
    return max(float(seconds) for seconds, _ in ends), [int(made) for _, made in ends]


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Return what is run, each with its name."""
    for number in args.num_processes:
        seconds = (args.seconds,) * (number - 1) + (args.seconds * SLOWNESS,)
        yield f"{number}, one {SLOWNESS} x slower", Case(num_batches=12 * number, batch_seconds=seconds)
    if args.late:
        number = 4
        seconds = (args.seconds,) * number
        enough = next(  # it comes after two thirds of the time
            num_batches
            for num_batches in count(number, number)
            if Case(num_batches=num_batches, batch_seconds=seconds, late=args.late).ideal() >= 1.5 * args.late
        )
        yield (
            f"{number}, one {args.late:.0f} s late",
            Case(num_batches=enough, batch_seconds=seconds, late=args.late),
        )
    if args.lost:
        number = 4
        num_batches = round(2 * args.lost / args.seconds) * number
        seconds = (args.seconds,) * number
        yield (
            f"{number}, one lost after {args.lost:.0f} s",
            Case(num_batches=num_batches, batch_seconds=seconds, lost=args.lost),
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a batch, where a process is not slow")
    parser.add_argument("--late", type=float, default=60, help="seconds; 0: leave that case out")
    parser.add_argument(
        "--lost", type=float, default=60, help="seconds, half of the case's time; 0: leave that case out"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--num_batches", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch_seconds", type=float, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--static", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        case = Case(
            num_batches=args.num_batches, batch_seconds=tuple(args.batch_seconds), late=args.late, lost=args.lost
        )
        work(case, args.work, is_static=args.static)
        return
    print("| processes | batches | ideal, s | of whole batches, s | claimed, s | static split, s |", end="")
    print(" claimed - ideal, batches | of the odd one's | made by the odd one |\n" + "|---" * 9 + "|", flush=True)
    for name, case in cases(args):
        claimed, made = measure(case, is_static=False)
        static = math.nan if case.lost else measure(case, is_static=True)[0]  # a static split never makes them
        behind = claimed - case.ideal()
        print(
            f"| {name} | {case.num_batches} | {case.ideal():.1f} | {case.ideal_of_whole_batches():.1f} | {claimed:.1f} | "
            f"{static:.1f} | {behind / args.seconds:.2f} | {behind / case.batch_seconds[-1]:.2f} | {made[-1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
