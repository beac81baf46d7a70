"""Loading the VAE and the UNet, strictly, and hashing what was loaded.

A setting that is neither honoured nor known to be harmless stops.
"""

import hashlib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel
from torch import Tensor

from userdiff.diffusion.weights import (
    FILE_SUFFIXES,
    Weights,
    as_float32,
    check_fit,
    contents,
    find_weights,
    ignore,
    load_own,
    read_json,
    silence,
)
from userdiff.text import listed

_LONGEST = 200  # characters of a library's message
IMAGE_CHANNELS = (1, 3, 4)  # that a PNG may have
AS_SAVED = "needed: what diffusers' save_pretrained writes"
_OTHER_CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
_HARMLESS_OF_UNET = {  # how `EMAModel.save_pretrained` averaged
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
}


def load_vae(path: Path, on_note: Callable[[str], None] = ignore) -> AutoencoderKL:
    """Load an `AutoencoderKL` in float32 from a diffusers folder, from one holding it as `vae/`, or from a file of weights.

    on_note: called with a line on every choice between what is there.
    """
    vae = _load(AutoencoderKL, path, "vae", None, on_note)
    check_vae(vae)
    return vae


def check_vae(vae: AutoencoderKL) -> None:
    """Raise ValueError for settings with which no latents could be decoded, or no images saved."""
    config = vae.config
    if config.out_channels not in IMAGE_CHANNELS:
        raise ValueError(f"the VAE makes images of {config.out_channels} channels, needed: 1, 3 or 4, as a PNG has")
    factor = config.scaling_factor
    if not _is_finite(factor) or factor <= 0:
        raise ValueError(
            f"scaling_factor is {factor!r}, needed: a number above 0, what latents were multiplied by; --scaling_factor"
        )
    if config.shift_factor is not None and not _is_finite(config.shift_factor):
        raise ValueError(f"shift_factor is {config.shift_factor!r}, needed: a number, or null")
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        return
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = values if isinstance(values, list | tuple) else ()
        if len(numbers) != config.latent_channels or not all(map(_is_finite, numbers)):
            raise ValueError(f"{name} is {values!r}, needed: {config.latent_channels} numbers, or both null")
    if 0 in std:
        raise ValueError(f"latents_std is {std!r}, needed: numbers other than 0")
    if config.shift_factor:
        raise ValueError("shift_factor, latents_mean and latents_std are all set, needed: one way to shift latents")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_unet(
    path: Path, config_path: Path | None = None, on_note: Callable[[str], None] = ignore
) -> UNet2DConditionModel:
    """Load a `UNet2DConditionModel` in float32 from a diffusers folder, from one holding it as `unet/`, or from a file.

    A file is one of weights, or a training checkpoint that holds them under `unet_state_dict`.
    config_path: its `config.json`; by default the one that lies beside the weights.
    on_note: called with a line on every choice between what is there.
    """
    return _load(UNet2DConditionModel, path, "unet", config_path, on_note)


def config_file(path: Path) -> Path:
    """Return a UNet's config.json, given that or its folder. Raises ValueError or OSError where it cannot be read."""
    inside = [file for file in (path / "config.json", path / "unet" / "config.json") if file.is_file()]
    file = inside[0] if inside else path
    read_json(file)
    return file


def check_known(settings: Mapping[str, Any], configured: Any, harmless: set[str], source: str) -> None:
    """Raise ValueError for a setting that is set, and that this class would drop without a word."""
    parameters = parameters_of(configured)
    unknown = [
        f"{name} {value!r}"
        for name, value in settings.items()
        if name not in parameters and name not in harmless and not name.startswith("_") and value is not None
    ]
    if unknown:
        raise ValueError(
            f"{source} has {listed(unknown, limit=3)}, which {configured.__name__} does not know, needed: settings that can be "
            "honoured; take out what does not change the images"
        )


def known_settings(settings: Mapping[str, Any], configured: Any) -> dict[str, Any]:
    """Return those settings that a class has."""
    parameters = parameters_of(configured)
    return {name: value for name, value in settings.items() if name in parameters}


