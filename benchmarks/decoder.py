"""How many images the VAE best decodes at a time: rate and memory by the size of a part.

    python -m benchmarks.decoder --threads 1

The sizes take turns, so that each feels the same moods of the machine.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL

from benchmarks.checkpoint import LATENTS, make_checkpoint
from userdiff.diffusion import sampler as sampling


def resident_mebibytes(which: str) -> float:
    """Return the memory of this process: VmRSS is that of now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


@torch.inference_mode()
def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        vae = AutoencoderKL.from_pretrained(Path(folder) / "vae", torch_dtype=getattr(torch, args.dtype)).eval()
    vae.to(memory_format=torch.channels_last)
    sizes = sorted(args.at_once)
    latents = torch.randn(sizes[-1], 4, LATENTS, LATENTS).contiguous(memory_format=torch.channels_last)

    def seconds(at_once: int) -> float:
        with patch.dict(sampling.DECODED_AT_ONCE, cpu=at_once):
            started = time.perf_counter()
            sampling.decode(vae, latents)
            return (time.perf_counter() - started) / len(latents)

    peaks = {}
    for at_once in sizes:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident_mebibytes("VmRSS")
        seconds(at_once)
        peaks[at_once] = resident_mebibytes("VmHWM") - before
    samples = {at_once: [] for at_once in sizes}
    for _ in range(args.rounds):
        for at_once in sizes:
            samples[at_once].append(seconds(at_once))
    print(f"{len(latents)} images, {args.dtype}, {args.threads} threads, medians of {args.rounds} rounds\n")
    print("| at a time | milliseconds an image | from - to | memory above the model's, MiB |\n|---|---|---|---|")
    for at_once, found in samples.items():
        low, middle, high = (1000 * value for value in (min(found), statistics.median(found), max(found)))
        print(f"| {at_once} | {middle:.0f} | {low:.0f} - {high:.0f} | {peaks[at_once]:.0f} |")


if __name__ == "__main__":
    main()
