"""What a GPU's libraries raise, made into a line; and memory that is too small, in all its wordings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from userdiff.shutdown import Failed

HEADROOM = 2**30  # bytes that a GPU should have free: with less, cuDNN may take another kernel, and round otherwise

_OUT_OF_MEMORY = (  # in the words of torch on a CPU, the runtimes of CUDA and HIP and Triton, cuBLAS, cuDNN
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
def gpu_errors(too_small: str = "") -> Iterator[None]:
    """Turn what a GPU's libraries raise into Failed; a lack of memory only where `too_small` says what does not fit."""
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
    """Return whether memory was too small, by the error or by one it came of, as when a CUDA graph was recorded."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(of in str(error) for of in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a GPU has free, whoever else uses it; None for a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
