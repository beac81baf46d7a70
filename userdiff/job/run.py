"""One process's way through a job: load, plan (the main process), compute and write batches, merge. Orchestration."""

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, parse_choice_from_env, parse_flag_from_env
from numpy.typing import NDArray

from userdiff import shutdown as halting
from userdiff.config import DEFAULT_BATCH_SIZE, DEFAULT_COMPRESS_LEVEL, JobConfig, UsageError, errors_of
from userdiff.dataset import images, manifest
from userdiff.dataset import run_record as record
from userdiff.dataset.rows import Item, Table
from userdiff.dataset.run_record import RunRecord
from userdiff.diffusion import generate as computing
from userdiff.diffusion.acceleration import Compilation
from userdiff.diffusion.model import JobModel, has_bf16, load_model
from userdiff.job import console, launcher, progress
from userdiff.job import output_folder as folder
from userdiff.job import shared_folder as sharing
from userdiff.job import store as coordination
from userdiff.job.plan import PADDING, Plan, make_plan
from userdiff.job.store import Coordinator
from userdiff.shutdown import Halted, Interrupt
from userdiff.tools import audit
from userdiff.tools import preview as gallery

WRITER_THREADS = 4
PENDING_BATCHES = 2  # waiting to be encoded and written while the next computes; more would only hold memory
JOIN_TIMEOUT = timedelta(minutes=10)  # for the machines of a launch to start


def run(config: JobConfig) -> int:
    """Run a job as the process that the launcher started, or as the only one; returns the exit status.

    Raises UsageError for a wrong model or output folder, Halted when a signal, the disk or another process ended the
    job.
    """
    with halting.deadly_wait(partial(launcher.is_gone, os.getppid())):
        device = join_processes(config.device)
    try:
        with Interrupt().listen() as interrupt, coordination.connect(interrupt) as coordinator:
            if not config.dry_run:
                sharing.look_meanwhile(config.output_dir, coordinator)
            set_kernels(config.allow_tf32)
            too_small = f"the models do not fit into the memory that {device} has free"
            try:
                with computing.gpu_errors(too_small):
                    _look_at_gpus(config, device, coordinator)
                    precision = _precision(config, device, coordinator)
                    with interrupt.abandonable():
                        model = load_model(config, device, precision, compilation())
                return run_process(config, model, coordinator)
            except OSError as error:
                raise folder.disk_failure(error) from error
    finally:
        PartialState().destroy_process_group()


def join_processes(requested_device: str) -> torch.device:
    """Join the launcher's process group, where there is one, and give the device of this process.

    The device is resolved first: accelerate's launcher does not tell its processes to stay on the CPU. The group is
    gloo on GPUs too; no collective is ever called, but accelerate hands out the GPUs by it.
    """
    has_cuda = torch.cuda.is_available()
    if requested_device == "cuda" and not has_cuda:
        raise UsageError("--device: no CUDA device is available here, use --device cpu")
    use_cpu = not has_cuda or (requested_device != "cuda" and parse_flag_from_env("ACCELERATE_USE_CPU"))
    group = launcher.process_group(JOIN_TIMEOUT) if torch.distributed.is_torchelastic_launched() else {}
    return PartialState(cpu=use_cpu or requested_device == "cpu", **group).device


def compilation() -> Compilation | None:
    """Read the launcher's `dynamo_config`."""
    dynamo = TorchDynamoPlugin()
    if dynamo.backend == DynamoBackend.NO:
        return None
    with errors_of("--dynamo_mode"):
        return Compilation(options=dynamo.to_kwargs(), is_regional=dynamo.use_regional_compilation)


def _precision(config: JobConfig, device: torch.device, coordinator: Coordinator) -> str:
    """Choose the precision: the flag's, else the launcher's, whose bf16 is fp16 on a GPU that has none."""
    if config.mixed_precision:
        return config.mixed_precision
    precision: str = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "bf16" and not has_bf16(device):
        if coordinator.is_main_process:
            console.note_precision(torch.cuda.get_device_name(device))
        return "fp16"
    return precision


def _look_at_gpus(config: JobConfig, device: torch.device, coordinator: Coordinator) -> None:
    """Warn, once a machine, where its processes share a GPU, or should have GPUs and have none."""
    num_processes, warns_here = launcher.num_local_processes(), f"gpus {coordinator.machine}"
    if device.type == "cuda":
        name = f"gpu {coordinator.machine} {torch.cuda.get_device_properties(device).uuid}"
        if not coordinator.is_first(name) and coordinator.is_first(warns_here):
            console.warn_of_shared_gpus(num_processes, torch.cuda.device_count())
    elif config.device == "auto" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        num_present = len(list(Path("/dev").glob("nvidia[0-9]*")))
        if (num_present or launcher.wants_gpus()) and coordinator.is_first(warns_here):
            console.warn_of_missing_gpus(num_processes, num_present)


