"""One process's way through a job: join the others, load, plan (the main process), make images, merge.

The only module that knows accelerate. What a process is (its index, its device) goes to the other modules as plain values.
"""

import json
import os
import re
import zlib
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import PIL
import torch
from accelerate.utils import (
    DynamoBackend,
    TorchDynamoPlugin,
    parse_choice_from_env,
    parse_flag_from_env,
    set_numa_affinity,
)

from userdiff.config import JobConfig, UsageError, errors_of
from userdiff.dataset import layout
from userdiff.dataset.atomic import publish, remove_temporaries
from userdiff.dataset.manifest import write_manifest
from userdiff.dataset.png import MAX_FAST_LEVEL, MAX_PIXELS
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import Rows
from userdiff.dataset.run_record import RunRecord, changed_numerics
from userdiff.dataset.scan import Finished, find_finished
from userdiff.diffusion import gpu_errors
from userdiff.diffusion.acceleration import Compilation
from userdiff.diffusion.model import JobModel, has_bf16, load_model
from userdiff.job import console, launcher, output_folder, store
from userdiff.job.group import JobIsOverError
from userdiff.job.plan import Plan, make_plan
from userdiff.job.progress import said_if_slow, show_reading
from userdiff.job.store import Coordinator
from userdiff.job.worker import make_images
from userdiff.shutdown import Failed, Shutdown
from userdiff.text import count
from userdiff.tools.preview import preview_page

_CPU_SETTINGS = (  # by which torch, oneDNN and MKL choose their kernels
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
)
WAVES_IN_VAIN = 2  # in a row, before what is missing is given up
_DYNAMO = "ACCELERATE_DYNAMO_"

_KEEPS = {  # what keeps a numeric as the folder began with it
    "batch_size": "--batch_size {0}",
    "png_compress_level": "--png_compress_level {0}",
    "threads_per_process": "OMP_NUM_THREADS={0}, launched --num_cpu_threads_per_process {0},",
}


def run(config: JobConfig, shutdown: Shutdown) -> int:
    """Run this process of a job, one of those that the launcher started or the only one; returns the exit status.

    Raises UsageError for a wrong model or output folder, Halted when a signal, the disk or another process ended the
    job.
    """
    launcher.check_environment()
    launcher.check_overwrite(config)
    launcher.shard_of(config)  # one that cannot be told is refused before models are loaded
    device = choose_device(config.device)
    try:
        with store.connect(shutdown, console.note) as coordinator:
            try:
                return _load_and_run(config, device, coordinator)
            except OSError as error:
                raise output_folder.disk_failure(error) from error
            except Failed as failure:
                # Who loads slowly, or was suspended, may find the store gone because all is made.
                if failure.is_alone and output_folder.has_ended(config.output_dir, coordinator.launch_id()):
                    return 0
                raise
    except JobIsOverError as over:
        return over.exit_status


def _load_and_run(config: JobConfig, device: torch.device, coordinator: Coordinator) -> int:
    if not config.dry_run:
        output_folder.look_meanwhile(config.output_dir, coordinator)
    set_kernels(config.allow_tf32)
    with gpu_errors.as_failed(f"the models do not fit into the memory that {device} has free"):
        _look_at_gpus(config, device, coordinator)
        precision = _precision(config, device, coordinator)
        loading = f"Loading {config.unet_path}, {config.vae_path} and {config.condition_encoder_path} ..."
        with said_if_slow(loading, coordinator.is_main_process):
            model = load_model(config, device, precision, compilation())
    coordinator.check()
    return run_process(config, model, coordinator)


# What a process begins with ------------------------------------------------------------------------------------------


def choose_device(requested_device: str) -> torch.device:
    """Return the device of this process, the GPU that accelerate would give it, and make it torch's current one.

    No process group is joined, since no collective is ever called: processes meet in the launcher's store alone. Accelerate's
    launcher does not tell its processes to stay on the CPU.
    """
    has_cuda = torch.cuda.is_available()
    if requested_device == "cuda" and not has_cuda:
        raise UsageError("--device: no CUDA device is available here, use --device cpu")
    with errors_of("ACCELERATE_USE_CPU"):
        use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if requested_device == "cpu" or not has_cuda or (use_cpu and requested_device != "cuda"):
        return torch.device("cpu")
    index = launcher.local_process_index()
    if launcher.is_launched():
        torch.cuda.set_device(index % torch.cuda.device_count())
    with errors_of("ACCELERATE_CPU_AFFINITY"):
        if parse_flag_from_env("ACCELERATE_CPU_AFFINITY"):
            set_numa_affinity(index)
    return torch.device("cuda", torch.cuda.current_device())


