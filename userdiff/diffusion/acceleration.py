"""What makes a model's passes fast and leaves its maths as it is: fewer kernels, compilation, CUDA graphs.

`speed_up` is where a job begins; what it does to which model on which device was measured (`benchmarks/README.md`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - everybody's name for it

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D"}
_MANY_POSITIONS = 256  # of an image, from which on what is written for large ones pays
_FLEX_HEADS = (16, 32)  # channels of a head: `flex_attention` takes powers of two from 16; cuDNN pads these to 64
_FIRST_DETERMINISTIC = (2, 10)  # torch; earlier ones choose a compiled model's kernels on a GPU by timing them


def speed_up(
    unet: "UNet2DConditionModel",
    vae: "AutoencoderKL",
    num_train_timesteps: int,
    compilation: "Compilation | None" = None,
) -> nn.Module:
    """Make models on their device fast, in place; returns what to call in the UNet's stead.

    On a CPU nothing that rounds otherwise is done, but for compilation, where it is asked for.
    """
    is_cuda = unet.device.type == "cuda"
    is_regional = compilation is not None and compilation.is_regional
    if not is_regional:  # layers that differ in their slice would not share a graph
        use_single_token(unet)
    if is_cuda:
        use_timestep_table(unet, num_train_timesteps)
        # float32 would round otherwise in it, and fp16 may be of a card older than its kernels
        use_fused_self_attention(unet, is_flex=compilation is not None and unet.dtype is torch.bfloat16)
        if compilation and not is_regional:
            use_channelwise_group_norm(unet)
            use_channelwise_group_norm(vae.decoder)
    if compilation:
        compilation.apply(unet, vae)
    return GraphedUNet(unet) if is_cuda else unet


def memory_format(device: torch.device, compilation: "Compilation | None") -> torch.memory_format:
    """Return the layout in which a model's passes are fastest.

    On a GPU torch's group norm returns its channels apart, so that without a compiler nearly every convolution would
    have to put them side by side again: a quarter of the time of a pass.
    """
    is_compiled = compilation is not None and not compilation.is_regional
    return torch.contiguous_format if device.type == "cuda" and not is_compiled else torch.channels_last


# Cross-attention to one token ----------------------------------------------------------------------------------------


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
    """Make a UNet's cross-attention use what `token_vectors` returns; leave a UNet of another make as it is."""
    layers = list(_attention(unet, is_cross=True))
    if not all(_is_plain(layer) for layer in layers):
        return
    start = 0
    for layer in layers:
        stop = start + layer.to_out[0].out_features
        layer.set_processor(SingleTokenAttnProcessor(start, stop))
        start = stop
    for block in unet.modules():
        if isinstance(getattr(getattr(block, "attn2", None), "processor", None), SingleTokenAttnProcessor):
            block.norm2 = nn.Identity()  # of what no layer looks at any more


def token_vectors(unet: nn.Module, tokens: Tensor) -> Tensor:
    """Make the `encoder_hidden_states` of a UNet from its condition: [batch, 1, cross_attention_dim] -> [batch, 1, any].

    They are the same at every step. For a UNet that `use_single_token` did not touch, they are the tokens.
    """
    cross_attention = _attention(unet, is_cross=True)
    layers = [layer for layer in cross_attention if isinstance(layer.processor, SingleTokenAttnProcessor)]
    if not layers:
        return tokens
    tokens = tokens.to(layers[0].to_v.weight.dtype)
    return torch.cat([layer.to_out[1](layer.to_out[0](layer.to_v(tokens))) for layer in layers], dim=-1)


def _attention(unet: nn.Module, *, is_cross: bool) -> Iterator[Any]:
    return (module for module in unet.modules() if getattr(module, "is_cross_attention", None) is is_cross)


