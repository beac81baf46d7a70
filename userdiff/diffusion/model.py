"""A job's models as its flags name them: loaded, checked against each other, on their device, and identified."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from userdiff.config import JobConfig, UsageError, errors_of, null_condition_row
from userdiff.diffusion import acceleration
from userdiff.diffusion import checkpoint as models
from userdiff.diffusion.acceleration import Compilation, GraphedUNet
from userdiff.diffusion.conditioning import (
    IncompatibleWeightsError,
    UserConditionEncoder,
    load_condition_encoder,
    null_token,
    random_condition_encoder,
    user_ids_of_folders,
    user_index_map,
)
from userdiff.diffusion.sampler import latents_shape
from userdiff.diffusion.schedule import (
    check_steps_finite,
    check_timesteps,
    ddim_scheduler,
    load_noise_scheduler,
    schedule_beside,
)
from userdiff.identity import identity_hash, make_identity
from userdiff.text import count, format_ids

MAX_JOB_IMAGES = 10**8  # the plan of so many takes gigabytes
_CPU = torch.device("cpu")
_DECIDE_PIXELS = (  # flags, beside what lies in the files that they name
    *("vae_path", "unet_path", "unet_config", "condition_encoder_path", "scheduler_path", "train_user_ids"),
    *("train_data_dir", "user_map", "null_row", "sample_size", "scaling_factor", "vae_output_range"),
    *("on_incompatible_weights", "num_inference_steps", "seed", "eta", "mixed_precision"),
    *("guidance_scale", "null_condition", "guidance_start", "guidance_stop"),
)
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
    config: JobConfig
    """The flags with which they were loaded."""
    schedule: Path | None
    """Where the noise schedule was read; None for the training default."""
    notes: tuple[str, ...] = ()
    """Which files were chosen where others lie beside them, a line each."""
    warnings: tuple[str, ...] = ()
    """What in the files contradicts itself, a line each."""

    @property
    def uncompressed_bytes(self) -> int:
        """The size of one image, a byte a value."""
        height, width, channels = self.image_shape
        return height * width * channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of an image."""
        _, height, width = latents_shape(self.unet)
        times = models.enlargement(self.vae)
        return height * times, width * times, self.vae.config.out_channels

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
    device: torch.device | str = _CPU,
    precision: str = "no",
    compilation: Compilation | None = None,
) -> JobModel:
    """Load and check everything the pixels come from; raises UsageError naming the flag of what is wrong.

    precision: `no` (float32), `fp16` or `bf16`.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: no CUDA device is available here, use --device cpu")
    _check_precision(precision, device)
    if compilation:
        with errors_of("--dynamo_backend"):
            compilation.check(device)
    notes: list[str] = []
    warnings: list[str] = []
    with errors_of("--vae_path"):
        vae = models.load_vae(config.vae_path, notes.append)
        models.check_vae_runs(vae)
    with errors_of("--unet_config"):
        unet_config = config.unet_config and models.config_file(config.unet_config)
    with errors_of("--unet_path"):
        unet = models.load_unet(config.unet_path, unet_config, notes.append)
        if config.sample_size:
            side, *rest = config.sample_size
            unet.register_to_config(sample_size=[side, *rest] if rest else side)
        models.check_agreement(vae, unet)
        if not config.sample_size and (other := models.other_sample_size(vae, unet)):
            warnings.append(_contradicting_sizes(vae, unet, other))
        if config.scaling_factor:
            vae.register_to_config(scaling_factor=config.scaling_factor)
        models.check_unet_runs(unet)
    with errors_of("--scheduler_path"):
        schedule = config.scheduler_path or schedule_beside(config.unet_path, unet_config)
        scheduler = ddim_scheduler(load_noise_scheduler(schedule))
    with errors_of("--num_inference_steps"):
        check_timesteps(scheduler, config.num_inference_steps)
    with errors_of("--scheduler_path"):
        check_steps_finite(scheduler, config.num_inference_steps, config.eta)
    encoder, trained = _load_condition_encoder(config, unet.config.cross_attention_dim, notes.append)
    user_index = _user_index(config, encoder.user_embedding.num_embeddings, notes.append, warnings.append)
    _check_null_condition(config, encoder, user_index, warnings.append)
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
        identity=_identity(config, contents, precision, vae_precision, trained, models.shifts_latents(vae)),
        config=config,
        schedule=schedule,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def check_config(model: JobModel, config: JobConfig) -> None:
    """Raise ValueError where a model was loaded with other flags than these, so that its images would be others."""
    for name in _DECIDE_PIXELS:
        loaded, asked = (getattr(one, name) for one in (model.config, config))
        if isinstance(loaded, Path) and isinstance(asked, Path):
            loaded, asked = loaded.absolute(), asked.absolute()
        if loaded != asked and not (name == "mixed_precision" and None in (loaded, asked)):
            raise ValueError(f"--{name}: the model was loaded with {loaded}, not {asked}, needed: load_model(config)")


def _identity(
    config: JobConfig,
    contents: dict[str, Any],
    precision: str,
    vae_precision: str,
    conditioning: str,
    shifts_latents: bool,
) -> dict[str, Any]:
    required = {**contents, "seed": config.seed, "num_inference_steps": config.num_inference_steps}
    options: dict[str, Any] = {
        "eta": float(config.eta),
        "vae_output_range": config.vae_output_range,
        "mixed_precision": precision,
        "vae_precision": "bf16" if (precision, vae_precision) == ("fp16", "bf16") else "default",
        "conditioning": conditioning,
        "latents": "shifted" if shifts_latents else "scaled",
    }
    guidance = config.guidance
    if guidance.scale != 1:  # else the other three decide nothing
        options |= {"guidance_scale": guidance.scale, "null_condition": guidance.null_condition}
        options |= {"guidance_start": guidance.start, "guidance_stop": guidance.stop}
    return make_identity(required, options)


def _check_null_condition(
    config: JobConfig, encoder: UserConditionEncoder, user_index: Mapping[int, int], on_warning: Callable[[str], None]
) -> None:
    """Raise UsageError for a null condition that the table does not have; warn of one that is a user's."""
    if config.null_condition is None:
        return
    with errors_of("--null_condition"):
        null_token(encoder, config.null_condition)
    row = null_condition_row(config.null_condition)
    owners = [user_id for user_id, of_user in user_index.items() if of_user == row]
    if owners and config.guidance_scale != 1:
        on_warning(
            f"--null_condition {config.null_condition} is the row of user {owners[0]}, so guidance leads away from them, and "
            "their own images are not guided; a trainer that has no null row is told by --null_condition zeros"
        )


