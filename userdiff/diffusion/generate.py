"""One batch on the device: seeds in, pixels on their way to the host out; the device never waits for the host."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from userdiff.config import JobConfig
from userdiff.diffusion import sampler as sampling
from userdiff.diffusion.acceleration import token_vectors
from userdiff.diffusion.cuda_graph import GraphedUNet
from userdiff.diffusion.model import JobModel
from userdiff.seeds import Item, item_seed
from userdiff.shutdown import Failed

HEADROOM = 2**30  # bytes that a GPU should have free: with less, cuDNN may take another kernel, and round otherwise

_POLL_SECONDS = 0.001
_OUT_OF_MEMORY = (  # as torch on a CPU calls it, the runtimes of CUDA and HIP, Triton, cuBLAS, cuDNN
    "DefaultCPUAllocator",
    "out of memory",
    "STATUS_ALLOC_FAILED",
    "unable to find an engine",
)
_GPU_ERROR = (
    "CUDA error",
    "CUDA driver error",
    "cuDNN error",
    "CUDNN_STATUS",
    "CUBLAS_STATUS",
    "Triton Error",
    "HIP error",
    "miopen",
    "NVML_SUCCESS",
)


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
        """Whether the images have come to the host; raises Failed where the GPU failed in between."""
        with gpu_errors():
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
        with gpu_errors():
            return _start(config, model, items, on_step)
    except (RuntimeError, MemoryError) as error:
        said = _first_line(error)
        if not _is_out_of_memory(error):
            if isinstance(error, TorchDynamoException):
                raise Failed(f"the models cannot be compiled ({said}); --dynamo_backend no does without") from error
            raise
    # only here, where the error no longer holds what the passes held
    with gpu_errors():
        fitting = _fitting_batch_size(config, model, len(items))
    remedy = f"--batch_size {fitting} would do" if fitting else f"nor does one alone ({said})"
    raise Failed(
        f"--batch_size: {len(items)} images at a time do not fit into the memory of {model.device_name}, {remedy}"
    )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a GPU has free, whoever else uses it; None for a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def _held_by_passes(device: torch.device) -> int:
    """Return the bytes that passes held at most, since the peak was reset, beyond what is held now."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


@contextmanager
def gpu_errors(too_small: str = "") -> Iterator[None]:
    """Make Failed, a line, of what a GPU's libraries raise; of memory that is too small if that is said in `too_small`."""
    try:
        yield
    except RuntimeError as error:
        if _is_out_of_memory(error):
            if too_small:
                raise Failed(f"--device: {too_small} ({_first_line(error)})") from error
            raise
        if any(name in str(error) for name in _GPU_ERROR):
            raise Failed(f"--device: the GPU failed ({_first_line(error)})") from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was too small, by the error or by one that it came of, as when a CUDA graph was recorded."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(of in str(error) for of in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


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
        sampling.to_device(noise.contiguous(memory_format=model.memory_format), model.device),
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
    """Find, by halving, a batch size of which one UNet pass and the decoding fit into memory; None if not even one does.

    On a GPU they leave HEADROOM, but a single image. Nothing is recorded, since a recording that fails keeps memory to
    itself; what one would keep is left free too.
    """
    one_step = replace(config, num_inference_steps=1)
    if isinstance(model.unet, GraphedUNet):
        model.unet.forget()
        model = replace(model, unet=model.unet.unet)
    items = [(next(iter(model.user_index)), 0)] * too_large
    with torch.compiler.set_stance("force_eager"):
        while items := items[: len(items) // 2]:
            gc.collect()
            try:
                torch.cuda.empty_cache()
                if model.device.type == "cuda":  # else what held most would be the try that failed
                    torch.cuda.reset_peak_memory_stats(model.device)
                _start(one_step, model, items).wait()
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                continue
            free = free_memory(model.device)
            if free is None or free - _held_by_passes(model.device) >= HEADROOM or len(items) == 1:
                return len(items)
    return None
