"""The one sampling loop: noise, denoising and decoding as functions of tensors.

The batch job and training-time sampling both call these; nothing here knows of files, processes or flags.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

DECODED_AT_ONCE = {"cpu": 4, "cuda": 16}
"""Images, by the kind of device: more are no faster there, and the decoder's memory grows with them."""


def item_generators(seeds: Sequence[int]) -> list[Generator]:
    """Make one CPU generator per image. CPU, because what a CUDA generator draws depends on the GPU model."""
    return [Generator().manual_seed(int(seed)) for seed in seeds]


def initial_latents(generators: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """Draw each image's starting noise from its own generator: [batch, *shape] float32 on the CPU, N(0, 1)."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def latents_shape(unet: "UNet2DConditionModel") -> tuple[int, int, int]:
    """Return the shape of one image's latents: (in_channels, height, width)."""
    size: Any = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, so that the host goes on while the GPU still has other work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: Ho and Salimans 2022, https://arxiv.org/abs/2207.12598, on an interval of the steps.

    The interval is that of diffusers' guiders; limited ones are of Kynkaanniemi et al. 2024, https://arxiv.org/abs/2404.07724.
    """

    scale: float
    """0 is the null condition alone, 1 the condition alone; above it, away from the null condition."""
    null_hidden_states: Tensor
    """[batch, 1, cross_attention_dim] the null condition, as the `encoder_hidden_states` have the condition."""
    start: float = 0.0
    stop: float = 1.0
    """Fractions of the steps: step i of n is guided where int(start * n) <= i < int(stop * n)."""

    def is_at(self, step: int, num_inference_steps: int) -> bool:
        """Return whether a step, counted from 0, is guided."""
        return int(self.start * num_inference_steps) <= step < int(self.stop * num_inference_steps)


@torch.no_grad()
def denoise(
    unet: "UNet2DConditionModel",
    scheduler: "DDIMScheduler",
    latents: Tensor,
    encoder_hidden_states: Tensor,
    *,
    num_inference_steps: int,
    eta: float = 0.0,
    generators: Sequence[Generator] = (),
    guidance: Guidance | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run DDIM from noise to latents: Song et al. 2021, https://arxiv.org/abs/2010.02502, equation (12).

    latents: [batch, channels, height, width] float32, N(0, 1), already on the UNet's device.
    encoder_hidden_states: [batch, 1, cross_attention_dim], one token per image.
    generators: one per image, those that drew the latents; used for eta > 0 only, and they simply go on.
    guidance: of the guided steps, the condition and the null condition go through the UNet in one pass of twice the rows.
    on_step: called before every UNet pass; what it raises ends the loop.
    Returns the denoised latents, same shape, float32. Only what enters the UNet is cast to the UNet's own precision;
    the scheduler's arithmetic stays in float32.
    """
    scheduler.set_timesteps(num_inference_steps)
    dtype = next(unet.parameters()).dtype
    encoder_hidden_states = encoder_hidden_states.to(latents.device, dtype)
    both = encoder_hidden_states
    if guidance:
        both = torch.cat([encoder_hidden_states, guidance.null_hidden_states.to(latents.device, dtype)])
    timesteps = to_device(scheduler.timesteps, latents.device)  # one copy for the whole loop
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        on_step()
        if guidance and guidance.is_at(step, num_inference_steps):
            rows = torch.cat([latents, latents]).to(dtype)
            conditioned, null = unet(rows, timesteps[step], both, return_dict=False)[0].float().chunk(2)
            model_output = null + guidance.scale * (conditioned - null)
        else:
            model_output = unet(latents.to(dtype), timesteps[step], encoder_hidden_states, return_dict=False)[0].float()
        noise = to_device(initial_latents(generators, latents.shape[1:]), latents.device) if eta > 0 else None
        latents = scheduler.step(model_output, timestep, latents, eta=eta, variance_noise=noise, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor, *, output_range: str = "unit") -> Tensor:
    """Decode latents to images: [batch, channels, height, width] float32, nominally in [0, 1], not yet clamped.

    Not clamped so that a caller can still tell what is not finite, or plainly in another range, from what is.
    `output_range` is what the VAE was trained on: "unit" for [0, 1], "signed" for [-1, 1]. Decodes a few images at a
    time, in parts of equal size, since kernels are chosen, and graphs compiled, by shape.
    """
    check_output_range(output_range)
    dtype = next(vae.parameters()).dtype
    most = DECODED_AT_ONCE.get(latents.device.type, DECODED_AT_ONCE["cpu"])
    at_once = max(size for size in range(1, most + 1) if len(latents) % size == 0)
    parts = unscaled(vae, latents).to(dtype).split(at_once)
    # copied even where it is float32: a CUDA graph's output is overwritten by its next run
    images = torch.cat([vae.decode(part, return_dict=False)[0].to(torch.float32, copy=True) for part in parts])
    return images / 2 + 0.5 if output_range == "signed" else images


def check_output_range(output_range: str) -> None:
    """Raise ValueError for a range that is neither `unit` nor `signed`."""
    if output_range not in ("unit", "signed"):
        raise ValueError(f"output_range: {output_range!r} is neither unit nor signed")


def unscaled(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Turn latents as the UNet has them into latents as the VAE has them, as its config says: same shape, float32.

    `z / scaling_factor`, `z / scaling_factor + shift_factor`, or `z * std / scaling_factor + mean`, a channel at a time,
    as in the pipelines of diffusers.
    """
    latents = latents / vae.config.scaling_factor
    if vae.config.latents_mean is not None:
        mean, std = (
            to_device(torch.tensor(values, dtype=latents.dtype).view(1, -1, 1, 1), latents.device)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = latents * std + mean
    return latents + vae.config.shift_factor if vae.config.shift_factor else latents


def to_uint8(images: Tensor) -> Tensor:
    """[batch, channels, height, width] float in [0, 1] -> [batch, height, width, channels] uint8.

    Clamped, then truncated and not rounded, as training loops do with `(image * 255).astype(uint8)`.
    """
    return (images.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def finite_images(images: Tensor) -> Tensor:
    """Return which images hold only finite numbers: [batch, ...] float -> [batch] bool. Ask before the clamp hides it."""
    return torch.isfinite(images).flatten(1).all(1)


def contradicts_range(images: Tensor, output_range: str) -> Tensor:
    """Return whether decoded images plainly come from a VAE trained on the other range than `output_range`: [] bool.

    Taken as "unit", [-1, 1] images have many values below 0, or a few far below, as ink on white paper has; those of a
    [0, 1] VAE hardly reach -0.5. Taken as "signed", [0, 1] images have none below 0.5.
    """
    if output_range == "signed":
        return images.amin() > 0.4
    return ((images < -0.1).float().mean() > 0.1) | (images.amin() < -0.5)
