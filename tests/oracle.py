"""What the job should make, written plainly from the definition: one image at a time, batch 1, float32.

Shares no code with the package: diffusers' own loading, its own DDIM step with its own noise, the seed by hand.
"""

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file


def oracle_seed(base_seed: int, user_id: int, image_index: int) -> int:
    digest = blake2b(f"{base_seed}:{user_id}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") + image_index) % 2**32


def oracle_condition(folder: Path, user_index: int) -> torch.Tensor:
    weights = load_file(folder / "condition_encoder.safetensors")
    hidden = weights["user_embedding.weight"][user_index].float()[None]
    hidden = hidden @ weights["mlp.0.weight"].float().T + weights["mlp.0.bias"].float()
    hidden = hidden * torch.sigmoid(hidden)
    return hidden @ weights["mlp.3.weight"].float().T + weights["mlp.3.bias"].float()


@torch.no_grad()
def oracle_image(
    folder: Path,
    user_id: int,
    image_index: int,
    *,
    steps: int,
    seed: int = 42,
    eta: float = 0.0,
    signed: bool = False,
    user_index: int | None = None,
    size: int | None = None,
    scheduler: DDIMScheduler | None = None,
    unscale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scale: float = 1.0,
    null_row: int | None = None,
    guided: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """[height, width, channels] uint8.

    scale, null_row, guided: guidance away from the token of a row, or from zeros; between these fractions of the steps.

    size, scheduler, unscale: where the definition is another than the files of `folder` say.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    if (folder / "scheduler").is_dir():
        noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    else:
        noise_scheduler = DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="epsilon",
        )
    scheduler = scheduler or DDIMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(steps)
    condition = oracle_condition(folder, user_id - 1 if user_index is None else user_index)[:, None]
    generator = torch.Generator().manual_seed(oracle_seed(seed, user_id, image_index))
    size = size or unet.config.sample_size
    latents = torch.randn((1, unet.config.in_channels, size, size), generator=generator)
    null = torch.zeros_like(condition) if null_row is None else oracle_condition(folder, null_row)[:, None]
    for number, timestep in enumerate(scheduler.timesteps):
        noise_pred = unet(latents, timestep, condition).sample
        if scale != 1 and int(guided[0] * steps) <= number < int(guided[1] * steps):
            null_pred = unet(latents, timestep, null).sample
            noise_pred = null_pred + scale * (noise_pred - null_pred)
        latents = scheduler.step(noise_pred, timestep, latents, eta=eta, generator=generator).prev_sample
    image = vae.decode(unscale(latents) if unscale else latents / vae.config.scaling_factor).sample
    if signed:
        image = (image + 1) / 2
    image = image.clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return (image * 255).astype(np.uint8)


def assert_parity(output_dir: Path, expected: dict[tuple[int, int], np.ndarray]) -> None:
    """At least 99.9 % of all pixel values equal, none off by more than 1."""
    differences = []
    for (user_id, image_index), image in expected.items():
        with Image.open(output_dir / f"user_{user_id:02d}" / f"generated_{image_index:03d}.png") as png:
            found = np.asarray(png)
        found = found[..., None] if found.ndim == 2 else found
        assert found.shape == image.shape
        differences.append(np.abs(found.astype(int) - image.astype(int)).ravel())
    all_differences = np.concatenate(differences)
    assert all_differences.max() <= 1
    assert (all_differences == 0).mean() >= 0.999
