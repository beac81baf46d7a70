"""Small random checkpoints of many shapes, saved the way trainers save them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from userdiff.diffusion.conditioning import UserConditionEncoder


@dataclass(frozen=True)
class Shape:
    """What varies between checkpoints."""

    num_users: int = 5
    latent_channels: int = 4
    sample_size: int = 8
    embed_dim: int = 16
    vae_blocks: int = 2  # the VAE enlarges 2^(blocks - 1) times
    image_channels: int = 3
    scaling_factor: float = 0.7
    scheduler: dict[str, Any] = field(default_factory=dict)  # what differs from the training default


def make_checkpoint(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Save a random VAE, UNet, encoder and (where it is not the default) scheduler under `folder`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=shape.image_channels,
        out_channels=shape.image_channels,
        latent_channels=shape.latent_channels,
        block_out_channels=(8,) * shape.vae_blocks,
        down_block_types=("DownEncoderBlock2D",) * shape.vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * shape.vae_blocks,
        norm_num_groups=4,
        scaling_factor=shape.scaling_factor,
    )
    unet = UNet2DConditionModel(
        sample_size=shape.sample_size,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=shape.embed_dim,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    encoder = UserConditionEncoder(shape.num_users, shape.embed_dim)
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    save_file(encoder.state_dict(), folder / "condition_encoder.safetensors")
    if shape.scheduler:
        settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
        DDPMScheduler(**{**settings, **shape.scheduler}).save_pretrained(folder / "scheduler")
    return folder


def model_flags(folder: Path, shape: Shape = Shape()) -> list[str]:
    """Return the flags that name a checkpoint."""
    flags = ["--vae_path", folder / "vae", "--unet_path", folder / "unet", "--condition_encoder_path", folder]
    flags += ["--num_users", shape.num_users]
    if shape.scheduler:
        flags += ["--scheduler_path", folder / "scheduler"]
    return [str(flag) for flag in flags]
