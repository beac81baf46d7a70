"""Where the time of a job goes that is neither a UNet nor a VAE pass: one process, all of its calls timed.

    python -m benchmarks.overhead --threads 1

The share of the passes is what a job reaches of its floor, free of the machine's moods: both come from one run.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from benchmarks.checkpoint import make_checkpoint, model_flags
from userdiff.cli import generate
from userdiff.diffusion import sampler as sampling
from userdiff.job import run as runner
from userdiff.job.store import Coordinator
from userdiff.job.worker import WriterPool

TIMED = {
    "UNet passes": (UNet2DConditionModel, "forward"),
    "VAE passes": (AutoencoderKL, "decode"),
    "scheduler steps": (DDIMScheduler, "step"),
    "drawing noise": (sampling, "initial_latents"),
    "pixels to uint8": (sampling, "to_uint8"),
    "claiming batches": (Coordinator, "next_batch"),
    "handing images to the writers": (WriterPool, "submit"),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_batches", type=int, default=3)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*values, **options)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as patches:
        folder = Path(temporary)
        make_checkpoint(folder)
        for name, (owner, attribute) in {**TIMED, "all": (runner, "make_images")}.items():
            patches.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        log = patches.enter_context(open(folder / "log", "w"))
        with redirect_stdout(log), redirect_stderr(log):
            flags = [*model_flags(folder), "--output_dir", str(folder / "out"), "--batch_size", str(args.batch_size)]
            flags += ["--user_ids", "1", "--num_images_per_user", str(args.batch_size * args.num_batches)]
            status = generate([*flags, "--num_inference_steps", str(args.num_inference_steps), "--device", "cpu"])
    if status:
        parser.exit(1, f"the job ended with status {status}\n")
    print(
        f"{args.num_batches} batches of {args.batch_size}, {args.num_inference_steps} steps, {args.threads} threads\n"
    )
    print("| part of the loop | seconds | share |\n|---|---|---|")
    whole = spent.pop("all")
    spent["all the rest"] = whole - sum(spent.values())
    for name, seconds in spent.most_common():
        print(f"| {name} | {seconds:.3f} | {seconds / whole:.2%} |")


if __name__ == "__main__":
    main()
