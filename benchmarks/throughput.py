"""The whole job against what a user would run instead, interleaved, on one checkpoint of the size in use.

    python -m benchmarks.throughput --json benchmarks/throughput.json
    python -m benchmarks.throughput --batch_sizes 1 2 4 8 16      # rate and memory by batch size instead

`steady` leaves out start-up and each process's first batch; `whole run` is from the command to its end, of a short job:
in the first round compiled graphs come from a cold cache, in the others from a warm one. Medians over the rounds.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.checkpoint import make_checkpoint, model_flags

ROOT = Path(__file__).parent.parent
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False"}
ORIGINAL, PIPELINE = "(a) original loop, float32", "(b) StableDiffusionPipeline"
JOB, JOB_COMPILED = "(c) job", "(c) job, compiled"
FLOOR, FLOOR_COMPILED = "(d) floor", "(d) floor, compiled"
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
class Sample:
    """One run of one contender."""

    steady: float  # images per second
    whole: float | None = None  # images per second
    peak_mib: float | None = None  # of its largest process


@dataclass(frozen=True)
class Bench:
    """The commands, all on one checkpoint, with the same precision, steps and cores."""

    folder: Path
    precision: str
    num_inference_steps: int
    batch_size: int
    num_batches: int  # of each process

    @property
    def checkpoint(self) -> Path:
        """Where it lies."""
        return self.folder / "checkpoint"

    def alone(self, contender: str, env: Mapping[str, str] | None = None, *, num_processes: int = 1) -> Sample:
        """Run a contender in so many processes at once, which share the cores."""
        command = [sys.executable, "-m", "benchmarks.contenders", contender, self.checkpoint]
        flags = ["--batch_size", self.batch_size, "--num_batches", self.num_batches]
        flags += ["--mixed_precision", self.precision, "--num_inference_steps", self.num_inference_steps]
        threads = max(1, (os.cpu_count() or 1) // num_processes)
        processes = [
            subprocess.Popen(
                [str(part) for part in [*command, self.folder / f"{contender}-{number}", *flags]],
                cwd=ROOT,
                env={**os.environ, **(env or {}), "OMP_NUM_THREADS": str(threads)},
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
        results = [json.loads(stdout) for stdout, _ in outputs]
        steady = sum(self.batch_size / statistics.median(result["seconds"][1:]) for result in results)
        return Sample(steady, peak_mib=max(result["peak_mib"] for result in results))

    def job(self, config_file: str, num_processes: int = 2) -> Sample:
        """Run the whole job as the README says, a core for each process."""
        output = self.folder / "dataset"
        shutil.rmtree(output, ignore_errors=True)
        num_images = self.batch_size * self.num_batches * num_processes
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"accelerate_configs/{config_file}", "--num_processes", num_processes]
        command += ["--num_cpu_threads_per_process", 1, "batch_generate.py", "--device", "cpu", "--user_ids", 1]
        command += [*model_flags(self.checkpoint), "--output_dir", output, "--mixed_precision", self.precision]
        command += ["--num_inference_steps", self.num_inference_steps, "--batch_size", self.batch_size]
        command += ["--num_images_per_user", num_images]
        started = time.time()
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
        whole = num_images / (time.time() - started)
        if done.returncode:
            sys.exit(done.stderr)
        written = sorted(path.stat().st_mtime for path in output.glob("user_01/*.png"))
        first = self.batch_size * num_processes  # each process's first batch
        return Sample((num_images - first) / (written[-1] - written[first - 1]), whole)


def contenders(bench: Bench) -> dict[str, Callable[[], Sample]]:
    """Say what is compared; the original loop is always in float32, an image at a time."""
    original = Bench(bench.folder, "no", bench.num_inference_steps, batch_size=1, num_batches=3)
    return {
        ORIGINAL: lambda: original.alone("original"),
        PIPELINE: lambda: bench.alone("pipeline"),
        JOB: lambda: bench.job("cpu.yaml"),
        FLOOR: lambda: bench.alone("floor", num_processes=2),
        JOB_COMPILED: lambda: bench.job("cpu_compiled.yaml"),
        FLOOR_COMPILED: lambda: bench.alone("floor", COMPILED, num_processes=2),
        ONE_PROCESS: lambda: bench.job("cpu.yaml", num_processes=1),
    }


def compare(bench: Bench, rounds: int) -> dict[str, list[Sample]]:
    """Run every contender in turn, as many times as there are rounds."""
    runs = contenders(bench)
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.folder / f"inductor-{bench.precision}")  # cold in the first round
    for number in range(rounds):
        print(f"precision {bench.precision}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, run in runs.items():
            samples[name].append(run())
            print(f"  {name}: {1 / samples[name][-1].steady:.2f} s an image", file=sys.stderr, flush=True)
    return samples


def table(samples: Mapping[str, Sequence[Sample]], precision: str) -> str:
    """Make a Markdown table of the medians, and say which targets they meet."""
    steady = {name: statistics.median(sample.steady for sample in of) for name, of in samples.items()}
    lines = [
        f"| precision {precision}; seconds an image | steady | whole run, cold | whole run, warm | x original | x pipeline |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in samples.items():
        whole = [sample.whole for sample in of if sample.whole]
        cold, warm = (f"{1 / statistics.median(part):.2f}" if part else "" for part in (whole[:1], whole[1:]))
        ratios = f"{steady[name] / steady[ORIGINAL]:.2f} | {steady[name] / steady[PIPELINE]:.2f}"
        lines.append(f"| {name} | {1 / steady[name]:.2f} | {cold} | {warm} | {ratios} |")
    for of_precision, name, against, at_least in TARGETS:
        if of_precision == precision:
            ratio = steady[name] / steady[against]
            verdict = "met" if ratio >= at_least else "MISSED"
            lines.append(f"\n{name} : {against} = {ratio:.2f}, target {at_least}: {verdict}")
    return "\n".join(lines)


def by_batch_size(folder: Path, args: argparse.Namespace) -> None:
    """Print rate and memory of the floor, two processes, by batch size."""
    print("| batch size | s an image | peak memory of a process, MiB |\n|---|---|---|")
    for size in args.batch_sizes:
        bench = Bench(folder, args.precisions[0], args.num_inference_steps, size, args.num_batches)
        sample = bench.alone("floor", num_processes=2)
        print(f"| {size} | {1 / sample.steady:.2f} | {sample.peak_mib:.0f} |", flush=True)


def has_bf16() -> bool:
    """Whether this CPU computes in bf16; one that converts to and fro takes ten times as long."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001


def main() -> None:
    """Measure, print the tables, write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="medians of more are steadier")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="of the job, its floor and the pipeline")
    parser.add_argument("--num_batches", type=int, default=2, help="of each process; the first is not counted")
    parser.add_argument("--precisions", nargs="+", default=["no", *(["bf16"] if has_bf16() else [])])
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="measure these instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    print(
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "checkpoint")
        if args.batch_sizes:
            return by_batch_size(folder, args)
        for precision in args.precisions:
            samples = compare(
                Bench(folder, precision, args.num_inference_steps, args.batch_size, args.num_batches), args.rounds
            )
            print(f"\n{table(samples, precision)}\n", flush=True)
            results[precision] = {name: [asdict(sample) for sample in of] for name, of in samples.items()}
    if "bf16" not in args.precisions:
        print("bf16 was left out: this CPU has no instructions for it; --precisions bf16 measures it all the same")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
