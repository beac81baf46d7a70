"""Loading the VAE, the UNet and the noise schedule, strictly, and hashing what was loaded.

What decides pixels is read from beside the weights. A setting that is neither honoured nor known to be harmless stops.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
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
SCHEDULE_NAME = "scheduler_config.json"
_AS_SAVED = "needed: what diffusers' save_pretrained writes"
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
_DDIM_KNOWS = {  # of some others diffusers would say so only in the middle of a job
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_DDIM_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_OF_OTHER_SAMPLERS = {  # how another sampler walks, or what it adds; not what the model was trained on
    *("algorithm_type", "corrector_order", "disable_corrector", "euler_at_final", "final_sigmas_type", "flow_shift"),
    *("interpolation_type", "lambda_min_clipped", "lower_order_final", "original_inference_steps", "predict_x0"),
    *(
        "predictor_order",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "tau_func",
    ),
    *("tensor_format", "time_shift_type", "timestep_scaling", "use_beta_sigmas", "use_exponential_sigmas"),
    *("use_karras_sigmas", "use_lu_lambdas", "variance_type"),
}
_OFF = {"use_flow_sigmas": False, "use_dynamic_shifting": False, "timestep_type": "discrete", "shift_terminal": None}
"""Settings of other samplers that are harmless at this value alone."""


def load_vae(path: Path, on_note: Callable[[str], None] = ignore) -> AutoencoderKL:
    """Load an `AutoencoderKL` in float32 from a diffusers folder, from one holding it as `vae/`, or from a file of weights.

    on_note: called with a line on every choice between what is there.
    """
    vae = _load(AutoencoderKL, path, "vae", None, on_note)
    config = vae.config
    factor, channels = config.scaling_factor, config.out_channels
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise ValueError(
            f"scaling_factor is {factor!r}, needed: a number above 0, what latents were multiplied by; --scaling_factor"
        )
    if channels not in IMAGE_CHANNELS:
        raise ValueError(f"the VAE makes images of {channels} channels, needed: 1, 3 or 4, as a PNG has")
    if config.shift_factor is not None and not isinstance(config.shift_factor, int | float):
        raise ValueError(f"shift_factor is {config.shift_factor!r}, needed: a number, or null")
    statistics = (config.latents_mean, config.latents_std)
    if statistics != (None, None):
        _check_statistics(*statistics, config.latent_channels, has_shift=bool(config.shift_factor))
    return vae


def _check_statistics(mean: Any, std: Any, num_channels: int, *, has_shift: bool) -> None:
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = values if isinstance(values, list | tuple) else ()
        if len(numbers) != num_channels or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{name} is {values!r}, needed: {num_channels} numbers, one a channel, or both null")
    if has_shift:
        raise ValueError("shift_factor, latents_mean and latents_std are all set, needed: one way to shift latents")


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
    """Return a model's config.json, given that or its folder. Raises ValueError or OSError where it cannot be read."""
    file = path / "config.json" if path.is_dir() else path
    read_json(file)
    return file


def load_noise_scheduler(path: Path | None) -> SchedulerMixin:
    """Load the noise schedule a model was trained with; without a path, the training default.

    `path` is a `scheduler_config.json` of any scheduler class whose settings DDIM can honour, its folder, or one that
    holds that as `scheduler/`. Raises ValueError for settings that nothing could be sampled with.
    """
    if path is None:
        return DDPMScheduler(**TRAINING_NOISE)
    if path.is_file():
        return _noise_schedule(read_json(path), str(path))
    for folder in (path, path / "scheduler"):
        if (folder / SCHEDULE_NAME).is_file():
            return _noise_schedule(read_json(folder / SCHEDULE_NAME), str(folder / SCHEDULE_NAME))
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder, needed: one that holds {SCHEDULE_NAME}, or holds it in scheduler/"
        )
    raise FileNotFoundError(f"{path} holds no {SCHEDULE_NAME}, nor does {path / 'scheduler'}, {_AS_SAVED}")