def set_kernels(allow_tf32: bool) -> None:
    """Fix what may choose between kernels: nothing is chosen by timing, and TF32 only where it was asked for."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def run_process(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    """Run one process of a job; what it needs to know of the others is in `coordinator`. Returns the exit status."""
    if config.dry_run:
        return _rehearse(config, model, coordinator) if coordinator.is_main_process else 0
    if coordinator.is_main_process:
        return _run_main(config, model, coordinator)
    sharing.look(config.output_dir, coordinator)
    run_hash, numerics, packed = coordinator.receive_plan()
    if run_hash != model.run:
        raise UsageError(
            f"process {coordinator.process_index} has other models or other flags than the main process, or another "
            "precision; every machine needs the same files, the same command and, where that is bf16 or fp16, GPUs that all have "
            "bf16 or all have not"
        )
    plan = Plan.from_bytes(packed)
    config = replace(config, batch_size=numerics["batch_size"], png_compress_level=numerics["png_compress_level"])
    for name, there, here in record.changed_numerics(numerics, _numerics(config, model, numerics)):
        if coordinator.is_first(f"{name} {here}"):
            console.warn_of_mixture(name, coordinator.name, here, there)
    make_images(config, model, plan, coordinator, on_step=coordinator.check)
    coordinator.finish()
    return 0


def _rehearse(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    wanted = _wanted(config, model)
    old_record = folder.look_into(config, model.identity, wanted, coordinator.interrupt)
    _survey(config, model, coordinator, old_record)
    console.conclude_dry_run(config.output_dir)
    return 0


def _wanted(config: JobConfig, model: JobModel) -> tuple[int, ...]:
    return config.user_ids or tuple(model.user_index)


def _survey(
    config: JobConfig, model: JobModel, coordinator: Coordinator, old_record: RunRecord | None
) -> tuple[manifest.Finished, Plan, RunRecord, dict[str, Any]]:
    """Find what is done and plan the rest, and say so; with the record and the numerics of this run."""
    found = manifest.Finished(Table(), lost=[], others=[], has_manifest=False, strangers=[])
    if not (config.dry_run and config.overwrite):  # what that would remove is still there
        recipe = manifest.Recipe.of(model.identity, model.run)
        with coordinator.interrupt.abandonable():
            sha256 = old_record.manifest_sha256 if old_record else None
            found = manifest.find_finished(config.output_dir, recipe, sha256, track=progress.show_reading)
    numerics = _numerics(config, model, old_record.numerics if old_record else {})
    wanted = _wanted(config, model)
    done = found.rows.image_indices()
    plan = make_plan(wanted, config.num_images_per_user, numerics["batch_size"], done)
    folder.refuse_strangers(config, wanted, found.strangers, "--output_dir")
    run_record = folder.new_record(model.identity, numerics, old_record, has_images=bool(found.rows))
    console.announce(config, model, plan, coordinator.num_processes, found)
    if old_record and old_record.manifest_sha256 and not found.has_manifest:
        console.note_manifest(config.output_dir)
    return found, plan, run_record, numerics


def _run_main(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    recipe = manifest.Recipe.of(model.identity, model.run)
    wanted = _wanted(config, model)
    with folder.open_folder(config, model.identity, wanted, coordinator) as old_record:
        found, plan, run_record, numerics = _survey(config, model, coordinator, old_record)
        config = replace(config, png_compress_level=numerics["png_compress_level"])
        images.remove_temporaries(config.output_dir)
        with errors_of("--output_dir"):
            for user_id in plan.user_ids:
                (config.output_dir / images.file_name(user_id, 0)).parent.mkdir(exist_ok=True)
        # takes the place of an interrupted run's parts
        run_record.manifest_sha256 = manifest.write_manifest(config.output_dir, found.rows)
        del found
        with folder.history_entry(config, run_record, numerics, plan, coordinator) as entry:
            coordinator.publish_plan(model.run, numerics, plan.to_bytes())
            with console.show_progress(config.output_dir, plan, coordinator) as refresh:
                make_images(config, model, plan, coordinator, on_step=refresh)
                coordinator.finish()
                coordinator.wait_for_all(refresh)
            entry["published"] = coordinator.published()[0]
            rows, flat = _finished(config, recipe, run_record, coordinator)
            run_record.manifest_sha256 = manifest.write_manifest(config.output_dir, rows)
            missing = make_plan(plan.user_ids, plan.num_images_per_user, plan.batch_size, rows.image_indices())
            entry["failed"] = [missing.item(number) for number in missing.waiting.nonzero()[0].tolist()]
            with coordinator.interrupt.abandonable():
                page = gallery.preview_page(config.output_dir, rows, run_record, ended=datetime.now(timezone.utc))
            images.publish(config.output_dir / gallery.PREVIEW_NAME, page)
        not_finite = coordinator.failed()
    console.conclude(config, model, plan, entry, not_finite=set(not_finite), flat=flat)
    return 1 if entry["failed"] else 0


def _finished(
    config: JobConfig, recipe: manifest.Recipe, run_record: RunRecord, coordinator: Coordinator
) -> tuple[Table, list[Item]]:
    """Collect the rows of what is there at the end of a run, and the images of one single colour among them."""
    with coordinator.interrupt.abandonable():
        sha256 = run_record.manifest_sha256
        rows = manifest.finished_rows(config.output_dir, recipe, sha256, believe_parts=True)
        flat, broken = audit.flat_images(config.output_dir, rows)
    rows.remove(broken)
    return rows, flat


def _numerics(config: JobConfig, model: JobModel, old: Mapping[str, Any]) -> dict[str, Any]:
    """Note what may change last bits: on a CPU its threads, on a GPU the libraries that choose its kernels.

    old: the numerics that a folder began with, or that the main process has; they hold where the flags say nothing.
    """
    compress_level = config.png_compress_level
    if compress_level is None:
        compress_level = old.get("png_compress_level", DEFAULT_COMPRESS_LEVEL)
    numerics = {
        "batch_size": config.batch_size or old.get("batch_size", DEFAULT_BATCH_SIZE[model.device.type]),
        "device": model.device_name,
        "compiled": model.compiled,
        "threads_per_process": torch.get_num_threads(),
        "allow_tf32": config.allow_tf32,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "pillow": PIL.__version__,
        "png_compress_level": compress_level,
    }
    if compress_level <= images.MAX_FAST_LEVEL:
        numerics["zlib"] = zlib.ZLIB_RUNTIME_VERSION
    if model.device.type == "cuda":
        del numerics["threads_per_process"]
        versions = {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
        if model.compiled != "no":
            versions["triton"] = _triton_version()
        numerics |= {name: value for name, value in versions.items() if value is not None}
    return numerics


def _triton_version() -> str | None:
    """Find the version of Triton, which is called otherwise where it is made for ROCm or comes with a nightly torch."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with suppress(PackageNotFoundError):
            return version(package)
    return None


