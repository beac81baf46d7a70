"""The noise schedule: where it lies, what its settings mean to DDIM, and whether the steps asked for can be taken.

It is read from beside the UNet. Whatever DDIM can honour is honoured, what it cannot stops, and what a file leaves out is the
default of the file's own class.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin

from userdiff.diffusion.checkpoint import (
    AS_SAVED,
    check_known,
    known_settings,
    one_line,
    parameters_of,
    unet_folders,
)
from userdiff.diffusion.weights import contents, read_json, silence

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

SCHEDULE_NAME = "scheduler_config.json"
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
        what = "is not a folder" if os.path.lexists(path) else "does not exist"
        raise FileNotFoundError(
            f"{path} {what}, needed: a folder that holds {SCHEDULE_NAME}, or holds it in scheduler/"
        )
    raise FileNotFoundError(f"{path} holds no {SCHEDULE_NAME}, nor does {path / 'scheduler'}, {AS_SAVED}")


def schedule_beside(unet_path: Path, unet_config: Path | None = None) -> Path | None:
    """Return the `scheduler_config.json` that lies beside a UNet; None where none does.

    That is in the UNet's folder, in a `scheduler/` in it or next to it, or, of a `checkpoint-1000/` that a training script
    left, next to that. Links are followed, too. Raises ValueError where two say different things, and for one that is there
    and cannot be read.
    """
    near, far = [], []
    for path in dict.fromkeys([unet_path, unet_path.resolve()]):
        folders = unet_folders(path, unet_config)
        pipeline = folders[0].resolve().parent if folders[0].name in ("", "..") else folders[0].parent
        near += [place for folder in folders for place in (folder, folder / "scheduler")] + [pipeline / "scheduler"]
        near += [path, path / "scheduler"] if path.is_dir() else []
        around = [folder for folder in (pipeline, *folders) if folder.name.startswith("checkpoint")]
        far += [folder.parent / "scheduler" for folder in around]
    return _one_of(near) or _one_of(far)


def _one_of(places: Sequence[Path]) -> Path | None:
    found: dict[Path, Path] = {}  # by what the path leads to
    for place in places:
        file = place / SCHEDULE_NAME
        if file.is_file():
            found.setdefault(file.resolve(), file)
        elif os.path.lexists(file):
            raise ValueError(f"{file} is a link that leads nowhere, or no file, needed: the noise schedule of training")
        elif place.name == "scheduler" and place.is_dir() and any(place.iterdir()):
            raise ValueError(f"{place} holds no {SCHEDULE_NAME} ({contents(place)}); name the schedule of training")
    files = list(found.values())
    schedules = [_noise_schedule(read_json(file), str(file)).config for file in files] if len(files) > 1 else []
    for file, schedule in zip(files, schedules, strict=False):
        if _plain(schedule) != _plain(schedules[0]):
            raise ValueError(
                f"{files[0]} and {file} differ, and either might be the UNet's; name the one that is meant"
            )
    return files[0] if files else None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith("_")}


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
    check_known(settings, DDIMScheduler, _OF_OTHER_SAMPLERS | _OFF.keys(), source)
    for name, off in _OFF.items():
        if settings.get(name, off) not in (off, None):
            raise ValueError(f"{source} has {name} {settings[name]!r}, which DDIM cannot honour, needed: {off!r}")
    # What a file leaves out is its own class's default, not DDIM's. Most classes never clip and have no such setting.
    defaults = parameters_of(getattr(diffusers, str(settings.get("_class_name")), object))
    for name in parameters_of(DDIMScheduler).keys() & defaults.keys() - {"self"}:
        settings.setdefault(name, defaults[name].default)
    settings.setdefault("clip_sample", False)
    _check_types(settings, source)
    try:
        with silence():
            scheduler = DDIMScheduler.from_config(known_settings(_with_betas(settings), DDIMScheduler))
            scheduler.set_timesteps(1)
        num_alphas, are_betas = len(scheduler.alphas_cumprod), (scheduler.betas >= 0) & (scheduler.betas <= 1)
    except Exception as error:  # a setting may be anything
        raise ValueError(f"{source} is no noise schedule: {one_line(error)}; {AS_SAVED}") from error
    if num_alphas != scheduler.config.num_train_timesteps or not bool(are_betas.all()):
        raise ValueError(f"{source} is no noise schedule, needed: num_train_timesteps betas from 0 to 1")
    return scheduler


def _check_types(settings: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for what is no switch, no number or no word where DDIM has one: "false" would be true."""
    has_betas = settings.get("trained_betas") is not None
    for name, parameter in parameters_of(DDIMScheduler).items():
        value, default = settings.get(name, parameter.default), parameter.default
        if name == "trained_betas" or (has_betas and name in ("beta_start", "beta_end", "beta_schedule")):
            continue
        if isinstance(default, bool):
            is_right, needed = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            is_right, needed = type(value) is int, "a whole number"
        elif isinstance(default, float):
            is_right, needed = type(value) in (int, float) and math.isfinite(value), "a number"
        else:
            continue
        if not is_right:
            raise ValueError(f"{source} has {name} {value!r}, needed: {needed}")
    for name, known in _DDIM_KNOWS.items():
        value = settings.get(name, known[0])
        if value not in known:
            raise ValueError(f"{source} has {name} {value!r}, needed: one of {', '.join(known)}")


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


def check_timesteps(scheduler: DDIMScheduler, num_inference_steps: int) -> None:
    """Raise ValueError for a number of steps whose timesteps the noise schedule of training does not have."""
    steps = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= steps:
        raise ValueError(f"{num_inference_steps} is out of range, needed: 1 to {steps}, the steps of training")
    scheduler.set_timesteps(num_inference_steps)
    first, last = int(scheduler.timesteps.max()), int(scheduler.timesteps.min())
    if not 0 <= last <= first < steps:
        raise ValueError(
            f"{num_inference_steps} asks for the steps {first} to {last} of training, needed: {steps - 1} to 0; fewer, or "
            "another steps_offset in --scheduler_path"
        )


def check_steps_finite(scheduler: DDIMScheduler, num_inference_steps: int, eta: float) -> None:
    """Raise ValueError where the arithmetic of a step is not finite: try each on random numbers, before any UNet pass."""
    scheduler.set_timesteps(num_inference_steps)
    latents, model_output = torch.randn((2, 1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps.tolist():
        try:
            noise = latents if eta > 0 else None
            stepped = scheduler.step(model_output, timestep, latents, eta=eta, variance_noise=noise, return_dict=False)[
                0
            ]
        except Exception as error:  # a setting may be anything
            raise ValueError(
                f"the noise schedule has no step at timestep {timestep}: {error}, needed: numbers"
            ) from error
        if not torch.isfinite(stepped).all():
            kind = scheduler.config.prediction_type
            noiseless = (
                "; at zero terminal SNR no noise can be told from the signal, needed: v_prediction, or leading spacing"
            )
            raise ValueError(
                f"the noise schedule has no finite step at timestep {timestep} for prediction_type {kind}"
                + noiseless * (kind == "epsilon")
            )