def _is_plain(attn: Any) -> bool:
    return (
        type(attn.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
        and attn.norm_cross is None
        and attn.spatial_norm is None
        and attn.added_kv_proj_dim is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )


# Self-attention ------------------------------------------------------------------------------------------------------


class FusedSelfAttnProcessor:
    """Self-attention with queries, keys and values from one matrix product."""

    def __init__(self, *, is_flex: bool) -> None:
        self._is_flex = is_flex

    def __call__(self, attn: Any, hidden_states: Tensor, *others: Any, **masks: Any) -> Tensor:
        """[batch, positions, channels] -> the same."""
        batch, positions, _ = hidden_states.shape
        qkv = attn.to_qkv(hidden_states).view(batch, positions, 3, attn.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, heads, positions, channels of a head]
        is_flex = self._is_flex and torch.compiler.is_compiling()  # not compiled, it would be the slowest of all
        if is_flex and positions >= _MANY_POSITIONS and query.shape[-1] in _FLEX_HEADS:
            from torch.nn.attention.flex_attention import flex_attention

            attended = flex_attention(query, key, value, scale=attn.scale)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).reshape(batch, positions, -1)))


def use_fused_self_attention(unet: "UNet2DConditionModel", *, is_flex: bool) -> None:
    """Make a UNet's self-attention compute queries, keys and values in one product; leave other makes as they are.

    is_flex: compiled models may have the kernel for small heads that `flex_attention` generates.
    """
    for attn in _attention(unet, is_cross=False):
        if _is_plain(attn) and attn.group_norm is None and attn.norm_q is None and not attn.upcast_attention:
            attn.to_qkv = _side_by_side([attn.to_q, attn.to_k, attn.to_v])
            attn.set_processor(FusedSelfAttnProcessor(is_flex=is_flex))


