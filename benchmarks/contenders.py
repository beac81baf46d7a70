"""The job and what it is compared with, each in a process of its own that computes a batch whenever it is told to.

    echo batch | python -m benchmarks.contenders original CHECKPOINT OUTPUT

So that several can take turns without being loaded again. Every line on stdin is answered with one on stdout: "batch",
"floor", or "wait" for what a GPU still has to do.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.distributed import HashStore

from benchmarks.checkpoint import EMBED_DIM, LATENTS, NUM_USERS, model_flags
from userdiff import UserConditionEncoder, models, runner
from userdiff.acceleration import token_vectors
from userdiff.conditioning import load_condition_encoder
from userdiff.config import parse_args
from userdiff.coordination import Coordinator
from userdiff.loading import DTYPES, load_model
from userdiff.planning import make_plan
from userdiff.sampling import DECODED_AT_ONCE

_MOST_BATCHES = 1000


def _load(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, UserConditionEncoder, DDIMScheduler]:
    """Load as a script would that somebody writes for themselves."""
    unet = UNet2DConditionModel.from_pretrained(args.checkpoint / "unet", torch_dtype=dtype).eval().to(args.device)
    vae = AutoencoderKL.from_pretrained(args.checkpoint / "vae", torch_dtype=dtype).eval().to(args.device)
    encoder = load_condition_encoder(args.checkpoint, NUM_USERS, EMBED_DIM).to(args.device)
    return unet, vae, encoder, models.ddim_scheduler(models.load_noise_scheduler(None))


def original(args: argparse.Namespace) -> None:
    """Run the loop most projects begin with: an image at a time, in float32, saved before the next one starts."""
    unet, vae, encoder, scheduler = _load(args, torch.float32)

    @torch.no_grad()
    def one(number: int) -> None:
        condition = encoder(torch.tensor([number % NUM_USERS], device=args.device)).unsqueeze(1)
        latents = torch.randn(1, 4, LATENTS, LATENTS, device=args.device)
        scheduler.set_timesteps(args.num_inference_steps)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(unet(latents, timestep, condition).sample, timestep, latents).prev_sample
        image = vae.decode(latents / vae.config.scaling_factor).sample.clamp(0, 1)[0]
        pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).astype("uint8")
        Image.fromarray(pixels).save(args.output / f"generated_{number:03d}.png")

    for number, _ in enumerate(commands()):
        one(number)


def pipeline(args: argparse.Namespace) -> None:
    """Run what a user would pick instead: `StableDiffusionPipeline` with `prompt_embeds`, in batches, saving PNGs."""
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

    def batch(number: int) -> None:
        users = torch.arange(args.batch_size, device=args.device) % NUM_USERS
        with torch.no_grad():
            prompt_embeds = encoder(users).unsqueeze(1).to(unet.dtype)
        images = pipe(
            prompt_embeds=prompt_embeds,
            guidance_scale=1.0,
            num_inference_steps=args.num_inference_steps,
            height=4 * LATENTS,
            width=4 * LATENTS,
        ).images
        for row, image in enumerate(images):
            image.save(args.output / f"generated_{number}_{row}.png")

    for number, _ in enumerate(commands()):
        batch(number)


def job(args: argparse.Namespace) -> None:
    """Run the loop of one of the job's processes; for "floor", exactly its UNet and VAE calls, on the same models."""
    flags = [*model_flags(args.checkpoint), "--output_dir", str(args.output), "--batch_size", str(args.batch_size)]
    config = parse_args([*flags, "--num_inference_steps", str(args.num_inference_steps)])
    runner.set_kernels(allow_tf32=False)
    model = load_model(config, torch.device(args.device), args.mixed_precision, runner.compilation())
    size, at_once = args.batch_size, min(DECODED_AT_ONCE, args.batch_size)
    users = torch.arange(size, device=args.device) % NUM_USERS

    @torch.inference_mode()
    def floor() -> None:
        noise = torch.randn(size, 4, LATENTS, LATENTS, device=args.device).contiguous(memory_format=torch.channels_last)
        timesteps = 1000 - torch.arange(args.num_inference_steps, device=args.device)
        vectors = token_vectors(model.unet, model.condition_encoder(users).unsqueeze(1))
        for timestep in timesteps:
            model.unet(noise.to(model.unet.dtype), timestep, vectors, return_dict=False)
        for part in noise.to(model.vae.dtype).split(at_once):
            model.vae.decode(part, return_dict=False)

    plan = make_plan((1,), size * _MOST_BATCHES, size)
    (args.output / "user_01").mkdir(exist_ok=True)
    with _OnCommand(floor) as coordinator:
        runner.make_images(config, model, plan, coordinator, on_step=coordinator.check)


class _OnCommand(Coordinator):
    """Hands out a batch whenever one is asked for."""

    def __init__(self, floor: Callable[[], None]) -> None:
        super().__init__(HashStore, process_index=0, num_processes=1)
        self._floor = floor
        self._commands = commands()
        self._numbers = iter(range(_MOST_BATCHES))

    def next_batch(self) -> int:
        """Give the next one when the last is made; in between, run the floor as often as it is asked for."""
        for command in self._commands:
            if command == "batch":
                return next(self._numbers)
            self._floor()
        return _MOST_BATCHES


CONTENDERS = {"original": original, "pipeline": pipeline, "job": job}


def commands() -> Iterator[str]:
    """Give what is asked for on stdin; print how long it took, and the peak memory, when the next is wanted."""
    for command in sys.stdin:
        started = time.perf_counter()
        if command.strip() != "wait":
            yield command.strip()
        elif torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if torch.cuda.is_initialized():
            peak_mib = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib}), flush=True)


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    CONTENDERS[args.contender](args)


if __name__ == "__main__":
    main()
