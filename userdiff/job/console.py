"""What the main process prints: the plan, one progress bar for the whole job, warnings, the outcome."""

import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from userdiff.config import JobConfig
from userdiff.dataset.layout import MANIFEST_NAME, PREVIEW_NAME, file_name
from userdiff.dataset.run_record import RunEntry
from userdiff.dataset.scan import Finished
from userdiff.diffusion.model import JobModel
from userdiff.diffusion.sampler import latents_shape
from userdiff.job import progress
from userdiff.job.plan import Plan
from userdiff.job.store import Coordinator
from userdiff.seeds import Item
from userdiff.shutdown import Halted
from userdiff.text import count, format_ids, listed

_REFRESH_SECONDS = 0.2  # a DDIM step of a small model takes less, and need not ask the store each time


def _print(line: str) -> None:
    with progress.unheard(sys.stdout):
        tqdm.write(line, file=sys.stdout)  # unlike print, it does not tear the progress bar


def _warn(line: str) -> None:
    with progress.unheard(sys.stderr):
        tqdm.write(f"Warning: {line}", file=sys.stderr)


def announce(config: JobConfig, model: JobModel, plan: Plan, num_processes: int, found: Finished) -> None:
    """Print what is about to be made, from what, by whom, and what it takes; `found` is what is there already."""
    for line in _describe(config, model, plan.user_ids):
        _print(line)
    for note in model.notes:
        _print(f"Note: {note}")
    for warning in model.warnings:
        _warn(warning)
    if model.conditioning == "random":
        warn_of_random_conditioning(config)
    precision = model.identity.get("mixed_precision", "float32")
    _print(f"Output: {config.output_dir}; made on {model.device_name} in {precision}")
    _print(
        f"Plan: {count(plan.num_items, 'image')} ({count(len(plan.user_ids), 'user')} x {plan.num_images_per_user}), "
        f"{plan.num_items - plan.num_pending} already there, {plan.num_pending} to make in "
        f"{count(len(plan.batches), 'batch', 'batches')} of {plan.batch_size} "
        f"by {count(num_processes, 'process', 'processes')} on {model.device.type}"
    )
    if 0 < plan.num_items < plan.batch_size and config.batch_size is None and not found.rows:
        _print(
            f"Note: {count(plan.num_items, 'image')} in batches of {plan.batch_size}; --batch_size {plan.num_items} would do"
        )
    elif config.dry_run:
        _print(
            f"Padding: {plan.batches.size - plan.num_pending} of the {plan.batches.size} rows of these batches are computed "
            "and thrown away"
        )
    if model.compiled != "no" and plan.num_pending:
        _print(
            f"Compiling ({model.compiled}): the first batch takes minutes longer, less once the compiler's cache is warm"
        )
    _print_beyond(plan, found)
    _warn_of_foreign_files(config.output_dir, found)
    _print_disk(config.output_dir, model, plan, found)


def _describe(config: JobConfig, model: JobModel, user_ids: Collection[int]) -> Iterator[str]:
    """Yield what decides the pixels, read or assumed, a line for each part of the model."""
    if config.is_bundled:
        yield "Model: the bundled checkpoint, ten users, user k writes the digit k-1 (no model path was given)"
    else:
        yield f"Model: UNet {config.unet_path}, VAE {config.vae_path}, condition encoder {config.condition_encoder_path}"
    channels, *latents = latents_shape(model.unet)
    yield (
        f"Images: {_sides(model.image_shape)}, of latents {_sides((*latents, channels))}; {_decoding(model.vae)}; "
        f"pixels taken as {'[0, 1]' if config.vae_output_range == 'unit' else '[-1, 1]'} (--vae_output_range)"
    )
    is_plain = all(row == user_id - 1 for user_id, row in model.user_index.items())
    rows = "id - 1" if is_plain else " ".join(f"{user_id}:{row}" for user_id, row in model.user_index.items())
    num_rows = model.condition_encoder.user_embedding.num_embeddings
    null_row = "" if config.null_row is None else f"; row {config.null_row} is no user's"
    yield f"Users: {format_ids(user_ids)}; row of the embedding, of {num_rows}: {rows}{null_row}"
    source = f"read from {model.schedule}" if model.schedule else "the default, none lies beside the UNet"
    yield f"Noise schedule: {_schedule(model.scheduler.config)}; {source} (--scheduler_path)"
    yield f"Sampling: DDIM, {count(config.num_inference_steps, 'step')}, eta {config.eta:g}, seed {config.seed}"


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _decoding(vae: Any) -> str:
    scaled = f"decoded from latents / {vae.config.scaling_factor:g}"
    if vae.config.latents_mean is not None:
        return f"{scaled} * latents_std + latents_mean"
    return f"{scaled} + {vae.config.shift_factor:g}" if vae.config.shift_factor else scaled


