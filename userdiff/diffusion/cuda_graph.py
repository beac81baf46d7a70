"""A UNet's pass on a GPU, recorded once and replayed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class GraphedUNet(nn.Module):
    """A UNet on a GPU whose pass is recorded once, as a CUDA graph, and replayed: one launch instead of hundreds.

    What a host needs to launch a pass kernel by kernel is longer than a fast GPU computes. The kernels are those of the
    UNet itself, compiled or not, and so are the bits. The arithmetic between passes is the caller's.
    """

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self._recording: _Recording | None = None

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Compute `unet(sample, timestep, encoder_hidden_states)[0]`. The next pass overwrites what this one returns."""
        given = (sample, timestep, encoder_hidden_states)
        if self._recording is None or not self._recording.fits(given):
            self.forget()
            self._recording = _record(self.unet, given)
        for kept, new in zip(self._recording.inputs, given, strict=True):
            kept.copy_(new)
        self._recording.graph.replay()
        return (self._recording.output,)

    def forget(self) -> None:
        """Forget what was recorded, and free its memory."""
        self._recording = None


@dataclass(frozen=True)
class _Recording:
    """A pass as a graph, between tensors that stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def fits(self, given: tuple[Tensor, ...]) -> bool:
        """Return whether it was made for inputs of these shapes and types."""
        return [(kept.shape, kept.dtype) for kept in self.inputs] == [(new.shape, new.dtype) for new in given]


def _record(unet: nn.Module, given: tuple[Tensor, ...]) -> _Recording:
    """Record a pass on the device of its inputs, which need not be the current one."""
    device = given[0].device
    with torch.cuda.device(device):
        inputs = tuple(tensor.clone() for tensor in given)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # The first pass compiles kernels and allocates workspaces, which must not be recorded.
            unet(*inputs, return_dict=False)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            (output,) = unet(*inputs, return_dict=False)
    return _Recording(graph, inputs, output)