def check_agreement(vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless the UNet makes latents the VAE decodes, and takes the user's condition and no other."""
    found, needed = unet.config.in_channels, vae.config.latent_channels
    if found != needed:
        raise ValueError(f"the UNet makes latents of {found} channels, the VAE decodes {needed}, needed: equal")
    if unet.config.out_channels != found:
        raise ValueError(f"the UNet has {found} channels in and {unet.config.out_channels} out, needed: equal")
    size = unet.config.sample_size
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
    if not all(type(side) is int and side >= 1 for side in sides):
        other = other_sample_size(vae, unet)
        raise ValueError(
            f"sample_size is {size!r}, needed: the side of the latents, a whole number from 1 on; --sample_size says it"
            + (f", {other} by the VAE's own sample_size" if other else "")
        )
    if not isinstance(unet.config.cross_attention_dim, int):
        raise ValueError(f"cross_attention_dim is {unet.config.cross_attention_dim!r}, needed: one whole number")
    if not any(getattr(module, "is_cross_attention", False) for module in unet.modules()):
        raise ValueError("the UNet has no cross-attention, needed: some, or no user's token would change its images")
    for name in _OTHER_CONDITIONS:
        if unet.config[name] is not None:
            raise ValueError(f"{name} is {unet.config[name]!r}, needed: none, the user's token is the only condition")


def check_unet_runs(unet: UNet2DConditionModel) -> None:
    """Raise ValueError where a pass fails, tried on latents as small as can be.

    A config.json may hold a number, or null, that only the arithmetic of some layer finds to be none.
    """
    side = 2 ** (len(unet.config.block_out_channels) - 1)
    latents = torch.zeros(1, unet.config.in_channels, side, side)
    token = torch.zeros(1, 1, unet.config.cross_attention_dim)
    _check_pass("UNet", lambda: unet(latents, torch.tensor(0), token))


def check_vae_runs(vae: AutoencoderKL) -> None:
    """Raise ValueError where decoding fails, tried on latents as small as can be, as of a UNet."""
    _check_pass("VAE", lambda: vae.decode(torch.zeros(1, vae.config.latent_channels, 1, 1)))


def _check_pass(kind: str, compute: Callable[[], object]) -> None:
    try:
        with torch.inference_mode(), silence():
            compute()
    except Exception as error:  # a setting may be anything
        what = one_line(error)[:_LONGEST]
        raise ValueError(f"the {kind} cannot compute with its config.json ({what}), {AS_SAVED}") from error


def enlargement(vae: AutoencoderKL) -> int:
    """Return how many times an image's side is that of its latents."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def shifts_latents(vae: AutoencoderKL) -> bool:
    """Return whether a VAE's latents are shifted, and not only scaled."""
    return bool(vae.config.shift_factor) or vae.config.latents_mean is not None


def other_sample_size(vae: AutoencoderKL, unet: UNet2DConditionModel) -> int | None:
    """Return the side of the latents that the VAE's own `sample_size` asks for, where that is not the UNet's.

    A VAE at the default of its class says nothing: most trainers never set it.
    """
    pixels, size = vae.config.sample_size, unet.config.sample_size
    default = parameters_of(AutoencoderKL)["sample_size"].default
    if not isinstance(pixels, int) or pixels == default or pixels % enlargement(vae):
        return None
    side = pixels // enlargement(vae)
    return None if list(size if isinstance(size, list | tuple) else [size]) in ([side], [side, side]) else side


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
    parameters = parameters_of(type(configured))
    return {
        name: value
        for name, value in configured.config.items()
        if name in parameters and _plain(value) != _plain(parameters[name].default)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _load(model_class: Any, path: Path, name: str, config_path: Path | None, on_note: Callable[[str], None]) -> Any:
    config, sets = _find(model_class, path, name, config_path, on_note)
    settings = read_json(config)
    found = _class_name(settings, model_class)
    if found != model_class.__name__:
        raise ValueError(f"{config.parent} holds a {found}, needed: {model_class.__name__}")
    check_known(settings, model_class, _HARMLESS_OF_UNET, str(config))
    try:
        with silence(), torch.device("meta"):  # no time is spent on numbers that the file's replace
            model = model_class.from_config(known_settings(settings, model_class))
    except Exception as error:  # a setting may be anything
        raise ValueError(f"{config} cannot be used: {one_line(error)}; {AS_SAVED}") from error
    needed = model.state_dict()
    tensors, file = load_own(sets, needed, f"{name}_state_dict", on_note)
    check_fit(tensors, needed, str(file), by=f" by {config}")
    model.load_state_dict(as_float32(tensors, needed, str(file)), assign=True)
    return model.eval().requires_grad_(requires_grad=False)


def unet_folders(path: Path, config_path: Path | None) -> list[Path]:
    """Return the folders in which a UNet's files lie: that of its config.json first, then that of its weights."""
    config, sets = _find(UNet2DConditionModel, path, "unet", config_path, ignore)
    return list(dict.fromkeys([config.parent, sets[0].files[0].parent]))


def _find(
    model_class: Any, path: Path, name: str, config_path: Path | None, on_note: Callable[[str], None]
) -> tuple[Path, list[Weights]]:
    """Find a model's config.json and what may hold its weights."""
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise ValueError(f"{path} is no file of weights, needed: a folder, or a {', '.join(FILE_SUFFIXES)}")
        beside = [folder / "config.json" for folder in (path.parent, path.parent / name)]
        config = config_path or next((file for file in beside if _is_config_of(model_class, file)), None)
        if config is None:
            raise FileNotFoundError(
                f"{path} has no config.json of its {model_class.__name__} beside it{_or_flag(name)}"
            )
        return config, [Weights((path,), path.name)]
    folder = _find_folder(model_class, path, name, on_note, has_config=config_path is not None)
    config = config_path or folder / "config.json"
    read_json(config)  # what is wrong with it goes before what is wrong with the weights
    sets, notes = find_weights(folder)
    for note in notes:
        on_note(note)
    return config, sets


def _find_folder(model_class: Any, path: Path, name: str, on_note: Callable[[str], None], *, has_config: bool) -> Path:
    """Find a model's folder: `path` itself, or the one of its `name` in it."""
    if not path.is_dir():
        what = "is not a folder" if os.path.lexists(path) else "does not exist"
        raise FileNotFoundError(f"{path} {what}, needed: a folder that holds config.json, or holds it in {name}/")
    places = [path, path / name]
    folders = [folder for folder in places if _is_config_of(model_class, folder / "config.json")]
    if len(folders) > 1:
        raise ValueError(f"{path} and {path / name} both hold a {model_class.__name__}; name the one that is meant")
    averaged = f"{name}_ema"  # diffusers' training scripts save it beside the model
    if not folders and (path / averaged / "config.json").is_file():
        on_note(f"{path} holds no {name}/; its {averaged}/ is used")
        return path / averaged
    folders += [folder for folder in places if (folder / "config.json").is_file()]  # of another class: refused later
    folders += [folder for folder in reversed(places) if has_config and folder.is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{path} holds no config.json, nor does {path / name} ({contents(path)}), {AS_SAVED}{_or_flag(name)}"
        )
    beside = folders[0].absolute().with_name(averaged)
    if folders[0].absolute().name == name and (beside / "config.json").is_file():
        on_note(f"{beside} is there too and is not used; --{name}_path {beside} uses it")
    return folders[0]


def _or_flag(name: str) -> str:
    return "; --unet_config names one that lies elsewhere" if name == "unet" else ""


def _is_config_of(model_class: Any, file: Path) -> bool:
    try:
        return file.is_file() and _class_name(read_json(file), model_class) == model_class.__name__
    except ValueError:
        return False


def _class_name(settings: Mapping[str, Any], model_class: Any) -> str:
    """Return the class that a config.json is of; one written by hand may not name it, but has its settings."""
    parameters = parameters_of(model_class)
    own = [name for name in settings if not name.startswith("_")]
    is_likely = bool(own) and all(name in parameters for name in own)
    return str(settings.get("_class_name") or (model_class.__name__ if is_likely else "model of no class"))


def parameters_of(configured: Any) -> Mapping[str, inspect.Parameter]:
    """Return the settings that a class of diffusers has, with their defaults."""
    return inspect.signature(configured.__init__).parameters


def one_line(error: Exception) -> str:
    """Return the text of a library's error as part of a line of ours."""
    return " ".join(str(error).split()).rstrip(".")
