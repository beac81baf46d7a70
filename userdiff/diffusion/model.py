"""A job's models as its flags name them: loaded, checked against each other, on their device, and identified."""

import platform
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from userdiff.config import JobConfig, UsageError, errors_of
from userdiff.diffusion import acceleration
from userdiff.diffusion import checkpoint as models
from userdiff.diffusion.acceleration import Compilation
from userdiff.diffusion.conditioning import (
    IncompatibleWeightsError,
    UserConditionEncoder,
    load_condition_encoder,
    random_condition_encoder,
    user_index_map,
)
from userdiff.diffusion.cuda_graph import GraphedUNet
from userdiff.diffusion.sampler import latents_shape
from userdiff.identity import identity_hash, make_identity
from userdiff.text import format_ids

MAX_JOB_IMAGES = 10**8  # the plan of so many takes gigabytes
_CPU = torch.device("cpu")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """The models of a job, on their device and in their precision, and what of them decides the pixels."""

    unet: UNet2DConditionModel | GraphedUNet
    """Called as `unet(latents, timestep, encoder_hidden_states, return_dict=False)`."""
    vae: AutoencoderKL
    condition_encoder: UserConditionEncoder
    scheduler: DDIMScheduler
    user_index: dict[int, int]
    """User id -> row of the embedding."""
    conditioning: str
    """`trained` or `random`."""
    device: torch.device
    compiled: str
    """How the models are compiled: `inductor`, for instance; `no` where they are not."""
    identity: dict[str, Any]
    """What decides the pixels; see `userdiff.identity`."""

    @property
    def uncompressed_bytes(self) -> int:
        """The size of one image, a byte a value."""
        _, height, width = latents_shape(self.unet)
        enlargement = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(height * width * enlargement**2 * self.vae.config.out_channels)

    @property
    def device_name(self) -> str:
        """The name of the GPU, or the CPU's architecture."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()

    @property
    def run(self) -> str:
        """The identity hash."""
        return identity_hash(self.identity)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bf16. Any CPU does, if without the instructions many times slower."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def load_model(
    config: JobConfig,
    device: torch.device = _CPU,
    precision: str = "no",
    compilation: Compilation | None = None,
) -> JobModel:
    """Load and check everything the pixels come from; raises UsageError naming the flag of what is wrong.

    precision: `no` (float32), `fp16` or `bf16`.
    """
    user_index = _user_index(config)
    _check_precision(precision, device)
    if compilation:
        with errors_of("--dynamo_backend"):
            compilation.check(device)
    with errors_of("--scheduler_path"):
        scheduler = models.ddim_scheduler(models.load_noise_scheduler(config.scheduler_path))
    _check_steps(config.num_inference_steps, scheduler)
    with errors_of("--vae_path"):
        vae = models.load_vae(config.vae_path)
    with errors_of("--unet_path"):
        unet = models.load_unet(config.unet_path)
        models.check_agreement(vae, unet)
    encoder, trained = _load_condition_encoder(config, unet.config.cross_attention_dim)
    contents = {
        "vae": {"weights": models.content_hash(vae.state_dict()), "config": models.config_values(vae)},
        "unet": {"weights": models.content_hash(unet.state_dict()), "config": models.config_values(unet)},
        "condition_encoder": models.content_hash(encoder.state_dict()),
        "noise_schedule": models.config_values(scheduler),
        "user_index": user_index,
    }
    vae_precision = _vae_precision(vae, device, precision)
    memory_format = acceleration.memory_format(device, compilation)
    unet, vae = _place(unet, device, precision, memory_format), _place(vae, device, vae_precision, memory_format)
    return JobModel(
        unet=acceleration.speed_up(unet, vae, scheduler.config.num_train_timesteps, compilation),
        vae=vae,
        condition_encoder=encoder.to(device),
        scheduler=scheduler,
        user_index=user_index,
        conditioning=trained,
        device=device,
        compiled=str(compilation or "no"),
        identity=_identity(config, contents, precision, vae_precision, trained),
    )


def _identity(
    config: JobConfig, contents: dict[str, Any], precision: str, vae_precision: str, conditioning: str
) -> dict[str, Any]:
    required = {**contents, "seed": config.seed, "num_inference_steps": config.num_inference_steps}
    options = {
        "eta": float(config.eta),
        "mixed_precision": precision,
        "vae_precision": "bf16" if (precision, vae_precision) == ("fp16", "bf16") else "default",
        "vae_output_range": config.vae_output_range,
        "conditioning": conditioning,
    }
    return make_identity(required, options)


def _vae_precision(vae: AutoencoderKL, device: torch.device, precision: str) -> str:
    """Choose the precision of the VAE: many overflow in fp16, and say so in `force_upcast`.

    On a GPU with bf16, which has the range of float32, it is that; float32 would take longer than the UNet.
    """
    if precision != "fp16" or not vae.config.force_upcast:
        return precision
    return "bf16" if device.type == "cuda" and has_bf16(device) else "no"


def _place(module: torch.nn.Module, device: torch.device, precision: str, memory_format: torch.memory_format) -> Any:
    # torch's own `to`: the one diffusers puts over it warns of modules to keep in float32 even where there are none
    to: Any = torch.nn.Module.to
    return to(module, device, DTYPES[precision], memory_format=memory_format)


def _user_index(config: JobConfig) -> dict[int, int]:
    with errors_of("--user_map"):
        user_index = user_index_map(config.num_users, config.train_user_ids, config.user_map)
    unknown = [user_id for user_id in config.user_ids or () if user_id not in user_index]
    if unknown:
        raise UsageError(
            f"--user_ids: {format_ids(unknown)} is out of range, this checkpoint has users {format_ids(user_index)}"
        )
    num_images = len(config.user_ids or user_index) * config.num_images_per_user
    if num_images > MAX_JOB_IMAGES:
        raise UsageError(
            f"--num_images_per_user: {config.num_images_per_user} are {num_images} images of all users, needed: at most "
            f"{MAX_JOB_IMAGES} in one job; the same folder takes the rest of the --user_ids in another"
        )
    return user_index


def _check_steps(num_inference_steps: int, scheduler: DDIMScheduler) -> None:
    steps = scheduler.config.num_train_timesteps
    if num_inference_steps > steps:
        raise UsageError(
            f"--num_inference_steps: {num_inference_steps} is out of range, needed: 1 to {steps}, the steps of training"
        )
    scheduler.set_timesteps(num_inference_steps)
    first, last = int(scheduler.timesteps.max()), int(scheduler.timesteps.min())
    if not 0 <= last <= first < steps:
        raise UsageError(
            f"--num_inference_steps: {num_inference_steps} asks for the steps {first} to {last} of training, needed: "
            f"{steps - 1} to 0; fewer, or another steps_offset in --scheduler_path"
        )


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in DTYPES:
        raise UsageError(f"--mixed_precision: {precision!r}, asked for by the launcher, is none of {', '.join(DTYPES)}")
    if precision == "bf16" and not has_bf16(device):
        raise UsageError(f"--mixed_precision: {torch.cuda.get_device_name(device)} has no bf16, use fp16")


def _load_condition_encoder(config: JobConfig, embed_dim: int) -> tuple[UserConditionEncoder, str]:
    with errors_of("--condition_encoder_path"):
        try:
            encoder = load_condition_encoder(config.condition_encoder_path, config.num_users, embed_dim)
            return encoder, "trained"
        except IncompatibleWeightsError:
            if config.on_incompatible_weights == "error":
                raise
            return random_condition_encoder(config.num_users, embed_dim, config.seed), "random"
