"""GPUs that fail or are full: what their libraries raise, and the batch size that fits into their memory."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from userdiff.shutdown import Failed

HEADROOM = 2**30
"""Bytes that a GPU should have free. With less, cuDNN may silently take another kernel, which rounds otherwise."""

_OUT_OF_MEMORY = (  # in the words of torch on a CPU; of CUDA, HIP and Triton; of cuBLAS; of cuDNN
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


@contextmanager
def as_failed(too_small: str = "") -> Iterator[None]:
    """Turn what a GPU's libraries raise into Failed, one line. Other errors pass through.

    too_small: what to say where memory is too small; by default, that error passes through too.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            if too_small:
                raise Failed(f"--device: {too_small} ({first_line(error)})") from error
            raise
        if any(name in str(error) for name in _GPU_ERROR):
            raise Failed(f"--device: the GPU failed ({first_line(error)})") from error
        raise


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that memory was too small.

    The cause alone says so where a CUDA graph was being recorded.
    """
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(of in str(error) for of in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a GPU has free, whoever uses the rest; None for a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def fitting_batch_size(compute: Callable[[int], None], too_large: int, device: torch.device) -> int | None:
    """Return the largest of too_large / 2, / 4, ... that fits into a device's memory; None if not even 1 does.

    compute: computes so many images, and returns when they are done.
    On a GPU, more than one image must leave HEADROOM beside the memory that a recording of the passes would keep.
    """
    size = too_large
    while size := size // 2:
        gc.collect()
        try:
            torch.cuda.empty_cache()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # else the peak would be that of the size that failed
            compute(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            continue
        free = free_memory(device)
        if free is None or size == 1:
            return size
        recorded = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        if free - recorded >= HEADROOM:
            return size
    return None
