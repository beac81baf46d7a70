"""The job against what a user would run instead, taking turns, on one checkpoint of the size in use.

    python -m benchmarks.throughput --json benchmarks/throughput.json
    python -m benchmarks.throughput --batch_sizes 1 2 4 8 16      # rate and memory by batch size instead
    python -m benchmarks.throughput --scaling --rounds 8          # two processes against one, and what the machine allows

First whole jobs are launched as the README says: eager, and compiled from a cold cache. Then every contender is loaded
once, makes a first batch (compiled from the cache that is warm now), and then one batch a round, so that a change of
the machine's mood hits all alike.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.checkpoint import make_checkpoint, model_flags

ROOT = Path(__file__).parent.parent
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False"}
ORIGINAL, PIPELINE = "(a) original loop, float32", "(b) StableDiffusionPipeline"
JOB, JOB_COMPILED = "(c) job", "(c) job, compiled"
FLOOR, FLOOR_COMPILED = "(d) its passes alone", "(d) its passes alone, compiled"
ONE_PROCESS = "job, one process of one thread"
TARGETS = [  # (precision, of, against, at least)
    ("no", JOB_COMPILED, ORIGINAL, 1.45),
    ("no", JOB_COMPILED, PIPELINE, 1.2),
    ("bf16", JOB_COMPILED, ORIGINAL, 5.0),
    ("bf16", JOB_COMPILED, PIPELINE, 1.6),
    ("no", JOB, FLOOR, 0.97),
    ("no", JOB_COMPILED, FLOOR_COMPILED, 0.97),
    ("no", JOB, ONE_PROCESS, 1.9),
]


@dataclass(frozen=True)
class Contender:
    """Processes that share the cores, each with its models loaded."""

    name: str
    processes: Sequence[subprocess.Popen[str]]

    def compute(
        self, command: str = "work", num_processes: int | None = None, seconds: float = 0
    ) -> tuple[float, float]:
        """Have each of so many processes at once make a batch, or batches for so long: (images/s, peak MiB of the largest).

        Images count when they are published, and all are before this returns.
        """
        self.begin(command, num_processes, seconds)
        return self.end(num_processes)

    def begin(self, command: str = "work", num_processes: int | None = None, seconds: float = 0) -> None:
        """Ask for it."""
        for process in self.processes[:num_processes]:
            print(command, seconds, file=process.stdin, flush=True)

    def end(self, num_processes: int | None = None) -> tuple[float, float]:
        """Take the answers to what `begin` asked for."""
        answers = [self._answer(process) for process in self.processes[:num_processes]]
        rate = sum(answer["num_images"] / answer["seconds"] for answer in answers)
        return rate, max(answer["peak_mib"] for answer in answers)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        if not (line := process.stdout and process.stdout.readline()):
            sys.exit(f"{self.name} ended; its errors are above")
        return json.loads(line)


@dataclass(frozen=True)
class Launch:
    """A whole job, from its command to its end."""

    num_images: int
    seconds: float
    seconds_to_first_image: float


@dataclass(frozen=True)
class Bench:
    """What all have in common: checkpoint, precision, steps and cores."""

    folder: Path
    precision: str
    num_inference_steps: int
    batch_size: int
    pipeline_batch_size: int
    device: str = "cpu"
    other_checkpoint: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """Where it lies."""
        return self.other_checkpoint or self.folder / "checkpoint"

    @contextmanager
    def contender(
        self,
        name: str,
        num_processes: int = 1,
        env: Mapping[str, str] | None = None,
        batch_size: int | None = None,
        more: Sequence[str] = (),
    ) -> Iterator[Contender]:
        """Start the processes of a contender."""
        command = [sys.executable, "-m", "benchmarks.contenders", name, self.checkpoint]
        flags = [
            *more,
            "--batch_size",
            batch_size or self.batch_size,
            "--num_inference_steps",
            self.num_inference_steps,
        ]
        flags += ["--mixed_precision", self.precision, "--device", self.device]
        threads = max(1, (os.cpu_count() or 1) // num_processes)
        processes = [
            subprocess.Popen(
                [str(part) for part in [*command, tempfile.mkdtemp(dir=self.folder, prefix=f"{name}-"), *flags]],
                cwd=ROOT,
                env={**os.environ, **(env or {}), "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(num_processes)
        ]
        try:
            yield Contender(name, processes)
        finally:
            for process in processes:
                process.communicate()  # at the end of its input it leaves

    def launch(self, config_file: str, num_batches: int = 1) -> Launch:
        """Run a whole job, so many batches by each of two processes."""
        output = self.folder / "dataset"
        shutil.rmtree(output, ignore_errors=True)
        num_images = 2 * self.batch_size * num_batches
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"accelerate_configs/{config_file}", "--num_processes", 2]
        command += ["--num_cpu_threads_per_process", 1, "batch_generate.py", "--device", "cpu", "--user_ids", 1]
        command += [*model_flags(self.checkpoint), "--output_dir", output, "--mixed_precision", self.precision]
        command += ["--num_inference_steps", self.num_inference_steps, "--batch_size", self.batch_size]
        command += ["--num_images_per_user", num_images]
        started = time.time()
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.time() - started
        if done.returncode:
            sys.exit(done.stderr)
        first = min(path.stat().st_mtime for path in output.glob("user_01/*.png"))
        return Launch(num_images, seconds, first - started)


def launches(bench: Bench) -> dict[str, Launch]:
    """Run whole jobs."""
    jobs = {"eager": "cpu.yaml", "compiled, cold cache": "cpu_compiled.yaml"}
    results = {}
    for name, config_file in jobs.items():
        results[name] = bench.launch(config_file)
        print(f"job, {name}: {results[name].seconds:.0f} s", file=sys.stderr, flush=True)
    return results


def take_turns(bench: Bench, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Let each contender compute a batch a round: images per second, and the seconds of a first batch before."""
    with ExitStack() as stack:
        original = stack.enter_context(replace(bench, precision="no").contender("original", batch_size=1))
        pipeline = stack.enter_context(bench.contender("pipeline", batch_size=bench.pipeline_batch_size))
        job = stack.enter_context(bench.contender("job", num_processes=2))
        compiled = stack.enter_context(bench.contender("job", num_processes=2, env=COMPILED))
        first_batch = {}
        for name, contender in {ORIGINAL: original, PIPELINE: pipeline, JOB: job, JOB_COMPILED: compiled}.items():
            started = time.perf_counter()
            contender.compute()
            first_batch[name] = time.perf_counter() - started
        turns = {
            ORIGINAL: original.compute,
            PIPELINE: pipeline.compute,
            JOB: job.compute,
            FLOOR: lambda: job.compute("floor"),
            JOB_COMPILED: compiled.compute,
            FLOOR_COMPILED: lambda: compiled.compute("floor"),
            ONE_PROCESS: lambda: job.compute(num_processes=1),
        }
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(rounds):
            for name, turn in turns.items():
                rates[name].append(turn()[0])
            of_round = ", ".join(f"{name} {1 / rates[name][-1]:.2f}" for name in turns)
            print(f"round {number + 1} of {rounds}, s an image: {of_round}", file=sys.stderr, flush=True)
    return rates, first_batch