def schedule_beside(unet_path: Path) -> Path | None:
    """Return the `scheduler_config.json` that lies beside a UNet: in its folder, a pipeline's, or the one next to it.

    Of a `checkpoint-1000/` that a training script left, the pipeline may be the folder around it. Raises ValueError where
    two that are equally near differ.
    """
    folder = unet_path if unet_path.is_dir() else unet_path.parent
    if folder.name in ("", ".."):  # whose parent in writing is not that of the folder
        folder = folder.resolve()
    is_component = (folder / "config.json").is_file() or folder.name.startswith("unet")
    pipeline = folder.parent if is_component else folder
    places = [folder, folder / "scheduler", pipeline / "scheduler", pipeline / "unet"]
    if pipeline.name.startswith("checkpoint") and not any((place / SCHEDULE_NAME).is_file() for place in places):
        places = [pipeline.parent / "scheduler"]
    found = [file for place in dict.fromkeys(places) if (file := place / SCHEDULE_NAME).is_file()]
    if len(found) > 1 and read_json(found[0]) != read_json(found[1]):
        raise ValueError(
            f"{found[0]} and {found[1]} differ, and either might be the UNet's; name the one that is meant"
        )
    return found[0] if found else None


def ddim_scheduler(noise_scheduler: SchedulerMixin) -> DDIMScheduler:
    """Make the sampler's scheduler from the training loop's, whatever its class.

    Differs from `DDIMScheduler.from_config(noise_scheduler.config)` in three things: settings that diffusers noted as
    defaults (positional arguments are, whatever their value) are kept, not reset to DDIM's own defaults; samples are
    clipped only where the scheduler says so, not by DDIM's default; and what DDIM cannot honour raises ValueError.
    """
    return _noise_schedule(dict(noise_scheduler.config), type(noise_scheduler).__name__)


def _noise_schedule(settings: dict[str, Any], source: str) -> DDIMScheduler:
    """Make a DDIM scheduler from the settings of any class; `source` is what messages call them."""
    settings = {name: value for name, value in settings.items() if name != "_use_default_values"}
    if "beta_schedule" not in settings and settings.get("trained_betas") is None:  # as flow matching has none
        raise ValueError(f"{source} has no beta_schedule, needed: the noise schedule of training")
    _honour_predict_epsilon(settings, source)
    _check_known(settings, DDIMScheduler, _OF_OTHER_SAMPLERS | _OFF.keys(), source)
    for name, off in _OFF.items():
        if settings.get(name, off) not in (off, None):
            raise ValueError(f"{source} has {name} {settings[name]!r}, which DDIM cannot honour, needed: {off!r}")
    for name, known in _DDIM_KNOWS.items():
        value = settings.get(name, known[0])
        if value not in known:
            raise ValueError(f"{source} has {name} {value!r}, needed: one of {', '.join(known)}")
    # What a file leaves out is its own class's default, not DDIM's. Most classes never clip and have no such setting.
    defaults = _parameters(getattr(diffusers, str(settings.get("_class_name")), object))
    for name in _parameters(DDIMScheduler).keys() & defaults.keys() - {"self"}:
        settings.setdefault(name, defaults[name].default)
    settings.setdefault("clip_sample", False)
    try:
        with silence():
            scheduler = DDIMScheduler.from_config(_known(_with_betas(settings), DDIMScheduler))
            scheduler.set_timesteps(1)
    except Exception as error:  # a setting may be anything
        raise ValueError(f"{source} is no noise schedule: {_one_line(error)}; {_AS_SAVED}") from error
    alphas = scheduler.alphas_cumprod
    if len(alphas) != scheduler.config.num_train_timesteps or not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ValueError(f"{source} is no noise schedule, needed: num_train_timesteps betas from 0 to 1")
    return scheduler


