"""Loading the VAE, the UNet and the noise schedule, strictly, and hashing what was loaded."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

# What the training loop builds. By keyword: diffusers notes positional arguments as defaults, which `from_config` of
# another scheduler class then drops without a word.
TRAINING_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
}


def load_vae(path: Path) -> AutoencoderKL:
    """Load an `AutoencoderKL` in float32 from a diffusers folder, or from one holding it as `vae/`."""
    return _load(AutoencoderKL, _model_folder(path, "vae"))


def load_unet(path: Path) -> UNet2DConditionModel:
    """Load a `UNet2DConditionModel` in float32 from a diffusers folder, or from one holding it as `unet/`."""
    return _load(UNet2DConditionModel, _model_folder(path, "unet"))


def load_noise_scheduler(path: Path | None) -> SchedulerMixin:
    """Load the noise schedule a model was trained with; without a path, the training default.

    `path` is a folder with `scheduler_config.json`, of any scheduler class whose settings DDIM understands, or one
    holding it as `scheduler/`.
    """
    if path is None:
        return DDPMScheduler(**TRAINING_NOISE)
    file = next(
        (f for f in (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json") if f.is_file()), None
    )
    if file is None:
        raise FileNotFoundError(f"{path} holds no scheduler_config.json")
    return DDIMScheduler.from_config(_read_json(file))


def ddim_scheduler(noise_scheduler: SchedulerMixin) -> DDIMScheduler:
    """Make the sampler's scheduler from the training loop's, whatever its class.

    Differs from `DDIMScheduler.from_config(noise_scheduler.config)` in one thing: settings that diffusers noted as
    defaults (positional arguments are, whatever their value) are kept, not reset to DDIM's own defaults.
    """
    config = {key: value for key, value in noise_scheduler.config.items() if key != "_use_default_values"}
    return DDIMScheduler.from_config(config)


def check_agreement(vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless the UNet makes latents the VAE decodes, and takes a condition at all."""
    found, needed = unet.config.in_channels, vae.config.latent_channels
    if found != needed:
        raise ValueError(f"the UNet makes latents of {found} channels, the VAE decodes {needed}")
    if unet.config.out_channels != found:
        raise ValueError(f"the UNet has {found} channels in and {unet.config.out_channels} out; they must be equal")
    if unet.config.sample_size is None:
        raise ValueError("the UNet's config.json has no sample_size, the side of its latents")
    if not isinstance(unet.config.cross_attention_dim, int):
        raise ValueError(f"cross_attention_dim is {unet.config.cross_attention_dim!r}, needed: one whole number")


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, shape and float32 value: the same however and in whatever file they were stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def config_values(configured: ConfigMixin) -> dict[str, Any]:
    """Give the settings of a model or scheduler that differ from its class's defaults, and nothing else.

    So neither a path, nor a version, nor an option that a later diffusers adds, counts as a difference.
    """
    parameters = inspect.signature(type(configured).__init__).parameters
    return {
        name: value
        for name, value in configured.config.items()
        if name in parameters and _plain(value) != _plain(parameters[name].default)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _model_folder(path: Path, name: str) -> Path:
    for folder in (path, path / name):
        if (folder / "config.json").is_file():
            return folder
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; expected a diffusers model folder or one holding {name}/")
    raise FileNotFoundError(f"{path} holds no config.json, nor does {path / name}; expected a diffusers model folder")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _load(model_class: Any, folder: Path) -> Any:
    found = _read_json(folder / "config.json").get("_class_name")
    if found != model_class.__name__:
        raise ValueError(f"{folder} holds a {found}, needed: {model_class.__name__}")
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # what it would warn of is raised below
    try:
        model, info = model_class.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            torch_dtype=torch.float32,
        )
    except Exception as error:  # diffusers, safetensors and pickle each fail in ways of their own
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    _check_loading(info, folder)
    _check_finite(model, folder)
    return model.eval().requires_grad_(False)


def _check_loading(info: dict[str, Any], folder: Path) -> None:
    for name, found, needed in info["mismatched_keys"]:
        raise ValueError(f"{folder} has {name} with shape {list(found)}, needed {list(needed)}")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{folder} has no tensor {name}")
    for name in sorted(info["unexpected_keys"]):
        raise ValueError(f"{folder} has a tensor {name} that its config.json has no place for")
    for message in info["error_msgs"]:
        raise ValueError(f"{folder} cannot be loaded: {message}")


def _check_finite(model: torch.nn.Module, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder} holds NaN or infinity in {name}; the file is damaged or training diverged")