# Computing and writing -----------------------------------------------------------------------------------------------


def make_images(
    config: JobConfig,
    model: JobModel,
    plan: Plan,
    coordinator: Coordinator,
    *,
    on_step: Callable[[], None],
) -> None:
    """Claim batches until none is left; compute each, and leave encoding and writing to a bounded pool.

    However this ends, what was computed is written and noted first. `on_step` is asked before every UNet pass; what
    it raises ends the loop, and so does a signal, at any instant of the computing.
    """
    recipe = manifest.Recipe.of(model.identity, model.run)
    compress_level = DEFAULT_COMPRESS_LEVEL if config.png_compress_level is None else config.png_compress_level
    part = manifest.PartWriter(manifest.part_path(config.output_dir, coordinator.process_index))
    pool = images.WriterPool(WRITER_THREADS, PENDING_BATCHES * plan.batch_size)
    with record.writing(config.output_dir), part, pool as writers:

        def save(item: Item, pixels: NDArray[np.uint8]) -> None:
            png = images.encode_png(pixels, recipe.text_chunks(*item), compress_level)
            images.publish(config.output_dir / images.file_name(*item), png)
            part.append(recipe.row(*item, size=(pixels.shape[1], pixels.shape[0]), png=png))
            coordinator.count_published(1, num_bytes=len(png))

        is_first = True
        for number, batch in _batches(config, model, plan, coordinator, on_step):
            if number == 0 and batch.contradicts_range:
                console.warn_of_range(config.vae_output_range)
            if is_first:
                _look_at_memory(model, plan, coordinator)
                is_first = False
            for item, pixels in batch.images():
                if pixels is None:
                    coordinator.report_failed(*item)
                else:
                    writers.submit(partial(save, item, pixels))


def _look_at_memory(model: JobModel, plan: Plan, coordinator: Coordinator) -> None:
    """Warn, of the first GPU on which that is so, where a batch leaves too little memory."""
    free = computing.free_memory(model.device)
    if free is not None and free < computing.HEADROOM and coordinator.is_first("memory"):
        console.warn_of_memory(coordinator.name, plan.batch_size, free, computing.HEADROOM)


def _batches(
    config: JobConfig, model: JobModel, plan: Plan, coordinator: Coordinator, on_step: Callable[[], None]
) -> Iterator[tuple[int, computing.Batch]]:
    """Claim batches until none is left, and give each with its number once its images are there.

    One is given while a GPU computes the next, so two are under way at most.
    """
    under_way: deque[tuple[int, computing.Batch]] = deque()
    try:
        while (number := coordinator.next_batch()) < len(plan.batches):
            items = [None if row == PADDING else plan.item(row) for row in plan.batches[number]]
            with coordinator.interrupt.abandonable():
                under_way.append((number, computing.start(config, model, items, on_step)))
                if len(under_way) > 1:
                    under_way[0][1].wait()
            while under_way and under_way[0][1].is_there():
                yield under_way.popleft()
        for number, batch in under_way:
            with coordinator.interrupt.abandonable():
                batch.wait()
            yield number, batch
    except Halted:
        yield from ((number, batch) for number, batch in under_way if batch.is_there())
        raise