def set_kernels(allow_tf32: bool) -> None:
    """Have no kernel chosen by timing, and TF32 used only where it was asked for."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def compilation() -> Compilation | None:
    """Return how the launcher's `dynamo_config` has the models compiled; None where it does not."""
    try:
        dynamo = TorchDynamoPlugin()
        if dynamo.backend == DynamoBackend.NO:
            return None
        options = dynamo.to_kwargs()
        torch.compile(torch.nn.Identity(), **options)  # checks the options, and compiles nothing before its first call
    except (ValueError, RuntimeError) as error:
        variables = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_DYNAMO))
        raise UsageError(f"--dynamo_backend: {error}, in the environment is {variables}") from error
    with errors_of("--dynamo_mode"):
        return Compilation(options=options, is_regional=dynamo.use_regional_compilation)


def _precision(config: JobConfig, device: torch.device, coordinator: Coordinator) -> str:
    """Return the precision: the flag's, else the launcher's, whose bf16 becomes fp16 on a GPU without bf16."""
    if config.mixed_precision:
        return config.mixed_precision
    precision: str = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "bf16" and not has_bf16(device):
        if coordinator.is_main_process:
            name = torch.cuda.get_device_name(device)
            console.write(f"Note: the launcher's configuration says bf16, which {name} has not; made in fp16")
        return "fp16"
    return precision


def _look_at_gpus(config: JobConfig, device: torch.device, coordinator: Coordinator) -> None:
    """Warn, once a machine, where its processes share a GPU, or should have GPUs and have none."""
    processes = count(launcher.num_local_processes(), "process", "processes")
    warns_here = f"gpus {coordinator.machine_index}"
    if device.type == "cuda":
        # A process that its launcher started again has the GPU of the one before it.
        name = (
            f"gpu {coordinator.machine_index} {coordinator.num_before} {torch.cuda.get_device_properties(device).uuid}"
        )
        if not coordinator.is_first(name) and coordinator.is_first(warns_here):
            num_gpus = torch.cuda.device_count()
            console.warn(
                f"{processes} on this machine share {count(num_gpus, 'GPU')}; --num_processes {num_gpus}, after accelerate "
                "launch, is faster"
            )
    elif config.device == "auto" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        num_present = len(list(Path("/dev").glob("nvidia[0-9]*")))
        if (num_present or launcher.wants_gpus()) and coordinator.is_first(warns_here):
            console.warn(
                f"torch finds no GPU ({count(num_present, 'is', 'are')} in /dev), so all is computed on the CPU, on this "
                f"machine by {processes}; --device cuda makes that an error, --device cpu says that it is meant"
            )


# The job -------------------------------------------------------------------------------------------------------------