def _side_by_side(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that gives what these give of the same input, side by side. Draws no random numbers, as a new one would."""
    with torch.device("meta"):
        layer = nn.Linear(
            layers[0].in_features, sum(one.out_features for one in layers), bias=layers[0].bias is not None
        )
    layer.weight = nn.Parameter(torch.cat([one.weight for one in layers]), requires_grad=False)
    if layers[0].bias is not None:
        layer.bias = nn.Parameter(torch.cat([one.bias for one in layers]), requires_grad=False)
    return layer


# Timesteps -----------------------------------------------------------------------------------------------------------


class _TimestepTable(nn.Module):
    """[batch] timesteps -> [batch, sum of all blocks' channels]: what the blocks add to their channels."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.table[timesteps]  # type: ignore[index]


class _Slice(nn.Module):
    """[batch, channels] -> those from `start` to `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding[:, self.start : self.stop]


class _First(nn.Module):
    """Returns its first argument."""

    def forward(self, embedding: Tensor, *others: Any) -> Tensor:
        return embedding


@torch.no_grad()
def use_timestep_table(unet: "UNet2DConditionModel", num_train_timesteps: int) -> None:
    """Make a UNet look up what its blocks compute of a timestep, from a table of all timesteps of training.

    They are the same for every image: two dozen small layers at every step for nothing. A UNet of another make is left
    as it is.
    """
    blocks = [*unet.down_blocks, *unet.up_blocks, *([unet.mid_block] if unet.mid_block is not None else [])]
    is_plain = type(unet.time_proj).__name__ == "Timesteps" and unet.time_embed_act is None
    if not is_plain or not {type(block).__name__ for block in blocks} <= _BLOCKS:
        return
    resnets = [module for module in unet.modules() if isinstance(getattr(module, "time_emb_proj", None), nn.Linear)]
    timesteps = torch.arange(num_train_timesteps, device=unet.device)
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))
    columns: list[Tensor] = []
    start = 0
    for resnet in resnets:
        activated = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
        columns.append(resnet.time_emb_proj(activated))
        stop = start + columns[-1].shape[1]
        resnet.time_emb_proj, resnet.skip_time_act = _Slice(start, stop), True
        start = stop
    unet.time_proj, unet.time_embedding = _TimestepTable(torch.cat(columns, dim=1)), _First()


# Group normalization -------------------------------------------------------------------------------------------------


class ChannelwiseGroupNorm(nn.Module):
    """Group normalization whose sums run over positions, channel by channel, and only then over a group's channels.

    Where channels lie side by side in memory, a compiler makes of it reads of whole cache lines; a group alone is a few
    channels. Deviations are taken from each channel's first value, so that little cancels where a mean is large: were that
    value itself a hundred deviations off, the relative error would be 4e-4 in float32.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same; of other shapes, small images, or not compiled, torch's own."""
        if x.dim() != 4 or x.shape[2] * x.shape[3] < _MANY_POSITIONS or not torch.compiler.is_compiling():
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        batch, channels = x.shape[:2]
        groups = (batch, self.num_groups, channels // self.num_groups)
        first = x[:, :, :1, :1].float()
        deviation = x.float() - first
        of_channel = deviation.mean((2, 3))
        variance_of_channel = (deviation * deviation).mean((2, 3)) - of_channel * of_channel
        mean_of_channel = (of_channel + first.flatten(1)).view(groups)
        mean = mean_of_channel.mean(-1, keepdim=True)
        between = mean_of_channel - mean
        variance = variance_of_channel.view(groups).mean(-1, keepdim=True) + (between * between).mean(-1, keepdim=True)
        scale = torch.rsqrt(variance.clamp(min=0) + self.eps) * self.weight.float().view(1, *groups[1:])
        shift = self.bias.float().view(1, *groups[1:]) - mean * scale
        per_channel = (batch, channels, 1, 1)
        return (x.float() * scale.view(per_channel) + shift.view(per_channel)).to(x.dtype)


def use_channelwise_group_norm(module: nn.Module) -> None:
    """Replace the group norms within a module that is compiled for a GPU by ChannelwiseGroupNorm."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm) and child.affine:
                setattr(parent, name, ChannelwiseGroupNorm(child))


# Compilation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """How a job's models are compiled."""

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

    def check(self, device: torch.device) -> None:
        """Raise ValueError for what does not go with a job on a device."""
        if device.type == "cuda" and self.options["backend"] == "cudagraphs":
            raise ValueError(
                "cudagraphs compiles nothing and records passes, as a job does in any case; needed: inductor or no"
            )
        version = tuple(int(number) for number in torch.__version__.split(".")[:2])
        if device.type == "cuda" and version < _FIRST_DETERMINISTIC:
            needed = ".".join(map(str, _FIRST_DETERMINISTIC))
            raise ValueError(
                f"torch {torch.__version__} chooses a compiled model's kernels on a GPU by timing them, so that two "
                f"processes may differ in last bits, needed: torch {needed} or later, or --dynamo_backend no"
            )

    def apply(self, unet: "UNet2DConditionModel", vae: "AutoencoderKL") -> None:
        """Compile these models, at their first pass.

        On a CPU their weights become constants of the graph, laid out for its kernels, without which nothing is gained;
        but blocks that are alike differ in their weights and would not share a graph.
        """
        from torch._inductor import config  # slow to import

        if hasattr(config, "deterministic"):  # since torch 2.10
            config.deterministic = True  # no kernel is chosen by timing
        config.freezing = unet.device.type == "cpu" and not self.is_regional
        options = dict(self.options)
        options["dynamic"] = bool(options.get("dynamic"))  # a second shape, of guided steps, gets kernels of its own
        if unet.device.type == "cuda":  # a pass is a CUDA graph in any case, without Inductor's copies and checks
            config.triton.cudagraphs = False
            options.pop("mode" if options.get("mode") == "reduce-overhead" else "", None)
        if self.is_regional:
            unet.compile_repeated_blocks(**options)
        else:
            unet.compile(**options)
            vae.decoder.compile(**options)


# A pass recorded as a CUDA graph ------------------------------------------------------------------------------------------


class GraphedUNet(nn.Module):
    """A UNet on a GPU whose pass is recorded once, as a CUDA graph, and replayed: one launch instead of hundreds.

    What a host needs to launch a pass kernel by kernel is longer than a fast GPU computes. The kernels are those of the
    UNet itself, compiled or not, and so are the bits. The arithmetic between passes is the caller's.
    """

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self._recordings: dict[tuple[Any, ...], _Recording] = {}

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Compute `unet(sample, timestep, encoder_hidden_states)[0]`. The next pass overwrites what this one returns.

        There is a recording for every shape of the inputs: two, where only some of the steps are guided.
        """
        given = (sample, timestep, encoder_hidden_states)
        kind = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if kind not in self._recordings:
            self._recordings[kind] = _record(self.unet, given)
        recording = self._recordings[kind]
        for kept, new in zip(recording.inputs, given, strict=True):
            kept.copy_(new)
        recording.graph.replay()
        return (recording.output,)

    def forget(self) -> None:
        """Forget what was recorded, and free its memory."""
        self._recordings = {}


@dataclass(frozen=True)
class _Recording:
    """A pass as a graph, between tensors that stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


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