def _contradicting_sizes(vae: AutoencoderKL, unet: UNet2DConditionModel, other: int) -> str:
    size, times = unet.config.sample_size, models.enlargement(vae)
    made = (
        " x ".join(str(side * times) for side in (size if isinstance(size, list | tuple) else [size] * 2)) + " pixels"
    )
    return (
        f"the UNet's sample_size {size} makes {made}, the VAE's own sample_size is {vae.config.sample_size}; "
        f"--sample_size {other} makes what the VAE was trained on, --sample_size with the UNet's says that it is right"
    )


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


def _user_index(
    config: JobConfig, num_rows: int, on_note: Callable[[str], None], on_warning: Callable[[str], None]
) -> dict[int, int]:
    """Return the row of every user; raises UsageError for users that are asked for and have none."""
    num_user_rows = num_rows - (config.null_row is not None)
    if config.null_row is not None and config.null_row >= num_rows:
        raise UsageError(
            f"--null_row: {config.null_row} is out of range, needed: 0 to {num_rows - 1}, a row of the table"
        )
    if not num_user_rows:
        raise UsageError(f"--null_row: {config.null_row} is the table's only row, needed: rows of users beside it")
    train_user_ids = config.train_user_ids
    if config.train_data_dir is not None:
        with errors_of("--train_data_dir"):
            train_user_ids = user_ids_of_folders(config.train_data_dir, on_note)
            if len(train_user_ids) != num_user_rows:
                raise ValueError(
                    f"{config.train_data_dir} has folders of {count(len(train_user_ids), 'user')}, the table has rows for "
                    f"{num_user_rows}; needed: the folders the model was trained on, all of them"
                )
    if train_user_ids and len(train_user_ids) > num_user_rows:
        raise UsageError(
            f"--train_user_ids: {len(train_user_ids)} ids, needed: {num_user_rows} at most, as the table has rows"
        )
    if train_user_ids and len(train_user_ids) < num_user_rows:
        on_warning(
            f"--train_user_ids names {len(train_user_ids)} users, the table has {num_user_rows} rows; a missing id shifts the "
            "rows of all after it"
        )
    with errors_of("--user_map"):
        user_index = user_index_map(num_rows, train_user_ids, config.user_map, config.null_row)
    unknown = [user_id for user_id in config.user_ids or () if user_id not in user_index]
    if unknown:
        is_plain = train_user_ids is None and config.user_map is None and not config.is_bundled
        gaps = "; where ids have gaps, --train_user_ids, --train_data_dir or --user_map says which row each has"
        raise UsageError(
            f"--user_ids: {format_ids(unknown)} is out of range, this checkpoint has users {format_ids(user_index)}"
            f"{gaps if is_plain else ''}"
        )
    num_images = len(config.user_ids or user_index) * config.num_images_per_user
    if num_images > MAX_JOB_IMAGES:
        raise UsageError(
            f"--num_images_per_user: {config.num_images_per_user} are {num_images} images of all users, needed: at most "
            f"{MAX_JOB_IMAGES} in one job; the same folder takes the rest of the --user_ids in another"
        )
    return user_index


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in DTYPES:
        raise UsageError(
            f"--mixed_precision: {precision!r}, asked for by the launcher, needed: one of {', '.join(DTYPES)}"
        )
    if precision == "bf16" and not has_bf16(device):
        raise UsageError(f"--mixed_precision: {torch.cuda.get_device_name(device)} has no bf16, use fp16")


def _load_condition_encoder(
    config: JobConfig, embed_dim: int, on_note: Callable[[str], None]
) -> tuple[UserConditionEncoder, str]:
    with errors_of("--condition_encoder_path"):
        try:
            encoder = load_condition_encoder(config.condition_encoder_path, config.num_users, embed_dim, on_note)
            return encoder, "trained"
        except IncompatibleWeightsError:
            if config.on_incompatible_weights == "error":
                raise
            if config.num_users is None:
                raise UsageError("--num_users: missing; the weights do not fit, and so do not tell it") from None
            return random_condition_encoder(config.num_users, embed_dim, config.seed), "random"
