"""What makes a model's passes fast and leaves its maths as it is: one-token cross-attention, and compilation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


class SingleTokenAttnProcessor:
    """Cross-attention where the condition is one token.

    A softmax over one key is 1, so the result is `to_out(to_v(token))`, the same at every position: no queries, keys
    or attention. These vectors, of all layers side by side, come in as the `encoder_hidden_states`, and a layer takes
    its own. They are an input and nothing kept on the module, which a frozen graph would take for a constant.
    """

    def __init__(self, start: int, stop: int) -> None:
        self._start = start
        self._stop = stop

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **masks: Any) -> Tensor:
        """[batch, positions, channels], [batch, 1, sum of all layers' channels] -> [batch, 1, channels]."""
        return encoder_hidden_states[..., self._start : self._stop]


def use_single_token(unet: "UNet2DConditionModel") -> None:
    """Have a UNet's cross-attention take what `token_vectors` gives; a UNet of another make is left as it is."""
    layers = list(_cross_attention(unet))
    if not all(_is_plain(layer) for layer in layers):
        return
    start = 0
    for layer in layers:
        stop = start + layer.to_out[0].out_features
        layer.set_processor(SingleTokenAttnProcessor(start, stop))
        start = stop


def token_vectors(unet: "UNet2DConditionModel", tokens: Tensor) -> Tensor:
    """Make the `encoder_hidden_states` of a UNet from its condition: [batch, 1, cross_attention_dim] -> [batch, 1, any].

    They are the same at every step. For a UNet that `use_single_token` did not touch, they are the tokens.
    """
    layers = [layer for layer in _cross_attention(unet) if isinstance(layer.processor, SingleTokenAttnProcessor)]
    if not layers:
        return tokens
    tokens = tokens.to(layers[0].to_v.weight.dtype)
    return torch.cat([layer.to_out[1](layer.to_out[0](layer.to_v(tokens))) for layer in layers], dim=-1)


def _cross_attention(unet: "UNet2DConditionModel") -> Iterator[Any]:
    return (module for module in unet.modules() if getattr(module, "is_cross_attention", False))


def _is_plain(attn: Any) -> bool:
    return (
        type(attn.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
        and attn.norm_cross is None
        and attn.spatial_norm is None
        and attn.added_kv_proj_dim is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """How models are compiled, at their first pass."""

    options: Mapping[str, Any]
    """Those of `torch.compile`, the backend among them."""
    is_regional: bool = False
    """Only the UNet's transformer blocks, which are alike: less to compile, and less gained; on a CPU, nothing."""

    def __post_init__(self) -> None:
        if "max-autotune" in self.options.get("mode", ""):
            raise ValueError(
                f"{self.options['mode']} chooses kernels by timing them, so that two processes may differ in last bits, "
                "needed: default or reduce-overhead"
            )

    def __str__(self) -> str:
        chosen = [self.options["backend"], self.options.get("mode"), "regional" if self.is_regional else None]
        return ", ".join(name for name in chosen if name)

    def apply(self, unet: "UNet2DConditionModel", vae: "AutoencoderKL") -> None:
        """Have these models compiled.

        On a CPU their weights become constants of the graph, laid out for its kernels, without which nothing is gained;
        but blocks that are alike differ in their weights and would not share a graph.
        """
        from torch._inductor import config  # slow to import

        if hasattr(config, "deterministic"):  # since torch 2.10
            config.deterministic = True  # no kernel is chosen by timing
        config.freezing = unet.device.type == "cpu" and not self.is_regional
        if self.is_regional:
            unet.compile_repeated_blocks(**self.options)
        else:
            unet.compile(**self.options)
            vae.decoder.compile(**self.options)
