"""Whether the job is right on a GPU, and how fast: parts in processes of their own, each with a limit; one table last.

bash benchmarks/gpu.sh           # says what it needs
python -m benchmarks.gpu --parts parity speed
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import accelerate
import diffusers
import torch

from benchmarks import gpu_checks, gpu_speed
from benchmarks.throughput import ROOT

PARTS = {**gpu_checks.PARTS, **gpu_speed.PARTS}
TOGETHER = [  # so that they do not disturb each other's times; what checks bytes may
    ["parity", "neighbours", "processes"],
    ["writer"],
    ["speed"],
    ["profile"],
    ["large"],
]


def run_together(names: Sequence[str], folder: Path, deadline: float, *, smoke: bool) -> list[list[str]]:
    """Run parts at once, and give their rows; a part that fails, or is not done in time, has a row that says so."""
    processes = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--folder", str(folder)]
        log = open(folder / f"{name}.log", "w")  # noqa: SIM115 - the process's
        options = ["--smoke"] * smoke
        processes[name] = subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    rows = []
    try:
        for name, process in processes.items():
            rows += _rows(name, process, folder, deadline)
    finally:
        for process in processes.values():
            gpu_checks.end_group(process)
    return rows


def _rows(name: str, process: subprocess.Popen[bytes], folder: Path, deadline: float) -> list[list[str]]:
    path = folder / f"{name}.json"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        ending = "was not done in time"
    else:
        ending = process.returncode and f"ended with status {process.returncode}: {_last_line(folder / f'{name}.log')}"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [*rows, [name, ending, "", "MISSED"]] if ending else rows


def _last_line(log: Path) -> str:
    """Give the end of a log, and show a little more of it."""
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    sys.stderr.write("\n".join([f"--- {log.name}", *lines[-30:], ""]))
    return lines[-1][:160]


def _run_part(name: str, folder: Path, *, smoke: bool) -> None:
    with open(folder / f"{name}.json", "w") as file:
        for row in PARTS[name](gpu_checks.Setting(folder, "cpu" if smoke else "cuda", smoke)):
            print(json.dumps(row), file=file, flush=True)


def main() -> None:
    """Run the parts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=470, help="for all parts; what does not fit is left out")
    parser.add_argument("--smoke", action="store_true", help="small models, on the CPU: does it run?")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        _run_part(args.part, args.folder, smoke=args.smoke)
        return
    if not (args.smoke or torch.cuda.is_available()):
        parser.exit(2, "no CUDA device is available here; --smoke shows on a CPU that everything runs\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no part is left behind
    deadline, rows = time.monotonic() + args.seconds, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        gpu_checks.Setting(folder, "cpu", args.smoke).make_checkpoint()
        for names in ([name for name in names if name in args.parts] for names in TOGETHER):
            started = time.monotonic()
            rows += run_together(names, folder, deadline, smoke=args.smoke)
            print(f"{', '.join(names) or 'nothing'}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, accelerate {accelerate.__version__}"
    print(f"\n{card}, {versions}\n\n| what | found | target | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
