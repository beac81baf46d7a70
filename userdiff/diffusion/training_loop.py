"""Sampling from a training loop: the job's own sequence, on live model objects."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from userdiff.config import MAX_SEED, GuidanceFlags
from userdiff.diffusion.checkpoint import check_agreement, check_vae
from userdiff.diffusion.conditioning import UserConditionEncoder, null_token
from userdiff.diffusion.generate import sample
from userdiff.diffusion.sampler import (
    check_output_range,
    contradicts_range,
    finite_images,
    to_uint8,
)
from userdiff.diffusion.schedule import check_steps_finite, check_timesteps, ddim_scheduler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel


@torch.no_grad()
def generate_samples(
    unet: "UNet2DConditionModel",
    condition_encoder: UserConditionEncoder,
    vae: "AutoencoderKL",
    noise_scheduler: "SchedulerMixin",
    user_ids: Sequence[int],
    *,
    num_images_per_user: int = 1,
    num_inference_steps: int = 20,
    seed: int = 42,
    eta: float = 0.0,
    user_index: Mapping[int, int] | None = None,
    vae_output_range: str = "unit",
    batch_size: int = 16,
    guidance_scale: float = 1.0,
    null_condition: str | None = None,
    guidance_start: float = 0.0,
    guidance_stop: float = 1.0,
) -> Tensor:
    """Sample images of users from the models as they are now, with the noise the batch job would give them.

    unet, condition_encoder, vae: the models themselves; of those that accelerate prepared, `accelerator.unwrap_model`.
    noise_scheduler: the training loop's own; sampling uses DDIM on its schedule.
    user_index: user id -> row of the embedding; `user_id - 1` where it is not given.
    guidance_scale, null_condition, guidance_start, guidance_stop: as the job's flags of these names.
    batch_size: images of a pass; where one pass is not enough, the last one is padded, since kernels depend on its size.
    Returns [len(user_ids) * num_images_per_user, height, width, channels] uint8 on the CPU, user by user, images 0,
    1, ... of each: those a batch job with this seed makes, but for last bits where its batches are of another size.
    Raises ValueError for a user that the model does not have, and for what the job would refuse: models that do not
    belong together, a schedule that DDIM cannot honour, steps it does not have. Warns of images that are not finite, and of
    a VAE of another range. Puts the models in eval mode and back, and leaves the global generators alone.
    """
    user_ids = [int(user_id) for user_id in user_ids]  # of an array or a tensor, too
    num_users = condition_encoder.user_embedding.num_embeddings
    rows = {user_id: user_id - 1 for user_id in range(1, num_users + 1)} if user_index is None else user_index
    unknown = [user_id for user_id in user_ids if user_id not in rows]
    if unknown or not user_ids:
        raise ValueError(f"user_ids: {unknown or 'none'} given, this model has users {sorted(rows)}")
    _check_rows(rows, num_users)
    if num_images_per_user < 1 or batch_size < 1:
        raise ValueError(
            f"num_images_per_user {num_images_per_user}, batch_size {batch_size}, needed: 1 or more of each"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is out of range, needed: 0 to 1")
    guidance = GuidanceFlags(
        scale=float(guidance_scale), null_condition=null_condition, start=guidance_start, stop=guidance_stop
    )
    _check_guidance(guidance, condition_encoder)
    check_output_range(vae_output_range)
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: {seed!r} is out of range, needed: 0 to {MAX_SEED}")
    check_vae(vae)
    check_agreement(vae, unet)
    width = condition_encoder.user_embedding.embedding_dim
    if width != unet.config.cross_attention_dim:
        raise ValueError(
            f"the encoder's tokens are {width} wide, needed: {unet.config.cross_attention_dim}, the UNet's"
        )
    scheduler = ddim_scheduler(noise_scheduler)
    check_timesteps(scheduler, num_inference_steps)
    check_steps_finite(scheduler, num_inference_steps, eta)
    items = [(user_id, image_index) for user_id in user_ids for image_index in range(num_images_per_user)]
    batch_size = min(batch_size, len(items))
    images = []
    with _eval_mode(unet, condition_encoder, vae):
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            sampled = sample(
                unet,
                vae,
                condition_encoder,
                scheduler,
                [*batch, *[None] * (batch_size - len(batch))],
                user_index=rows,
                seed=seed,
                num_inference_steps=num_inference_steps,
                eta=eta,
                output_range=vae_output_range,
                guidance=guidance,
            )
            sampled = sampled[: len(batch)]
            if not start and contradicts_range(sampled, vae_output_range):
                warnings.warn(f"the decoded images contradict vae_output_range={vae_output_range!r}", stacklevel=3)
            if not finite_images(sampled).all():
                warnings.warn("some of the decoded images are not finite", stacklevel=3)
            images.append(to_uint8(sampled).cpu())
    return torch.cat(images)


def _check_guidance(guidance: GuidanceFlags, condition_encoder: UserConditionEncoder) -> None:
    guidance.check()
    if guidance.null_condition is not None:
        null_token(condition_encoder, guidance.null_condition)
    if not (0 <= guidance.scale < float("inf") and guidance.start >= 0 and guidance.stop <= 1):
        raise ValueError(f"{guidance} is out of range, needed: a scale from 0 on, start and stop from 0 to 1")


def _check_rows(rows: Mapping[int, int], num_users: int) -> None:
    if not isinstance(rows, Mapping):
        raise ValueError(f"user_index: {type(rows).__name__}, needed: a mapping of user id to row of the embedding")
    if wrong := [row for row in rows.values() if not 0 <= row < num_users]:
        raise ValueError(f"user_index: row {wrong[0]} is out of range, needed: 0 to {num_users - 1}")
    if len(set(rows.values())) < len(rows):
        raise ValueError("user_index: two users have one row, needed: one for each user")


@contextmanager
def _eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules in eval mode (dropout off), then each part of them back into the mode it was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training
