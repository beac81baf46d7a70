"""From items to pixels: seed -> generators -> noise -> condition token -> denoise -> decode -> uint8.

`sample` is that sequence up to the decoded images; a training loop and the batch job both call it. `start` computes one
batch of a job: it leaves the pixels on their way to the host, so that a GPU never waits for it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from userdiff.config import NO_GUIDANCE, GuidanceFlags, JobConfig
from userdiff.diffusion import gpu_errors, sampler
from userdiff.diffusion.acceleration import GraphedUNet, token_vectors
from userdiff.diffusion.conditioning import UserConditionEncoder, null_token
from userdiff.diffusion.model import JobModel
from userdiff.seeds import Item, item_seed
from userdiff.shutdown import Failed

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler

_POLL_SECONDS = 0.001


@torch.no_grad()
def sample(
    unet: Any,
    vae: "AutoencoderKL",
    condition_encoder: UserConditionEncoder,
    scheduler: "DDIMScheduler",
    items: Sequence[Item | None],
    *,
    user_index: Mapping[int, int],
    seed: int,
    num_inference_steps: int,
    eta: float,
    output_range: str,
    guidance: GuidanceFlags = NO_GUIDANCE,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample one image for each item.

    items: [batch] (user_id, image_index), or None for padding. Padding is computed like the rest, from seed 0 and the
        first row of the embedding, so that a forward pass always has the same shape.
    user_index: user id -> row of the embedding.
    guidance: how far, against which null condition, at which steps.
    on_step: called before every UNet pass; what it raises ends the sampling.
    Returns [batch, channels, height, width] float32 on the models' device, nominally in [0, 1], not clamped.
    Raises ValueError for an `output_range` that is neither `unit` nor `signed`.
    """
    device = next(unet.parameters()).device
    generators = sampler.item_generators([item_seed(seed, *item) if item else 0 for item in items])
    noise = sampler.initial_latents(generators, sampler.latents_shape(unet))
    # Latents in another layout than the convolutions' would be brought into it at every step.
    if all(
        kernel.is_contiguous(memory_format=torch.channels_last) for kernel in unet.parameters() if kernel.dim() == 4
    ):
        noise = noise.contiguous(memory_format=torch.channels_last)
    rows = torch.tensor([user_index[item[0]] if item else 0 for item in items])
    tokens = condition_encoder(sampler.to_device(rows, device)).unsqueeze(1)  # [batch, 1, cross_attention_dim]
    latents = sampler.denoise(
        unet,
        scheduler,
        sampler.to_device(noise, device),
        token_vectors(unet, tokens),
        num_inference_steps=num_inference_steps,
        eta=eta,
        generators=generators,
        guidance=_guidance(unet, condition_encoder, guidance, len(items)),
        on_step=on_step,
    )
    return sampler.decode(vae, latents, output_range=output_range)


def _guidance(
    unet: Any, condition_encoder: UserConditionEncoder, flags: GuidanceFlags, batch_size: int
) -> sampler.Guidance | None:
    if flags.null_condition is None or flags.scale == 1:
        return None
    null = token_vectors(unet, null_token(condition_encoder, flags.null_condition).expand(batch_size, -1, -1))
    return sampler.Guidance(scale=flags.scale, null_hidden_states=null, start=flags.start, stop=flags.stop)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of one batch of a job, on the host or on their way there."""

    items: Sequence[Item | None]
    """[batch], None for padding."""
    contradicts_range: Tensor
    """[] bool: whether the images plainly have another range than `--vae_output_range` says."""
    finite: Tensor
    """[batch] bool"""
    pixels: Tensor
    """[batch, height, width, channels] uint8"""
    arrival: torch.cuda.Event | None = None
    """When the three tensors are on the host; None where they were computed there."""

    def is_there(self) -> bool:
        """Return whether the images are on the host. Raises Failed where the GPU failed in the meantime."""
        with gpu_errors.as_failed():
            return self.arrival is None or self.arrival.query()

    def wait(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Wait until the images are on the host, calling `on_poll` in between; what it raises ends the wait."""
        while not self.is_there():
            on_poll()
            time.sleep(_POLL_SECONDS)

    def images(self) -> Iterator[tuple[Item, NDArray[np.uint8] | None]]:
        """Yield each item with its image, [height, width, channels] uint8, or with None for one that is not finite."""
        pixels = self.pixels.numpy()
        for row, (item, is_finite) in enumerate(zip(self.items, self.finite.tolist(), strict=True)):
            if item is not None:
                yield item, pixels[row] if is_finite else None