def _schedule(noise: Any) -> str:
    betas = f"{noise.beta_schedule} {noise.beta_start:g} to {noise.beta_end:g}"
    if noise.trained_betas is not None:
        betas = f"trained_betas {noise.trained_betas[0]:g} to {noise.trained_betas[-1]:g}"
    clipped = f"clipped to {noise.clip_sample_range:g}" if noise.clip_sample else "not clipped"
    if noise.thresholding:
        clipped = f"thresholded at quantile {noise.dynamic_thresholding_ratio:g}, at most {noise.sample_max_value:g}"
    return (
        f"{betas}{', zero terminal SNR' if noise.rescale_betas_zero_snr else ''}, {noise.num_train_timesteps} steps, "
        f"predicts {noise.prediction_type}, samples {clipped}, {noise.timestep_spacing} spacing, "
        f"steps_offset {noise.steps_offset}, set_alpha_to_one {'on' if noise.set_alpha_to_one else 'off'}"
    )


def _print_beyond(plan: Plan, found: Finished) -> None:
    """Print what is there beyond the request, and what was there and is not any longer."""
    asked_for = set(plan.user_ids)

    def is_beyond(item: Item) -> bool:
        return item[0] not in asked_for or item[1] >= plan.num_images_per_user

    beyond = {
        user_id: int((indices >= plan.num_images_per_user).sum()) if user_id in asked_for else len(indices)
        for user_id, indices in found.rows.image_indices().items()
    }
    if any(beyond.values()):
        users = format_ids(user_id for user_id, number in beyond.items() if number)
        _print(f"Beyond this request: {count(sum(beyond.values()), 'image')} of users {users} are there too, and stay")
    _print_images(
        "Warning", [item for item in found.lost if is_beyond(item)], "beyond this request and missing or damaged"
    )
    again = [item for item in found.lost if not is_beyond(item)]
    _print_images("Note", again, "missing or damaged and made again")


def _warn_of_foreign_files(output_dir: Path, found: Finished) -> None:
    foreign = [*found.foreign_files, *(file_name(*item) for item in found.foreign_images)]
    if foreign:
        are, them = ("is", "it") if len(foreign) == 1 else ("are", "them")
        _warn(
            f"{count(len(foreign), 'file')} beside the images {are} not of this job, and loaders may read {them} too: "
            f"{listed(foreign)}; `userdiff verify {output_dir}` lists all"
        )


def _print_disk(output_dir: Path, model: JobModel, plan: Plan, found: Finished) -> None:
    """Print what the images to make will take: by those that are there, else at most what they take uncompressed."""
    if plan.num_pending:
        size = found.rows.num_bytes() / len(found.rows) if found.rows else model.uncompressed_bytes
        about = "about" if found.rows else "at most"
        needed, free = plan.num_pending * size, _free_bytes(output_dir)
        _print(f"Disk: {about} {_bytes(needed)} to write, {_bytes(free)} free")
        _warn_of_full_disk(output_dir, plan.num_pending, about, needed)


def _warn_of_full_disk(output_dir: Path, num_images: int, about: str, needed: float) -> None:
    free = _free_bytes(output_dir)
    if needed > free:
        _warn(
            f"{num_images} images take {about} {_bytes(needed)}, and {output_dir} has {_bytes(free)} free; a full disk stops "
            "the job, and what is made stays"
        )


def _free_bytes(output_dir: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())).free


def _bytes(number: float) -> str:
    return f"{tqdm.format_sizeof(number, divisor=1000)}B"


def print_removed(config: JobConfig, number: int) -> None:
    """Print what `--overwrite` has removed, or would."""
    removed = "To be removed" if config.dry_run else "Removed"
    _print(f"{removed}: {count(number, 'image')} of earlier runs, from {config.output_dir}")


def conclude_dry_run(output_dir: Path) -> None:
    """Print that nothing was made."""
    _print(f"Dry run: nothing was made, and {output_dir} is as it was")


def note_manifest(output_dir: Path) -> None:
    """Print that the manifest is not what the last run left."""
    what = "not as it was published" if (output_dir / MANIFEST_NAME).exists() else "gone"
    _print(f"Note: {MANIFEST_NAME} is {what}; its rows are made again from the images")


@contextmanager
def show_progress(output_dir: Path, plan: Plan, coordinator: Coordinator) -> Iterator[Callable[[], None]]:
    """Show one bar for the whole job; the value is a function that refreshes it, and raises when the job is to end.

    Once there is a batch of images to judge by, a disk that will not hold the rest is warned of.
    """
    done = plan.num_items - plan.num_pending
    with progress.make_bar(plan.num_items, done) as bar:
        shown, is_judged = time.monotonic(), not plan.num_pending

        def refresh() -> None:
            nonlocal shown, is_judged
            coordinator.check()
            if time.monotonic() - shown < _REFRESH_SECONDS:
                return
            shown = time.monotonic()
            num_images, num_bytes = coordinator.published()
            show(num_images)
            if not is_judged and num_images >= min(plan.batch_size, plan.num_pending):
                is_judged = True
                left = plan.num_pending - num_images
                _warn_of_full_disk(output_dir, left, "about", left * num_bytes / num_images)

        def show(num_images: int) -> None:
            if num_failed := coordinator.num_reported("failed"):
                bar.set_postfix_str(f"{num_failed} failed", refresh=False)
            bar.update(done + num_images - bar.n)  # shows itself every `mininterval`

        try:
            yield refresh
        finally:
            with suppress(Halted):  # the store may be gone
                show(coordinator.published()[0])


