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

IMAGE_CHANNELS = (1, 3, 4)  # that a PNG may have
_WEIGHTS = "diffusion_pytorch_model"
_DDIM_KNOWS = {  # in diffusers; of some it would say so only in the middle of a job
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_AS_SAVED = "needed: what diffusers' save_pretrained writes"
_OTHER_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")


def load_vae(path: Path) -> AutoencoderKL:
    """Load an `AutoencoderKL` in float32 from a diffusers folder, or from one holding it as `vae/`."""
    vae = _load(AutoencoderKL, _find(path, "vae"))
    factor, channels = vae.config.scaling_factor, vae.config.out_channels
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise ValueError(f"scaling_factor is {factor!r}, needed: a number above 0, what latents were multiplied by")
    if channels not in IMAGE_CHANNELS:
        raise ValueError(f"the VAE makes images of {channels} channels, needed: 1, 3 or 4, as a PNG has")
    return vae


def load_unet(path: Path) -> UNet2DConditionModel:
    """Load a `UNet2DConditionModel` in float32 from a diffusers folder, or from one holding it as `unet/`."""
    return _load(UNet2DConditionModel, _find(path, "unet"))


def load_noise_scheduler(path: Path | None) -> SchedulerMixin:
    """Load the noise schedule a model was trained with; without a path, the training default.

    `path` is a folder with `scheduler_config.json`, of any scheduler class whose settings DDIM understands, or one
    holding it as `scheduler/`. Raises ValueError for settings that nothing could be sampled with.
    """
    if path is None:
        return DDPMScheduler(**TRAINING_NOISE)
    file = _find(path, "scheduler", "scheduler_config.json") / "scheduler_config.json"
    settings = _read_json(file)
    if "beta_schedule" not in settings:  # DDIM would take its own default; schedulers of flow matching have none
        raise ValueError(f"{file} has no beta_schedule, needed: the noise schedule of training")
    for name, known in _DDIM_KNOWS.items():
        value = settings.get(name, known[0])
        if value not in known:
            raise ValueError(f"{file} has {name} {value!r}, which is none of {', '.join(known)}")
    try:
        scheduler = DDIMScheduler.from_config(settings)
        scheduler.set_timesteps(1)
    except Exception as error:  # a setting may be anything
        raise ValueError(f"{file} is no noise schedule: {_one_line(error)}; {_AS_SAVED}") from error
    alphas = scheduler.alphas_cumprod
    if len(alphas) != scheduler.config.num_train_timesteps or not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ValueError(f"{file} is no noise schedule, needed: num_train_timesteps betas from 0 to 1")
    return scheduler


def ddim_scheduler(noise_scheduler: SchedulerMixin) -> DDIMScheduler:
    """Make the sampler's scheduler from the training loop's, whatever its class.

    Differs from `DDIMScheduler.from_config(noise_scheduler.config)` in one thing: settings that diffusers noted as
    defaults (positional arguments are, whatever their value) are kept, not reset to DDIM's own defaults.
    """
    config = {key: value for key, value in noise_scheduler.config.items() if key != "_use_default_values"}
    return DDIMScheduler.from_config(config)


def check_agreement(vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless the UNet makes latents the VAE decodes, and takes the user's condition and no other."""
    found, needed = unet.config.in_channels, vae.config.latent_channels
    if found != needed:
        raise ValueError(f"the UNet makes latents of {found} channels, the VAE decodes {needed}; they must be equal")
    if unet.config.out_channels != found:
        raise ValueError(f"the UNet has {found} channels in and {unet.config.out_channels} out; they must be equal")
    size = unet.config.sample_size
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
    if not all(type(side) is int and side >= 1 for side in sides):
        raise ValueError(f"sample_size is {size!r}, needed: the side of the latents, a whole number from 1 on")
    if not isinstance(unet.config.cross_attention_dim, int):
        raise ValueError(f"cross_attention_dim is {unet.config.cross_attention_dim!r}, needed: one whole number")
    for name in _OTHER_CONDITIONS:
        if unet.config[name] is not None:
            raise ValueError(f"{name} is {unet.config[name]!r}, needed: none, the user's token is the only condition")


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, shape and float32 value: the same however and in whatever file they were stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def config_values(configured: ConfigMixin) -> dict[str, Any]:
    """Return the settings of a model or scheduler that differ from its class's defaults, and nothing else.

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


def _find(path: Path, name: str, config_name: str = "config.json") -> Path:
    for folder in (path, path / name):
        if (folder / config_name).is_file():
            return folder
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder, needed: one that holds {config_name}, or holds it in {name}/")
    raise FileNotFoundError(f"{path} holds no {config_name}, nor does {path / name}, {_AS_SAVED}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON, {_AS_SAVED}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object, {_AS_SAVED}")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _load(model_class: Any, folder: Path) -> Any:
    found = _read_json(folder / "config.json").get("_class_name", "model of no class")
    if found != model_class.__name__:
        raise ValueError(f"{folder} holds a {found}, needed: {model_class.__name__}")
    if not any(file.is_file() for file in folder.glob(f"{_WEIGHTS}.*")):
        raise FileNotFoundError(f"{folder} holds no weights, needed: {_WEIGHTS}.safetensors")
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
    except OSError as error:  # what diffusers makes of whatever reading the weights raises
        what = "a file of it is empty, cut short, missing, or not what diffusers' save_pretrained writes"
        raise ValueError(f"{folder} holds weights that cannot be read; {what}") from error
    except Exception as error:  # a setting of config.json may be anything
        raise ValueError(f"{folder} cannot be loaded: {_one_line(error)}; {_AS_SAVED}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    _check_loading(info, folder)
    _check_finite(model, folder)
    return model.eval().requires_grad_(False)


def _check_loading(info: dict[str, Any], folder: Path) -> None:
    for name, found, needed in info["mismatched_keys"]:
        raise ValueError(f"{folder} has {name} with shape {list(found)}, needed {list(needed)} by its config.json")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{folder} has no tensor {name}, needed by its config.json")
    for name in sorted(info["unexpected_keys"]):
        raise ValueError(f"{folder} has a tensor {name} that its config.json has no place for")
    for message in info["error_msgs"]:
        raise ValueError(f"{folder} cannot be loaded: {message}; {_AS_SAVED}")


def _check_finite(model: torch.nn.Module, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        # of the extremes, which NaN takes for its own: seconds faster than asking every number
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise ValueError(f"{folder} holds NaN or infinity in {name}; the file is damaged or training diverged")