def start(
    config: JobConfig, model: JobModel, items: Sequence[Item | None], on_step: Callable[[], None] = lambda: None
) -> Batch:
    """Compute a batch of images; on a GPU, return while it still computes. `items` and `on_step` are those of `sample`.

    Raises Failed where the GPU fails, where the models cannot be compiled, and where the batch does not fit into memory;
    the message then names a batch size that was tried and fits.
    """
    try:
        with gpu_errors.as_failed():
            return _compute(config, model, items, on_step)
    except (RuntimeError, MemoryError) as error:
        what = gpu_errors.first_line(error)
        if not gpu_errors.is_out_of_memory(error):
            if isinstance(error, TorchDynamoException):
                raise Failed(f"the models cannot be compiled ({what}); --dynamo_backend no does without") from error
            raise
    # outside the `except`: the error's traceback would keep the tensors of the failed pass alive
    with gpu_errors.as_failed():
        fitting = _fitting_batch_size(config, model, len(items))
    remedy = f"--batch_size {fitting} would do" if fitting else f"nor does one alone ({what})"
    raise Failed(
        f"--batch_size: {len(items)} images at a time do not fit into the memory of {model.device_name}, {remedy}"
    )


@torch.inference_mode()
def _compute(
    config: JobConfig, model: JobModel, items: Sequence[Item | None], on_step: Callable[[], None] = lambda: None
) -> Batch:
    images = sample(
        model.unet,
        model.vae,
        model.condition_encoder,
        model.scheduler,
        items,
        user_index=model.user_index,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        eta=config.eta,
        output_range=config.vae_output_range,
        guidance=config.guidance,
        on_step=on_step,
    )
    computed = (
        sampler.contradicts_range(images, config.vae_output_range),
        sampler.finite_images(images),
        sampler.to_uint8(images),
    )
    (contradicts_range, finite, pixels), arrival = _download(*computed)
    return Batch(items=items, contradicts_range=contradicts_range, finite=finite, pixels=pixels, arrival=arrival)


def _download(*tensors: Tensor) -> tuple[Sequence[Tensor], torch.cuda.Event | None]:
    """Start to copy tensors from a GPU to pinned host memory, on a stream of their own; a CPU's are returned as they are."""
    device = tensors[0].device
    if device.type != "cuda":
        return tensors, None
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        arrival = stream.record_event()
    for tensor in tensors:
        tensor.record_stream(stream)  # else the next batch might get its memory before it is copied
    return on_host, arrival


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _fitting_batch_size(config: JobConfig, model: JobModel, too_large: int) -> int | None:
    """Return a batch size of which one UNet pass and the decoding fit into memory; None if not even one image does.

    Passes are launched kernel by kernel here: a CUDA graph whose recording fails would not give its memory back.
    """
    one_step = replace(config, num_inference_steps=1, guidance_start=0.0, guidance_stop=1.0)
    if isinstance(model.unet, GraphedUNet):
        model.unet.forget()
        model = replace(model, unet=model.unet.unet)
    item = (next(iter(model.user_index)), 0)
    with torch.compiler.set_stance("force_eager"):
        return gpu_errors.fitting_batch_size(
            lambda size: _compute(one_step, model, [item] * size).wait(), too_large, model.device
        )