def tables(
    whole: Mapping[str, Launch],
    rates: Mapping[str, Sequence[float]],
    first_batch: Mapping[str, float],
    precision: str,
) -> str:
    """Make Markdown tables, of medians, and say which targets they meet."""
    steady = {name: statistics.median(of) for name, of in rates.items()}
    lines = [f"| precision {precision} | s an image | x original | x pipeline |", "|---|---|---|---|"]
    for name, rate in steady.items():
        lines.append(f"| {name} | {1 / rate:.2f} | {rate / steady[ORIGINAL]:.2f} | {rate / steady[PIPELINE]:.2f} |")
    lines += ["", "| whole job | images | seconds | to the first image |", "|---|---|---|---|"]
    for name, job in whole.items():
        lines.append(f"| {name} | {job.num_images} | {job.seconds:.0f} | {job.seconds_to_first_image:.0f} |")
    lines.append(f"\nLoading, and the first batch of a compiled process, warm cache: {first_batch[JOB_COMPILED]:.0f} s")
    for of_precision, name, against, at_least in TARGETS:
        if of_precision == precision:
            ratio = steady[name] / steady[against]
            verdict = "met" if ratio >= at_least else "MISSED"
            lines.append(f"\n{name} : {against} = {ratio:.3f}, target {at_least}: {verdict}")
    return "\n".join(lines)


def by_batch_size(bench: Bench, batch_sizes: Sequence[int], rounds: int) -> None:
    """Print rate and memory by batch size, of two processes that take turns with those of other sizes."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(bench.contender("job", 2, batch_size=size)) for size in batch_sizes]
        found = [[job.compute()] for job in jobs]
        for _ in range(rounds):
            for job, of in zip(jobs, found, strict=True):
                of.append(job.compute())
    print("| batch size | s an image | peak memory of a process, MiB |\n|---|---|---|")
    for size, of in zip(batch_sizes, found, strict=True):
        rate = statistics.median(rate for rate, _ in of[1:])
        print(f"| {size} | {1 / rate:.2f} | {max(peak for _, peak in of):.0f} |", flush=True)


def scaling(bench: Bench, rounds: int) -> None:
    """Print how much more two processes make than one: of the job, and of its passes alone, which share nothing."""
    turns = {"job": "batch", "its passes alone": "floor"}
    ratios: dict[str, list[float]] = {name: [] for name in turns}
    with bench.contender("job", num_processes=2) as job:
        job.compute()
        for _ in range(rounds):
            for name, command in turns.items():
                alone, both, alone_again = (job.compute(command, number)[0] for number in (1, 2, 1))
                ratios[name].append(2 * both / (alone + alone_again))
    print("| two processes of one thread : one | median | of the rounds |\n|---|---|---|")
    for name, of in ratios.items():
        print(f"| {name} | {statistics.median(of):.2f} | {' '.join(f'{ratio:.2f}' for ratio in sorted(of))} |")


def has_bf16() -> bool:
    """Whether this CPU computes in bf16; one that converts to and fro takes ten times as long."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001


def main() -> None:
    """Measure, print the tables, write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="medians of more are steadier")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=2, help="of the job's passes")
    parser.add_argument("--pipeline_batch_size", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["no", *(["bf16"] if has_bf16() else [])])
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="measure these instead")
    parser.add_argument("--scaling", action="store_true", help="measure two processes against one instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    print(
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "checkpoint")
        for precision in args.precisions:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{precision}")  # cold at first
            bench = Bench(folder, precision, args.num_inference_steps, args.batch_size, args.pipeline_batch_size)
            if args.batch_sizes:
                by_batch_size(bench, args.batch_sizes, args.rounds)
                continue
            if args.scaling:
                scaling(bench, args.rounds)
                continue
            whole = launches(bench)
            rates, first_batch = take_turns(bench, args.rounds)
            print(f"\n{tables(whole, rates, first_batch, precision)}\n", flush=True)
            results[precision] = {
                "whole": {name: asdict(job) for name, job in whole.items()},
                "rates": rates,
                "first_batch": first_batch,
            }
    if "bf16" not in args.precisions:
        print("bf16 was left out: this CPU has no instructions for it; --precisions bf16 measures it all the same")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
