"""The whole job against what a user would run instead, interleaved, on one checkpoint of the size in use.

    python -m benchmarks.throughput --json benchmarks/throughput.json

Medians over the rounds. `steady` leaves out start-up and each process's first batch; `whole run` is from the command to
its end, of a short job: in the first round compiled graphs come from a cold cache, in the others from a warm one.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.checkpoint import make_checkpoint, model_flags

ROOT = Path(__file__).parent.parent
CPU, CPU_COMPILED = "cpu.yaml", "cpu_compiled.yaml"
COMPILE = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False"}


@dataclass
class Contender:
    """One row of the table."""

    name: str
    run: Callable[[], tuple[float, float | None]]
    """Gives images per second: steady, and of the whole run."""
    steady: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Run once, and note the rates."""
        steady, whole = self.run()
        self.steady.append(steady)
        if whole is not None:
            self.whole.append(whole)
        print(f"  {self.name}: {1 / steady:.2f} s an image", file=sys.stderr, flush=True)


def has_bf16() -> bool:
    """Whether this CPU computes in bf16; one that converts to and fro takes ten times as long."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001


class Bench:
    """The commands, all on one checkpoint, with the same precision, steps and cores."""

    def __init__(self, args: argparse.Namespace, folder: Path, precision: str) -> None:
        self.args, self.folder, self.precision = args, folder, precision
        self.checkpoint = folder / "checkpoint"

    def alone(
        self, contender: str, *, num_processes: int = 1, threads: int, batch_size: int, num_batches: int, **env: str
    ) -> float:
        """Run a contender in so many processes at once; images per second of all, without each one's first batch."""
        command = [sys.executable, "-m", "benchmarks.contenders", contender, self.checkpoint]
        flags = ["--batch_size", batch_size, "--num_batches", num_batches, "--mixed_precision", self.precision]
        flags += ["--num_inference_steps", self.args.num_inference_steps]
        processes = [
            subprocess.Popen(
                [*map(str, [*command, self.folder / f"{contender}-{number}", *flags])],
                cwd=ROOT,
                env={**os.environ, **env, "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(num_processes)
        ]
        outputs = [process.communicate() for process in processes]
        for process, (_, stderr) in zip(processes, outputs, strict=True):
            if process.returncode:
                sys.exit(f"{contender} failed:\n{stderr}")
        return sum(batch_size / statistics.median(json.loads(stdout)[1:]) for stdout, _ in outputs)

    def job(self, config_file: str, num_processes: int = 2) -> tuple[float, float]:
        """Run the whole job as the README says; images per second: steady, and from the command to its end."""
        output = self.folder / "dataset"
        shutil.rmtree(output, ignore_errors=True)
        size, num_batches = self.args.batch_size, self.args.num_batches * num_processes
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"accelerate_configs/{config_file}", "--num_processes", str(num_processes)]
        command += ["--num_cpu_threads_per_process", "1", "batch_generate.py", "--device", "cpu"]
        command += [*model_flags(self.checkpoint), "--output_dir", str(output), "--mixed_precision", self.precision]
        command += ["--num_inference_steps", str(self.args.num_inference_steps), "--batch_size", str(size)]
        command += ["--user_ids", "1", "--num_images_per_user", str(size * num_batches)]
        started = time.time()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        whole = size * num_batches / (time.time() - started)
        if done.returncode:
            sys.exit(done.stderr)
        written = sorted(path.stat().st_mtime for path in output.glob("user_01/*.png"))
        first = size * num_processes  # each process's first batch
        return (len(written) - first) / (written[-1] - written[first - 1]), whole


def contenders(bench: Bench, plain: Bench) -> list[Contender]:
    """Say what is compared; the original loop is always in float32."""
    args, cores = bench.args, os.cpu_count() or 1
    batch = {"batch_size": args.batch_size, "num_batches": args.num_batches}
    pipeline = {**batch, "batch_size": args.pipeline_batch_size}
    single = {"batch_size": 1, "num_batches": 3}
    return [
        Contender("(a) original loop, float32", lambda: (plain.alone("original", threads=cores, **single), None)),
        Contender("(b) StableDiffusionPipeline", lambda: (bench.alone("pipeline", threads=cores, **pipeline), None)),
        Contender("(c) job, eager", lambda: bench.job(CPU)),
        Contender("(d) floor, eager", lambda: (bench.alone("floor", num_processes=2, threads=1, **batch), None)),
        Contender("(c) job, compiled", lambda: bench.job(CPU_COMPILED)),
        Contender(
            "(d) floor, compiled",
            lambda: (bench.alone("floor", num_processes=2, threads=1, **batch, **COMPILE), None),
        ),
        Contender("job, eager, one process of one thread", lambda: bench.job(CPU, 1)),
    ]


TARGETS = [  # (precision, of, against, at least)
    ("no", "(c) job, compiled", "(a) original loop, float32", 1.45),
    ("no", "(c) job, compiled", "(b) StableDiffusionPipeline", 1.2),
    ("bf16", "(c) job, compiled", "(a) original loop, float32", 5.0),
    ("bf16", "(c) job, compiled", "(b) StableDiffusionPipeline", 1.6),
    ("no", "(c) job, eager", "(d) floor, eager", 0.97),
    ("no", "(c) job, compiled", "(d) floor, compiled", 0.97),
    ("no", "(c) job, eager", "job, eager, one process of one thread", 1.9),
]


def table(rows: Sequence[Contender], precision: str) -> str:
    """Make a Markdown table of the medians, each with its ratio to the original loop and to the pipeline."""
    steady = {row.name: statistics.median(row.steady) for row in rows}
    original, pipeline = steady["(a) original loop, float32"], steady["(b) StableDiffusionPipeline"]
    lines = [
        f"| precision {precision}; seconds an image | steady | whole run, cold | whole run, warm | x original | x pipeline |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = steady[row.name]
        first, later = (f"{1 / statistics.median(of):.2f}" if of else "" for of in (row.whole[:1], row.whole[1:]))
        lines.append(
            f"| {row.name} | {1 / rate:.2f} | {first} | {later} | {rate / original:.2f} | {rate / pipeline:.2f} |"
        )
    for of_precision, of, against, at_least in TARGETS:
        if of_precision == precision:
            ratio = steady[of] / steady[against]
            lines.append(
                f"\n{of} : {against} = {ratio:.2f}, target {at_least}, {'met' if ratio >= at_least else 'MISSED'}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="of the job and its floor")
    parser.add_argument("--pipeline_batch_size", type=int, default=4)
    parser.add_argument("--num_batches", type=int, default=2, help="of each process; the first is not counted")
    parser.add_argument("--precisions", nargs="+", default=["no", *(["bf16"] if has_bf16() else [])])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "checkpoint")
        for precision in args.precisions:
            rows = contenders(Bench(args, folder, precision), Bench(args, folder, "no"))
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{precision}")  # cold in the first round
            for number in range(args.rounds):
                print(f"{precision}, round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
                for row in rows:
                    row.measure()
            print(
                f"\n{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, torch {torch.__version__}\n\n{table(rows, precision)}\n",
                flush=True,
            )
            results[precision] = {row.name: {"steady": row.steady, "whole": row.whole} for row in rows}
    if not has_bf16():
        print("bf16 was left out: this CPU has no instructions for it")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
