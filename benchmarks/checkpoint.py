"""A checkpoint of the size in use, with random weights: a speed does not depend on what they are."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from userdiff import UserConditionEncoder

NUM_USERS = 31
EMBED_DIM = 512
LATENTS = 32  # height and width; the images are four times as large


def make_checkpoint(
    folder: Path, unet_widths: Sequence[int] = (128, 256, 512, 512), vae_widths: Sequence[int] = (128, 256, 512)
) -> None:
    """Save a UNet (140 M parameters), a VAE (55.3 M, its decoder 33.0 M) and an encoder; at these widths it enlarges 4 times."""
    torch.manual_seed(0)
    attending = len(unet_widths) - 1
    unet = UNet2DConditionModel(
        sample_size=LATENTS,
        in_channels=4,
        out_channels=4,
        block_out_channels=unet_widths,
        down_block_types=(*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending),
        cross_attention_dim=EMBED_DIM,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=vae_widths,
        down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
        layers_per_block=2,
        sample_size=LATENTS * 2 ** (len(vae_widths) - 1),
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    save_file(UserConditionEncoder(NUM_USERS, EMBED_DIM).state_dict(), folder / "condition_encoder.safetensors")


def model_flags(folder: Path) -> list[str]:
    """Return the job's flags that name it."""
    paths = ["--vae_path", folder / "vae", "--unet_path", folder / "unet", "--condition_encoder_path", folder]
    return [*map(str, paths), "--num_users", str(NUM_USERS)]
