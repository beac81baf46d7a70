"""Peak memory of a process by the number of its images, with an instant model: it should be flat.

python -m benchmarks.memory
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from userdiff import cli
from userdiff.diffusion import generate

SIDE = 128


def instant(config: object, model: object, items: list[object], on_step: object = None) -> generate.Batch:
    """Return a batch of noise."""
    pixels = torch.randint(0, 256, (len(items), SIDE, SIDE, 3), dtype=torch.uint8)
    finite = torch.ones(len(items), dtype=torch.bool)
    return generate.Batch(items=items, contradicts_range=torch.tensor(data=False), finite=finite, pixels=pixels)


def main() -> None:
    """Print a table, each row from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, help="of images: run as one of the processes")
    args = parser.parse_args()
    if args.number is None:
        print("| images | peak RSS, MiB |\n|---|---|", flush=True)
        for number in (200, 2_000, 20_000):
            subprocess.run([sys.executable, "-m", "benchmarks.memory", "--number", str(number)], check=True)
        return
    with tempfile.TemporaryDirectory() as folder, patch.object(generate, "start", instant):
        flags = ["--num_images_per_user", str(args.number // 10), "--output_dir", str(Path(folder) / "out")]
        with open(Path(folder) / "log", "w") as log, patch("sys.stdout", log), patch("sys.stderr", log):
            status = cli.generate([*flags, "--device", "cpu"])
    if status:
        sys.exit(f"the job ended with status {status}")
    print(f"| {args.number} | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
