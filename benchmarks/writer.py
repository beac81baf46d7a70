"""What encoding and writing alone sustain, with an instant model: images a second by size, PNG level and threads.

python -m benchmarks.writer
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset.atomic import publish
from userdiff.dataset.png import encode_png
from userdiff.job.worker import WriterPool

TEXT = {"userdiff_run": "0" * 64, "user_id": "1", "image_index": "0", "seed": "0"}
LEVELS = (1, 3, 6, 9)


def spectrogram(side: int) -> NDArray[np.uint8]:
    """Draw something as hard to compress as what a model makes: smooth, coloured, with a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.cos(2 * np.pi * (fx * x + fy * y)) for fx, fy in ((2, 1), (5, 3), (1, 7))]
    image = np.stack(waves, axis=-1) * 90 + 128 + rng.normal(0, 3, (side, side, 3))
    return image.clip(0, 255).astype(np.uint8)


def rate(folder: Path, pixels: NDArray[np.uint8], level: int, threads: int, number: int) -> float:
    """Images per second through the job's own pool, encoder and publication."""

    def save(index: int) -> None:
        publish(folder / f"{index}.png", encode_png(pixels, TEXT, level))

    started = time.perf_counter()
    with WriterPool(threads, 32) as pool:
        for index in range(number):
            pool.submit(partial(save, index))
    return number / (time.perf_counter() - started)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--number", type=int, default=500, help="images of a measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores; images a second, medians of {args.rounds}\n")
    print("| side | level | KiB an image | " + " | ".join(f"{n} threads" for n in args.threads) + " |")
    print("|---" * (3 + len(args.threads)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for side in (128, 256):
            pixels = spectrogram(side)
            rates = {(level, n): [] for level in LEVELS for n in args.threads}
            for _ in range(args.rounds):
                for (level, threads), of in rates.items():
                    of.append(rate(Path(folder), pixels, level, threads, args.number))
            for level in LEVELS:
                size = len(encode_png(pixels, TEXT, level)) / 1024
                medians = " | ".join(f"{statistics.median(rates[level, n]):.0f}" for n in args.threads)
                print(f"| {side} | {level} | {size:.1f} | {medians} |", flush=True)


if __name__ == "__main__":
    main()
