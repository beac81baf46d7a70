"""The job and what it is compared with, each in a process of its own that works for a while whenever it is told to.

    echo work 20 | python -m benchmarks.contenders original CHECKPOINT OUTPUT

So that several can take turns without being loaded again. `work SECONDS` begins batches for so long, one at least, and
is answered when every image of them is published; `floor SECONDS` runs the job's bare passes instead.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.distributed import HashStore

from benchmarks.checkpoint import EMBED_DIM, LATENTS, NUM_USERS, model_flags
from userdiff import UserConditionEncoder
from userdiff.config import DEFAULT_COMPRESS_LEVEL, parse_args
from userdiff.diffusion.acceleration import memory_format, token_vectors
from userdiff.diffusion.conditioning import load_condition_encoder
from userdiff.diffusion.model import DTYPES, load_model
from userdiff.diffusion.sampler import DECODED_AT_ONCE
from userdiff.diffusion.schedule import ddim_scheduler, load_noise_scheduler
from userdiff.job import run as runner
from userdiff.job.plan import make_plan
from userdiff.job.store import Coordinator

_MOST_BATCHES = 10000

Commands = dict[str, Callable[[float], int]]
"""What can be asked for, each given a deadline: makes batches until then, one at least, and gives the number of images."""


def until(deadline: float, batch: Callable[[], int]) -> int:
    """Repeat a batch, once at least; gives the number of images."""
    number = batch()
    while time.monotonic() < deadline:
        number += batch()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return number


def _load(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, UserConditionEncoder, DDIMScheduler]:
    """Load as a script would that somebody writes for themselves."""
    unet = UNet2DConditionModel.from_pretrained(args.checkpoint / "unet", torch_dtype=dtype).eval().to(args.device)
    vae = AutoencoderKL.from_pretrained(args.checkpoint / "vae", torch_dtype=dtype).eval().to(args.device)
    encoder = load_condition_encoder(args.checkpoint, NUM_USERS, EMBED_DIM).to(args.device)
    return unet, vae, encoder, ddim_scheduler(load_noise_scheduler(None))


def original(args: argparse.Namespace) -> Commands:
    """Run the loop most projects begin with: an image at a time, in float32, saved before the next one starts."""
    unet, vae, encoder, scheduler = _load(args, torch.float32)

    @torch.no_grad()
    def one() -> int:
        condition = encoder(torch.tensor([0], device=args.device)).unsqueeze(1)
        latents = torch.randn(1, 4, LATENTS, LATENTS, device=args.device)
        scheduler.set_timesteps(args.num_inference_steps)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(unet(latents, timestep, condition).sample, timestep, latents).prev_sample
        image = vae.decode(latents / vae.config.scaling_factor).sample.clamp(0, 1)[0]
        pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).astype("uint8")
        Image.fromarray(pixels).save(args.output / "generated.png")
        return 1

    return {"work": lambda deadline: until(deadline, one)}


def pipeline(args: argparse.Namespace) -> Commands:
    """Run what a user would pick instead: `StableDiffusionPipeline` with `prompt_embeds`, in batches, saving PNGs.

    `unsaved` leaves out the saving; the images are on the host all the same.
    """
    unet, vae, encoder, scheduler = _load(args, DTYPES[args.mixed_precision])
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def batch() -> list[Image.Image]:
        users = torch.arange(args.batch_size, device=args.device) % NUM_USERS
        with torch.no_grad():
            prompt_embeds = encoder(users).unsqueeze(1).to(unet.dtype)
        images: list[Image.Image] = pipe(
            prompt_embeds=prompt_embeds,
            guidance_scale=1.0,
            num_inference_steps=args.num_inference_steps,
            height=4 * LATENTS,
            width=4 * LATENTS,
        ).images
        return images

    def saved() -> int:
        images = batch()
        for row, image in enumerate(images):
            image.save(args.output / f"generated_{row}.png")
        return len(images)

    return {
        "work": lambda deadline: until(deadline, saved),
        "unsaved": lambda deadline: until(deadline, lambda: len(batch())),
    }


def job(args: argparse.Namespace) -> Commands:
    """Run the loop of one of the job's processes; for "floor", exactly its UNet and VAE calls, on the same models."""
    flags = [*model_flags(args.checkpoint), "--output_dir", str(args.output), "--batch_size", str(args.batch_size)]
    flags += ["--png_compress_level", str(args.png_compress_level)]
    config = parse_args([*flags, "--num_inference_steps", str(args.num_inference_steps)])
    runner.set_kernels(allow_tf32=False)
    model = load_model(config, torch.device(args.device), args.mixed_precision, runner.compilation())
    layout = memory_format(model.device, runner.compilation())
    size = args.batch_size
    at_once = min(DECODED_AT_ONCE[args.device], size)
    users = torch.arange(size, device=args.device) % NUM_USERS
    dtypes = [next(module.parameters()).dtype for module in (model.unet, model.vae)]
    plan = make_plan((1,), size * _MOST_BATCHES, size)
    (args.output / "user_01").mkdir(exist_ok=True)

    @torch.inference_mode()
    def passes() -> int:
        noise = torch.randn(size, 4, LATENTS, LATENTS, device=args.device).contiguous(memory_format=layout)
        timesteps = 999 - torch.arange(args.num_inference_steps, device=args.device)
        vectors = token_vectors(model.unet, model.condition_encoder(users).unsqueeze(1)).to(dtypes[0])
        for timestep in timesteps:
            model.unet(noise.to(dtypes[0]), timestep, vectors, return_dict=False)
        for part in noise.to(dtypes[1]).split(at_once):
            model.vae.decode(part, return_dict=False)
        return size

    def work(deadline: float) -> int:
        with _Until(deadline) as coordinator:
            runner.make_images(
                config, model, plan, coordinator, compress_level=args.png_compress_level, on_step=coordinator.check
            )
            return coordinator.published()[0]

    return {"work": work, "floor": lambda deadline: until(deadline, passes)}


class _Until(Coordinator):
    """Hands out batches until a deadline, one at least."""

    def __init__(self, deadline: float) -> None:
        super().__init__(HashStore, process_index=0, num_processes=1)
        self._deadline = deadline

    def next_batch(self) -> int:
        """Return the next one."""
        number = super().next_batch()
        return number if number == 0 or time.monotonic() < self._deadline else _MOST_BATCHES


CONTENDERS = {"original": original, "pipeline": pipeline, "job": job}


def serve(commands: Commands) -> None:
    """Do what is asked for on stdin, and print how many images it made, how long it took, and the peak memory."""
    for line in sys.stdin:
        command, seconds = line.split()
        started = time.monotonic()
        num_images = commands[command](started + float(seconds))
        took = time.monotonic() - started
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if torch.cuda.is_initialized():
            peak_mib = torch.cuda.max_memory_reserved() / 2**20
        print(json.dumps({"num_images": num_images, "seconds": took, "peak_mib": peak_mib}), flush=True)


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--png_compress_level", type=int, default=DEFAULT_COMPRESS_LEVEL)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    serve(CONTENDERS[args.contender](args))


if __name__ == "__main__":
    main()
