"""One batch on the device: seeds in, pixels on their way to the host out; the device never waits for the host."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from userdiff import sampling
from userdiff.acceleration import token_vectors
from userdiff.config import JobConfig
from userdiff.halting import Failed
from userdiff.loading import JobModel
from userdiff.planning import item_seed
from userdiff.table import Item

_POLL_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of a batch, computed or being computed."""

    items: Sequence[Item | None]
    """None for padding."""
    contradicts_range: Tensor
    """[] bool: whether they are plainly of another range than `--vae_output_range` says."""
    finite: Tensor
    """[batch] bool"""
    pixels: Tensor
    """[batch, height, width, channels] uint8"""
    arrival: torch.cuda.Event | None = None
    """Of all three on the host."""

    def is_there(self) -> bool:
        """Whether the images have come to the host."""
        return self.arrival is None or self.arrival.query()

    def wait(self) -> None:
        """Wait until the images have come to the host; polls, so that a signal is seen."""
        while not self.is_there():
            time.sleep(_POLL_SECONDS)

    def images(self) -> Iterator[tuple[Item, NDArray[np.uint8] | None]]:
        """Give each item its image, [height, width, channels] uint8; None for one that is not finite."""
        pixels = self.pixels.numpy()
        for row, (item, is_finite) in enumerate(zip(self.items, self.finite.tolist(), strict=True)):
            if item is not None:
                yield item, pixels[row] if is_finite else None


def start(
    config: JobConfig, model: JobModel, items: Sequence[Item | None], on_step: Callable[[], None] = lambda: None
) -> Batch:
    """Compute a batch of images, None for padding. On a GPU this returns while it still computes.

    Padding is computed like the rest, from seed 0 and the first row of the embedding: a pass always has its shape.
    `on_step` is asked before every UNet pass; what it raises ends the batch. Raises Failed where memory is too small
    for the batch, with a size that was tried and found to do.
    """
    try:
        return _start(config, model, items, on_step)
    except TorchDynamoException as error:
        raise Failed(
            f"the models cannot be compiled ({str(error).splitlines()[0]}); --dynamo_backend no does without"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    # only here, where the error no longer holds what the passes held
    fitting = _fitting_batch_size(config, model, len(items))
    remedy = f"--batch_size {fitting} would do" if fitting else "nor does one alone"
    raise Failed(
        f"--batch_size: {len(items)} images at a time do not fit into the memory of {model.device_name}, {remedy}"
    )


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@torch.inference_mode()
def _start(
    config: JobConfig, model: JobModel, items: Sequence[Item | None], on_step: Callable[[], None] = lambda: None
) -> Batch:
    generators = sampling.item_generators([item_seed(config.seed, *item) if item else 0 for item in items])
    noise = sampling.initial_latents(generators, sampling.latents_shape(model.unet))
    user_index = torch.tensor([model.user_index[item[0]] if item else 0 for item in items])
    tokens = model.condition_encoder(sampling.to_device(user_index, model.device)).unsqueeze(1)
    latents = sampling.denoise(
        model.unet,
        model.scheduler,
        sampling.to_device(noise.contiguous(memory_format=torch.channels_last), model.device),
        token_vectors(model.unet, tokens),
        num_inference_steps=config.num_inference_steps,
        eta=config.eta,
        generators=generators,
        on_step=on_step,
    )
    images = sampling.decode(model.vae, latents, output_range=config.vae_output_range)
    facts = sampling.contradicts_range(images, config.vae_output_range), sampling.finite_images(images)
    (contradicts_range, finite, pixels), arrival = _download(*facts, sampling.to_uint8(images))
    return Batch(items=items, contradicts_range=contradicts_range, finite=finite, pixels=pixels, arrival=arrival)


def _download(*tensors: Tensor) -> tuple[Sequence[Tensor], torch.cuda.Event | None]:
    """Have tensors copied to the host, from a GPU by a stream of its own, into pinned memory."""
    device = tensors[0].device
    if device.type != "cuda":
        return tensors, None
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        arrival = stream.record_event()
    for tensor in tensors:
        tensor.record_stream(stream)  # its memory is not another's before it is copied
    return on_host, arrival


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _fitting_batch_size(config: JobConfig, model: JobModel, too_large: int) -> int | None:
    """Find, by halving, a batch size of which one UNet pass and the decoding fit into memory; None if not even one does."""
    one_step = replace(config, num_inference_steps=1)
    items = [(next(iter(model.user_index)), 0)] * too_large
    with torch.compiler.set_stance("force_eager"):
        while items := items[: len(items) // 2]:
            gc.collect()
            torch.cuda.empty_cache()
            try:
                _start(one_step, model, items).wait()
                return len(items)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
    return None
