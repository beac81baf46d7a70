"""What each change to a model's passes is worth on a GPU: a UNet's pass and a decoder's, one change more a row."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import checkpoint
from benchmarks.gpu_checks import COMPILATION, Rows, Setting
from userdiff.diffusion import acceleration
from userdiff.diffusion.acceleration import GraphedUNet
from userdiff.job import run as runner

REPEATS = 20
ROUNDS = 3
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def variants(setting: Setting) -> Rows:
    """Measure a pass as diffusers has it, and with one change more at a time; then layouts, batch sizes, the decoder."""
    runner.set_kernels(allow_tf32=False)
    size = 2 if setting.smoke else 64
    folder = setting.checkpoint("in use")
    plain = UNet2DConditionModel.from_pretrained(folder / "unet").eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    steps: list[tuple[str, Callable[[Any], Any]]] = [
        ("launched kernel by kernel", lambda unet: unet),
        ("recorded", recorded),
        ("+ one token needs no attention", then(acceleration.use_single_token)),
        ("+ table of timesteps", then(lambda unet: acceleration.use_timestep_table(unet, 1000))),
        (
            "+ fused queries, keys, values",
            then(lambda unet: acceleration.use_fused_self_attention(unet, is_flex=False)),
        ),
    ]
    for layout in (torch.channels_last, torch.contiguous_format):
        unet = placed(setting, plain, layout)
        for name, change in steps:
            unet = change(unet)
            yield setting.say(
                f"UNet, {layout}, {name}", milliseconds(setting, unet, inputs(setting, unet, size, layout))
            )
    for backend in () if setting.smoke else BACKENDS:
        with sdpa_kernel(backend):
            again = GraphedUNet(unet.unet)
            given = inputs(setting, again, size, layout)
            yield setting.say(f"the last with {backend}", milliseconds(setting, again, given))
    for number in (1, 2) if setting.smoke else (16, 32, 128, 256):
        given = inputs(setting, unet, number, layout)
        yield setting.say(f"the last in batches of {number}", milliseconds(setting, unet, given))
    if not setting.smoke:
        for name, change in (
            ("compiled", lambda unet: unet),
            ("compiled, flex_attention", then(lambda unet: acceleration.use_fused_self_attention(unet, is_flex=True))),
            ("compiled, norms by channel", then(acceleration.use_channelwise_group_norm)),
        ):
            unet = placed(setting, plain, torch.channels_last)
            for _, step in steps[2:]:
                unet = step(unet)
            unet = change(unet)
            COMPILATION.apply(unet, copy.deepcopy(vae))
            given = inputs(setting, unet, size, torch.channels_last)
            yield setting.say(f"UNet, all of these, {name}, recorded", milliseconds(setting, recorded(unet), given))
    for layout in (torch.channels_last, torch.contiguous_format):
        decoder = placed(setting, vae, layout)
        for number in (1, 2) if setting.smoke else (4, 8, 16, 32, 64):
            latents = torch.randn(number, 4, checkpoint.LATENTS, checkpoint.LATENTS).to(setting.device, decoder.dtype)
            latents = latents.contiguous(memory_format=layout)
            text = milliseconds(
                setting, lambda latents, vae=decoder: vae.decode(latents, return_dict=False), (latents,)
            )
            yield setting.say(f"VAE, {layout}, {number} at once", text)


def then(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Make a step of a change in place: of a recorded UNet, the UNet itself is changed and recorded anew."""

    def step(unet: Any) -> Any:
        inner = unet.unet if isinstance(unet, GraphedUNet) else unet
        change(inner)
        return GraphedUNet(inner) if isinstance(unet, GraphedUNet) else inner

    return step


def recorded(unet: Any) -> Any:
    """Return a UNet as a CUDA graph; itself on a CPU."""
    return GraphedUNet(unet) if unet.device.type == "cuda" else unet


def placed(setting: Setting, model: Any, layout: torch.memory_format) -> Any:
    """Return a copy on the device, in bf16 where that is a GPU."""
    dtype = torch.float32 if setting.smoke else torch.bfloat16
    return nn.Module.to(copy.deepcopy(model), setting.device, dtype, memory_format=layout)


def inputs(setting: Setting, unet: Any, size: int, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    """Draw latents, a timestep and a condition."""
    dtype = next(unet.parameters()).dtype
    latents = torch.randn(size, 4, checkpoint.LATENTS, checkpoint.LATENTS).to(setting.device, dtype)
    tokens = torch.randn(size, 1, checkpoint.EMBED_DIM).to(setting.device, dtype)
    vectors = acceleration.token_vectors(unet, tokens).contiguous()
    return latents.contiguous(memory_format=layout), torch.tensor(501, device=setting.device), vectors


@torch.inference_mode()
def milliseconds(setting: Setting, function: Callable[..., Any], given: tuple[Tensor, ...]) -> str:
    """Measure calls one after the other: milliseconds a call and an image, the median of some rounds."""
    options = {} if len(given) == 1 else {"return_dict": False}
    repeats, times = 1 if setting.smoke else REPEATS, []
    for number in range(1 + ROUNDS):  # the first warms up
        started = time.perf_counter()
        for _ in range(repeats if number else 2):
            function(*given, **options)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / repeats * 1000)
    median = statistics.median(times[1:])
    return f"{median:.2f} ms, {median / len(given[0]):.3f} an image"


PARTS: dict[str, Callable[[Setting], Rows]] = {"variants": variants}