def run_process(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    """Run one process of a job whose model is loaded; returns the exit status."""
    if coordinator.is_main_process:
        return _run_main(config, model, coordinator)
    return 0 if config.dry_run else _run_other(config, model, coordinator)


def _run_main(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    """Find what is done, plan the rest, make images with the others, and merge; a dry run ends with the plan."""
    output_dir = config.output_dir
    height, width, _ = model.image_shape
    if height * width > MAX_PIXELS:
        raise UsageError(f"--sample_size: images of {width} x {height}, needed: {MAX_PIXELS} pixels at most")
    with output_folder.open_folder(config, model, coordinator) as opened:
        record = opened.record
        if opened.num_removed:
            removed = "To be removed" if config.dry_run else "Removed"
            console.write(f"{removed}: {count(opened.num_removed, 'image')} of earlier runs, from {output_dir}")
        plan, numerics, found = _plan(config, model, coordinator, record)
        if config.dry_run:
            kept = f"{output_dir} is as it was" if output_dir.exists() else f"there is no {output_dir} yet"
            console.write(f"Dry run: nothing was made, and {kept}")
            return 0
        # Prepare the folder. The manifest takes in the rows of an interrupted run's parts.
        remove_temporaries(output_dir)
        with errors_of("--output_dir"):
            output_folder.make_user_folders(output_dir, plan)
        if opened.edited_manifest:
            console.say_kept(opened.edited_manifest)
        record.manifest_sha256 = write_manifest(output_dir, found.rows_to_keep(), console.say_kept)
        del found  # its rows take 60 bytes an image
        with output_folder.history_entry(output_dir, record, numerics, plan, coordinator) as entry:
            coordinator.set("run", json.dumps([model.run, numerics, os.path.realpath(output_dir)]))
            rows, missing = make_missing(config, model, plan, record, coordinator)
            entry.failed = [missing.item(number) for number in missing.pending.nonzero()[0].tolist()]
            page = preview_page(output_dir, rows, record, ended=datetime.now(timezone.utc))
            publish(output_dir / layout.PREVIEW_NAME, page)
    console.conclude(config, model, plan, coordinator, entry)
    return 1 if entry.failed else 0


def make_missing(
    config: JobConfig, model: JobModel, plan: Plan, record: RunRecord, coordinator: Coordinator
) -> tuple[Rows, Plan]:
    """Have all processes make what is missing, wave after wave (main process).

    plan: what is left to make of all that was asked for. Each wave has what is still missing of it.

    Returns the rows of what is there in the end, and what is not. What is missing after a wave was claimed by a process that
    was lost, or has gone from the folder. An image that is not finite would be so again, and one that somebody has edited is
    left to the next run.
    """
    output_dir, recipe = config.output_dir, Recipe.of(model.identity, model.run)
    entry, checked = record.history[-1], coordinator.shutdown.checked
    wave, num_in_vain, num_losses = plan, 0, 0
    while True:
        # Every process, this one too, claims batches until none is left.
        with console.show_progress(output_dir, wave, coordinator) as refresh:
            coordinator.begin_wave(wave.to_bytes())
            compress_level = entry.numerics["png_compress_level"]
            make_images(config, model, wave, coordinator, compress_level=compress_level, on_step=refresh)
            coordinator.end_wave()
            coordinator.wait_for_others(refresh)
        # Find out what is there; do not assume it.
        parts = layout.part_paths(output_dir)
        trusted = [path for path in parts if not coordinator.has_lost_part(layout.part_number(path))]
        found = find_finished(
            output_dir,
            recipe,
            record.manifest_sha256,
            trusted_parts=trusted,
            track=lambda items, total: checked(show_reading(items, total)),
        )
        made = found.rows.image_indices()
        missing = make_plan(plan.user_ids, plan.num_images_per_user, plan.batch_size, made, plan.shard)
        changed = [*found.foreign_images, *((row.user_id, row.image_index) for row in found.edited)]
        to_make = missing.without([*coordinator.reported("failed"), *changed])
        if to_make.num_pending < wave.num_pending:
            num_in_vain = 0
        elif coordinator.num_losses == num_losses:  # else nobody knows whether it can be made
            num_in_vain += 1
        num_losses = coordinator.num_losses
        is_last = not to_make.num_pending or num_in_vain == WAVES_IN_VAIN
        if is_last:
            coordinator.end_waves(is_complete=not missing.num_pending)
        rows = found.rows_to_keep()
        record.manifest_sha256 = write_manifest(output_dir, rows, console.say_kept)
        entry.published = int((plan.pending & ~missing.pending).sum())
        entry.lost = list(coordinator.lost().values()) or None
        if is_last:
            return rows, missing
        record.publish(output_dir)
        output_folder.make_user_folders(output_dir, plan)
        console.note(f"{count(to_make.num_pending, 'image')} missing, made in another wave")
        wave = to_make


def _run_other(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    """Check that this process sees the folder, and make images with the others, wave after wave."""
    if coordinator.has_ended():
        return 0  # it comes too late
    output_folder.look(config.output_dir, coordinator)
    run_hash, numerics, main_dir = json.loads(coordinator.wait_for("run"))
    # On another machine the folder may have another path; there, `look` has found what the main process put into it.
    if coordinator.machine_index == 0 and os.path.realpath(config.output_dir) != main_dir:
        raise UsageError(
            f"--output_dir: {config.output_dir} in {coordinator.name}, {main_dir} in the main process, which has begun another "
            "job meanwhile"
        )
    if run_hash != model.run:
        raise UsageError(
            f"process {coordinator.process_index} has other models or other flags than the main process, or another "
            "precision; every machine needs the same files, the same command and, where that is bf16 or fp16, GPUs that all have "
            "bf16 or all have not"
        )
    batch_size, compress_level = numerics["batch_size"], numerics["png_compress_level"]
    for name, there, here in changed_numerics(numerics, numerics_of(config, model, batch_size, compress_level)):
        if coordinator.is_first(f"{name} {here}"):
            console.warn(
                f"{name} is {here} in {coordinator.name}, {there} in the main process; last bits may depend on who makes an "
                "image"
            )
    for packed in coordinator.waves():
        plan = Plan.from_bytes(packed)
        make_images(config, model, plan, coordinator, compress_level=compress_level, on_step=coordinator.check)
    return 0


def _plan(
    config: JobConfig, model: JobModel, coordinator: Coordinator, record: RunRecord
) -> tuple[Plan, dict[str, Any], Finished]:
    """Find what is done, plan the rest and print the plan; returns it, the numerics of this run, and what was found.

    The record keeps the numerics of the first images; those of every run are in its history. Raises UsageError where
    images of unknown origin are in the way.
    """
    output_dir = config.output_dir
    if config.overwrite and config.dry_run:  # as if everything had been removed
        found = Finished(Rows(), lost=[], foreign_files=[], foreign_images=[], edited=[], has_manifest=False)
    else:
        recipe, checked = Recipe.of(model.identity, model.run), coordinator.shutdown.checked
        with errors_of("--output_dir"):
            found = find_finished(
                output_dir,
                recipe,
                record.manifest_sha256,
                track=lambda items, total: checked(show_reading(items, total)),
            )
        output_folder.refuse_foreign_images(config, model, found.foreign_images, "--output_dir")
    batch_size, compress_level = config.batch_size_and_level(record.numerics, model.device.type)
    numerics = numerics_of(config, model, batch_size, compress_level)
    users = config.user_ids or model.user_index
    shard, said = launcher.shard_of(config)
    if found.rows:
        output_folder.refuse_other_shard(config, record, shard, batch_size)
    plan = make_plan(users, config.num_images_per_user, batch_size, found.rows.image_indices(), shard)
    if not (record.numerics and found.rows):
        record.numerics = numerics
    for name, before, after in changed_numerics(record.numerics, numerics):
        remedy = f"; {_KEEPS[name].format(before)} keeps it" if name in _KEEPS else ""
        console.warn(
            f"{name} was {before} when this folder was begun, is {after}; new images may differ in last bits{remedy}"
        )
    if said:
        console.write(f"Shard: {shard} ({said})")
    console.announce(config, model, plan, coordinator.num_processes, found)
    if record.manifest_sha256 and not found.has_manifest:
        what = "not as it was published" if (output_dir / layout.MANIFEST_NAME).exists() else "gone"
        console.write(f"Note: {layout.MANIFEST_NAME} is {what}; its rows are made again from the images")
    return plan, numerics, found


def numerics_of(config: JobConfig, model: JobModel, batch_size: int, compress_level: int) -> dict[str, Any]:
    """Return what may change last bits: of a CPU its threads and kind, of a GPU the libraries that choose its kernels."""
    is_gpu = model.device.type == "cuda"
    numerics = {
        "batch_size": batch_size,
        "device": model.device_name,
        "compiled": model.compiled,
        "threads_per_process": None if is_gpu else torch.get_num_threads(),
        "allow_tf32": config.allow_tf32,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "pillow": PIL.__version__,
        "png_compress_level": compress_level,
        "zlib": zlib.ZLIB_RUNTIME_VERSION if compress_level <= MAX_FAST_LEVEL else None,
    }
    if is_gpu:
        numerics |= {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "triton": _triton_version() if model.compiled != "no" else None,
        }
    else:
        numerics |= {
            "cpu": _cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_settings": " ".join(f"{name}={os.environ[name]}" for name in _CPU_SETTINGS if name in os.environ)
            or "default",
        }
    return {name: value for name, value in numerics.items() if value is not None}


def _cpu_name() -> str | None:
    """Return the model of the CPU, as Linux has it: `AMD EPYC 7B13`; None elsewhere."""
    with suppress(OSError):
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        return str(names[0]).strip() if names else None
    return None


def _triton_version() -> str | None:
    """Return the version of Triton, which has another name where it is made for ROCm or comes with a nightly torch."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with suppress(PackageNotFoundError):
            return version(package)
    return None
