"""The one sampling sequence, seed -> noise -> denoise -> decode -> uint8, and a batch of the job on its way to the host.

A GPU never waits for the host: its images leave through pinned memory, by a stream of their own.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from userdiff.config import JobConfig
from userdiff.diffusion import sampler
from userdiff.diffusion.acceleration import token_vectors
from userdiff.diffusion.cuda_graph import GraphedUNet
from userdiff.diffusion.gpu_errors import HEADROOM, first_line, free_memory, gpu_errors, is_out_of_memory
from userdiff.diffusion.model import JobModel
from userdiff.seeds import Item, item_seed
from userdiff.shutdown import Failed

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from userdiff.diffusion.conditioning import UserConditionEncoder

_POLL_SECONDS = 0.001


def sample(
    unet: "UNet2DConditionModel | GraphedUNet",
    condition_encoder: "UserConditionEncoder",
    vae: "AutoencoderKL",
    scheduler: "DDIMScheduler",
    seeds: Sequence[int],
    rows: Sequence[int],
    *,
    num_inference_steps: int,
    eta: float,
    output_range: str,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample one batch of images, as the job and the training loop both do.

    seeds, rows: [batch] the seed of each image, and its user's row of the embedding.
    memory_format: that of the models' weights.
    on_step: called before every UNet pass; what it raises ends the batch.
    Returns [batch, channels, height, width] float32 on the device, nominally in [0, 1], not clamped yet.
    """
    generators = sampler.item_generators(seeds)
    noise = sampler.initial_latents(generators, sampler.latents_shape(unet))
    tokens = condition_encoder(sampler.to_device(torch.tensor(rows), device)).unsqueeze(1)
    latents = sampler.denoise(
        unet,
        scheduler,
        sampler.to_device(noise.contiguous(memory_format=memory_format), device),
        token_vectors(unet, tokens),
        num_inference_steps=num_inference_steps,
        eta=eta,
        generators=generators,
        on_step=on_step,
    )
    return sampler.decode(vae, latents, output_range=output_range)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of a batch of the job, computed or being computed."""

    items: Sequence[Item | None]
    """None for padding."""
    contradicts_range: Tensor
    """[] bool: whether they are plainly of another range than `--vae_output_range` says."""
    finite: Tensor
    """[batch] bool"""
    pixels: Tensor
    """[batch, height, width, channels] uint8"""
    arrival: torch.cuda.Event | None = None
    """When all three have come to the host; None where they were computed there."""

    def is_there(self) -> bool:
        """Return whether the images have come to the host; raises Failed where the GPU failed in between."""
        with gpu_errors():
            return self.arrival is None or self.arrival.query()

    def wait(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Wait until the images have come to the host, calling `on_poll` in between; what it raises ends the wait."""
        while not self.is_there():
            on_poll()
            time.sleep(_POLL_SECONDS)

    def images(self) -> Iterator[tuple[Item, NDArray[np.uint8] | None]]:
        """Yield each item with its image, [height, width, channels] uint8; None for one that is not finite."""
        pixels = self.pixels.numpy()
        for row, (item, is_finite) in enumerate(zip(self.items, self.finite.tolist(), strict=True)):
            if item is not None:
                yield item, pixels[row] if is_finite else None


def start(
    config: JobConfig, model: JobModel, items: Sequence[Item | None], on_step: Callable[[], None] = lambda: None
) -> Batch:
    """Compute a batch of the job, None for padding. On a GPU this returns while it still computes.

    `on_step` is called before every UNet pass; what it raises ends the batch. Raises Failed where memory is too small
    for the batch, naming a size that was tried and fits, and where the models cannot be compiled.
    """
    try:
        with gpu_errors():
            return _start(config, model, items, on_step)
    except (RuntimeError, MemoryError) as error:
        reason = first_line(error)
        if not is_out_of_memory(error):
            if isinstance(error, TorchDynamoException):
                raise Failed(f"the models cannot be compiled ({reason}); --dynamo_backend no does without") from error
            raise
    # Not within the `except`: there, the error still holds what the passes held.
    with gpu_errors():
        fitting = _fitting_batch_size(config, model, len(items))
    remedy = f"--batch_size {fitting} would do" if fitting else f"nor does one alone ({reason})"
    raise Failed(
        f"--batch_size: {len(items)} images at a time do not fit into the memory of {model.device_name}, {remedy}"
    )


@torch.inference_mode()
def _start(
    config: JobConfig, model: JobModel, items: Sequence[Item | None], on_step: Callable[[], None] = lambda: None
) -> Batch:
    # Padding is computed like the rest, from seed 0 and the first row: a pass always has its shape.
    images = sample(
        model.unet,
        model.condition_encoder,
        model.vae,
        model.scheduler,
        [item_seed(config.seed, *item) if item else 0 for item in items],
        [model.user_index[item[0]] if item else 0 for item in items],
        num_inference_steps=config.num_inference_steps,
        eta=config.eta,
        output_range=config.vae_output_range,
        device=model.device,
        memory_format=model.memory_format,
        on_step=on_step,
    )
    on_device = (
        sampler.contradicts_range(images, config.vae_output_range),
        sampler.finite_images(images),
        sampler.to_uint8(images),
    )
    (contradicts_range, finite, pixels), arrival = _download(*on_device)
    return Batch(items=items, contradicts_range=contradicts_range, finite=finite, pixels=pixels, arrival=arrival)


def _download(*tensors: Tensor) -> tuple[Sequence[Tensor], torch.cuda.Event | None]:
    """Copy tensors to the host; from a GPU into pinned memory, with the event of their arrival as second value."""
    device = tensors[0].device
    if device.type != "cuda":
        return tensors, None
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        arrival = stream.record_event()
    for tensor in tensors:
        tensor.record_stream(stream)  # its memory is given to nobody else before it is copied
    return on_host, arrival


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _fitting_batch_size(config: JobConfig, model: JobModel, too_large: int) -> int | None:
    """Find, by halving, a batch size of which one UNet pass and the decoding fit into memory; None if not even one does.

    On a GPU they must leave HEADROOM, but for a single image. Nothing is recorded, since a recording that fails keeps its
    memory; what a recording would keep is left free too.
    """
    one_step = replace(config, num_inference_steps=1)
    if isinstance(model.unet, GraphedUNet):
        model.unet.forget()
        model = replace(model, unet=model.unet.unet)
    is_cuda = model.device.type == "cuda"
    items = [(next(iter(model.user_index)), 0)] * too_large
    with torch.compiler.set_stance("force_eager"):
        while items := items[: len(items) // 2]:
            gc.collect()
            try:
                torch.cuda.empty_cache()
                if is_cuda:  # else the peak would be that of the try that failed
                    torch.cuda.reset_peak_memory_stats(model.device)
                _start(one_step, model, items).wait()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                continue
            held = (
                torch.cuda.max_memory_allocated(model.device) - torch.cuda.memory_allocated(model.device)
                if is_cuda
                else 0
            )
            free = free_memory(model.device)
            if free is None or free - held >= HEADROOM or len(items) == 1:
                return len(items)
    return None
