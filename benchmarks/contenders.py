"""What the job is compared with, each in a process of its own: prints the seconds of each batch and the peak memory.

python -m benchmarks.contenders original CHECKPOINT OUTPUT --num_batches 3
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from benchmarks.checkpoint import EMBED_DIM, LATENTS, NUM_USERS, model_flags
from userdiff import UserConditionEncoder, models, runner
from userdiff.acceleration import token_vectors
from userdiff.conditioning import load_condition_encoder
from userdiff.config import parse_args
from userdiff.loading import DTYPES, load_model
from userdiff.sampling import DECODED_AT_ONCE

Batches = Iterator[Callable[[], object]]


def _load(
    checkpoint: Path, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, UserConditionEncoder, DDIMScheduler]:
    """Load as a script would that somebody writes for themselves."""
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=dtype).eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=dtype).eval()
    encoder = load_condition_encoder(checkpoint, NUM_USERS, EMBED_DIM)
    return unet, vae, encoder, models.ddim_scheduler(models.load_noise_scheduler(None))


def original(args: argparse.Namespace) -> Batches:
    """Run the loop most projects begin with: an image at a time, in float32, saved before the next one starts."""
    unet, vae, encoder, scheduler = _load(args.checkpoint, torch.float32)

    @torch.no_grad()
    def one(number: int) -> None:
        condition = encoder(torch.tensor([number % NUM_USERS])).unsqueeze(1)
        latents = torch.randn(1, 4, LATENTS, LATENTS)
        scheduler.set_timesteps(args.num_inference_steps)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(unet(latents, timestep, condition).sample, timestep, latents).prev_sample
        image = vae.decode(latents / vae.config.scaling_factor).sample.clamp(0, 1)[0]
        pixels = (image.permute(1, 2, 0).numpy() * 255).astype("uint8")
        Image.fromarray(pixels).save(args.output / f"generated_{number:03d}.png")

    return ((lambda number=number: one(number)) for number in range(args.num_batches))


def pipeline(args: argparse.Namespace) -> Batches:
    """Run what a user would pick instead: `StableDiffusionPipeline` with `prompt_embeds`, in batches, saving PNGs."""
    unet, vae, encoder, scheduler = _load(args.checkpoint, DTYPES[args.mixed_precision])
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
        users = torch.arange(args.batch_size) % NUM_USERS
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

    return ((lambda number=number: batch(number)) for number in range(args.num_batches))


def floor(args: argparse.Namespace) -> Batches:
    """Make exactly the UNet and VAE calls of a process of the job, on its own models, and nothing else."""
    config = parse_args([*model_flags(args.checkpoint), "--output_dir", str(args.output)])
    runner.set_kernels(allow_tf32=False)
    model = load_model(config, torch.device("cpu"), args.mixed_precision, runner.compilation())
    dtype = model.unet.dtype
    size, at_once = args.batch_size, min(DECODED_AT_ONCE, args.batch_size)
    noise = torch.randn(size, 4, LATENTS, LATENTS).to(dtype).contiguous(memory_format=torch.channels_last)
    users = torch.arange(size) % NUM_USERS

    @torch.inference_mode()
    def batch() -> None:
        vectors = token_vectors(model.unet, model.condition_encoder(users).unsqueeze(1))
        for step in range(args.num_inference_steps):
            model.unet(noise, torch.tensor(1000 - step), vectors, return_dict=False)
        for part in noise.to(model.vae.dtype).split(at_once):
            model.vae.decode(part, return_dict=False)

    return (batch for _ in range(args.num_batches))


CONTENDERS = {"original": original, "pipeline": pipeline, "floor": floor}


def main() -> None:
    """Run one and print its times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num_batches", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--mixed_precision", default="no")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seconds = []
    for batch in CONTENDERS[args.contender](args):
        started = time.perf_counter()
        batch()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