def conclude(
    config: JobConfig,
    model: JobModel,
    plan: Plan,
    entry: RunEntry,
    *,
    not_finite: Collection[Item],
    flat: Sequence[Item],
    num_flat: int,
) -> None:
    """Print what came of it and where to look.

    entry: the run's in the record's history. not_finite, flat: images that could not be saved, and of one colour, of
    which there may be more than are named.
    """
    seconds = entry.seconds() or 0
    rate = f" in {tqdm.format_interval(seconds)}, {entry.published / seconds:.2f} images/s" if seconds else ""
    _print(
        f"Done: {plan.num_items - len(entry.failed)} of {count(plan.num_items, 'image')} in {config.output_dir}, "
        f"{entry.published} of them made now{rate if entry.published else ''}"
    )
    bad = [item for item in entry.failed if item in not_finite]
    gone = [item for item in entry.failed if item not in not_finite]
    _print_images("Failed", bad, "not finite; the same command tries again")
    _print_images("Failed", gone, "gone or changed since written; the same command makes up for it")
    _print_images("Warning", flat, "one single colour, which a model seldom means", num_flat)
    if model.conditioning == "random":
        warn_of_random_conditioning(config)
    _print(f"Labels: {config.output_dir / MANIFEST_NAME}")
    _print(f"Look at it: {config.output_dir / PREVIEW_NAME}")


def _print_images(title: str, items: Sequence[Item], what: str, number: int | None = None) -> None:
    """Print the number of images, all or more than `items`, and the first ones by name."""
    number = number or len(items)
    if items:
        are = "image is" if number == 1 else "images are"
        _print(f"{title}: {number} {are} {what}: {listed([file_name(*item) for item in items], number)}")


def warn_of_numerics(name: str, before: object, after: object) -> None:
    """Warn that a folder goes on with other numerics than it began with."""
    threads = f"OMP_NUM_THREADS={before}, launched --num_cpu_threads_per_process {before},"
    level = f"--png_compress_level {before}"
    keeps = {"batch_size": f"--batch_size {before}", "threads_per_process": threads, "png_compress_level": level}.get(
        name
    )
    remedy = f"; {keeps} keeps it" if keeps else ""
    _warn(f"{name} was {before} when this folder was begun, is {after}; new images may differ in last bits{remedy}")


def warn_of_mixture(name: str, process: str, here: object, there: object) -> None:
    """Warn that a process has other numerics than the main process."""
    _warn(f"{name} is {here} in {process}, {there} in the main process; last bits may depend on who makes an image")


def note_precision(device_name: str) -> None:
    """Print that the launcher's bf16 became fp16."""
    _print(f"Note: the launcher's configuration says bf16, which {device_name} has not; made in fp16")


def warn_of_shared_gpus(num_processes: int, num_gpus: int) -> None:
    """Warn that processes share GPUs, which only makes them slower."""
    _warn(
        f"{count(num_processes, 'process', 'processes')} on this machine share {count(num_gpus, 'GPU')}; "
        f"--num_processes {num_gpus}, after accelerate launch, is faster"
    )


def warn_of_missing_gpus(num_processes: int, num_present: int) -> None:
    """Warn that a job meant for GPUs runs on the CPU."""
    _warn(
        f"torch finds no GPU ({count(num_present, 'is', 'are')} in /dev), so all is computed on the CPU, on this machine by "
        f"{count(num_processes, 'process', 'processes')}; --device cuda makes that an error, --device cpu says that it is meant"
    )


def warn_of_memory(process: str, batch_size: int, free: int, needed: int) -> None:
    """Warn that a GPU's memory is nearly full."""
    _warn(
        f"batches of {batch_size} leave {_bytes(free)} of the GPU's memory free in {process}; with less than {_bytes(needed)} "
        "last bits may depend on what else is there, a smaller --batch_size leaves more"
    )


def warn_of_range(output_range: str) -> None:
    """Warn that decoded images contradict `--vae_output_range`."""
    other = "signed" if output_range == "unit" else "unit"
    _warn(f"the decoded images contradict --vae_output_range {output_range}; --vae_output_range {other} may be right")


def warn_of_random_conditioning(config: JobConfig) -> None:
    """Warn that images will not show the users they are filed under."""
    _warn(
        f"the weights in {config.condition_encoder_path} do not fit; the condition encoder is RANDOM, images do not show "
        "the users they are filed under, and every row says conditioning=random"
    )