def _honour_predict_epsilon(settings: dict[str, Any], source: str) -> None:
    """Turn what diffusers before 0.10 called `predict_epsilon` into today's `prediction_type`."""
    predicts_epsilon = settings.pop("predict_epsilon", None)
    if predicts_epsilon is None:
        return
    said = "epsilon" if predicts_epsilon else "sample"
    if settings.setdefault("prediction_type", said) != said:
        raise ValueError(
            f"{source} has predict_epsilon {predicts_epsilon!r} and prediction_type {settings['prediction_type']!r}, needed: "
            "one of them, or both alike"
        )


def _with_betas(settings: dict[str, Any]) -> dict[str, Any]:
    """Compute the betas of a schedule that DDPM knows and DDIM does not, such as `sigmoid`."""
    if settings.get("trained_betas") is not None or settings["beta_schedule"] in _DDIM_SCHEDULES:
        return settings
    asked = {name: settings[name] for name in ("num_train_timesteps", "beta_start", "beta_end") if name in settings}
    try:
        betas = DDPMScheduler(beta_schedule=settings["beta_schedule"], **asked).betas
    except NotImplementedError as error:
        raise ValueError(f"beta_schedule {settings['beta_schedule']!r} is none that DDIM or DDPM knows") from error
    return {**settings, "trained_betas": betas.tolist()}


def _check_known(settings: Mapping[str, Any], configured: Any, harmless: set[str], source: str) -> None:
    """Raise ValueError for a setting that is set, and that this class would drop without a word."""
    parameters = _parameters(configured)
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


def _known(settings: Mapping[str, Any], configured: Any) -> dict[str, Any]:
    parameters = _parameters(configured)
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
    for name in _OTHER_CONDITIONS:
        if unet.config[name] is not None:
            raise ValueError(f"{name} is {unet.config[name]!r}, needed: none, the user's token is the only condition")


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
    default = _parameters(AutoencoderKL)["sample_size"].default
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
    parameters = _parameters(type(configured))
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
    _check_known(settings, model_class, _HARMLESS_OF_UNET, str(config))
    try:
        with silence(), torch.device("meta"):  # no time is spent on numbers that the file's replace
            model = model_class.from_config(_known(settings, model_class))
    except Exception as error:  # a setting may be anything
        raise ValueError(f"{config} cannot be used: {_one_line(error)}; {_AS_SAVED}") from error
    needed = model.state_dict()
    tensors, file = load_own(sets, needed, f"{name}_state_dict", on_note)
    check_fit(tensors, needed, str(file), by=f" by {config}")
    model.load_state_dict(as_float32(tensors, needed, str(file)), assign=True)
    return model.eval().requires_grad_(requires_grad=False)


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
    sets, notes = find_weights(folder)
    for note in notes:
        on_note(note)
    return config_path or folder / "config.json", sets


def _find_folder(model_class: Any, path: Path, name: str, on_note: Callable[[str], None], *, has_config: bool) -> Path:
    """Find a model's folder: `path` itself, or the one of its `name` in it."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder, needed: one that holds config.json, or holds it in {name}/")
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
            f"{path} holds no config.json, nor does {path / name} ({contents(path)}), {_AS_SAVED}{_or_flag(name)}"
        )
    beside = folders[0].absolute().with_name(averaged)
    if folders[0].absolute().name == name and (beside / "config.json").is_file():
        on_note(f"{beside} is there too and is not used; --{name}_path {beside} uses it")
    return folders[0]


def _or_flag(name: str) -> str:
    return "; --unet_config names one that lies elsewhere" if name == "unet" else ""


def _is_config_of(model_class: Any, file: Path) -> bool:
    return file.is_file() and _class_name(read_json(file), model_class) == model_class.__name__


def _class_name(settings: Mapping[str, Any], model_class: Any) -> str:
    """Return the class that a config.json is of; one written by hand may not name it, but has its settings."""
    parameters = _parameters(model_class)
    is_likely = bool(settings) and all(name in parameters for name in settings)
    return str(settings.get("_class_name", model_class.__name__ if is_likely else "model of no class"))


def _parameters(configured: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(configured.__init__).parameters


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
