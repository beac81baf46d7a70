"""How fast the job is on a GPU, and whether its images are right there: one part a call, a row as it is measured.

bash benchmarks/gpu.sh speed     # says what it needs
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import diffusers
import torch

from benchmarks import gpu_checks, gpu_speed, gpu_variants
from benchmarks.gpu_checks import KEPT, Setting

PARTS = {**gpu_speed.PARTS, **gpu_checks.PARTS, **gpu_variants.PARTS}


def main() -> None:
    """Run a part, and print its table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement of a rate")
    parser.add_argument("--smoke", action="store_true", help="small models, on the CPU: does it run?")
    args = parser.parse_args()
    if not (args.smoke or torch.cuda.is_available()):
        parser.exit(2, "no CUDA device is available here; --smoke shows on a CPU that everything runs\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    started = time.monotonic()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, accelerate {accelerate.__version__}"
    KEPT.mkdir(exist_ok=True)
    with open(KEPT / "results.md", "a") as file, tempfile.TemporaryDirectory() as temporary:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write(f"\n{args.part}: {card}, {versions}\n\n| what | found | target | |\n|---|---|---|---|")
        setting = Setting(
            Path(temporary), "cpu" if args.smoke else "cuda", args.smoke, 0 if args.smoke else args.seconds
        )
        for row in PARTS[args.part](setting):
            write(f"| {' | '.join(row)} |")
        print(f"\n{args.part}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
