"""What the main process prints of a whole job: the plan, one progress bar for all processes, the outcome."""

import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from userdiff.config import GuidanceFlags, JobConfig
from userdiff.dataset.layout import MANIFEST_NAME, PREVIEW_NAME, file_name
from userdiff.dataset.run_record import RunEntry
from userdiff.dataset.scan import Finished
from userdiff.diffusion.model import JobModel
from userdiff.diffusion.sampler import latents_shape
from userdiff.job import progress
from userdiff.job.plan import Plan
from userdiff.job.store import Coordinator
from userdiff.seeds import Item
from userdiff.shard import WHOLE
from userdiff.shutdown import Halted
from userdiff.text import count, format_ids, listed, printable

_REFRESH_SECONDS = 0.2  # a DDIM step of a small model takes less, and need not ask the store each time


def write(line: str) -> None:
    """Print a line."""
    with progress.unheard(sys.stdout):
        tqdm.write(printable(line), file=sys.stdout)  # unlike print, it does not tear the progress bar


def warn(line: str) -> None:
    """Print a warning on stderr."""
    with progress.unheard(sys.stderr):
        tqdm.write(printable(f"Warning: {line}"), file=sys.stderr)


def format_bytes(number: float) -> str:
    """Return a number of bytes in a readable unit: `7.5MB`."""
    return f"{tqdm.format_sizeof(number, divisor=1000)}B"


def note(line: str) -> None:
    """Print what may pass by itself. Not on stderr: there, a refusal is the only line."""
    write(f"Note: {line}")


def say_kept(manifest: Path) -> None:
    """Print where a manifest is kept that somebody had added to."""
    note(f"somebody had added to {MANIFEST_NAME}; that is kept as {manifest}")


def announce(config: JobConfig, model: JobModel, plan: Plan, num_processes: int, found: Finished) -> None:
    """Print what is about to be made, from what, by how many processes, and what it takes.

    found: what is there already.
    """
    for line in _describe(config, model, plan.user_ids):
        write(line)
    for note in model.notes:
        write(f"Note: {note}")
    for warning in model.warnings:
        warn(warning)
    _warn_of_random_conditioning(config, model)
    precision = model.identity.get("mixed_precision", "float32")
    device = f"the CPU ({model.device_name})" if model.device.type == "cpu" else model.device_name
    write(f"Output: {config.output_dir}; made on {device} in {precision}")
    of_shard = "" if plan.shard == WHOLE else f"shard {plan.shard} of "
    write(
        f"Plan: {count(plan.num_items, 'image')} ({of_shard}{count(len(plan.user_ids), 'user')} x {plan.num_images_per_user}), "
        f"{plan.num_done} already there, {plan.num_pending} to make in "
        f"{count(len(plan.batches), 'batch', 'batches')} of {plan.batch_size} "
        f"by {count(num_processes, 'process', 'processes')} on {model.device.type}"
    )
    is_small = plan.num_items < plan.batch_size and plan.shard == WHOLE  # all shards have to be cut for one batch size
    if is_small and config.batch_size is None and not found.rows:
        write(
            f"Note: {count(plan.num_items, 'image')} in batches of {plan.batch_size}; --batch_size {plan.num_items} would do"
        )
    elif config.dry_run:
        write(
            f"Padding: {plan.batches.size - plan.num_pending} of the {plan.batches.size} rows of these batches hold no image and "
            "are computed all the same: every image has a row of its own"
        )
    if model.compiled != "no" and plan.num_pending:
        write(
            f"Compiling ({model.compiled}): the first batch takes minutes longer, less once the compiler's cache is warm"
        )
    _write_beyond(plan, found)
    if foreign := [*found.foreign_files, *(file_name(*item) for item in found.foreign_images)]:
        are, them = ("is", "it") if len(foreign) == 1 else ("are", "them")
        warn(
            f"{count(len(foreign), 'file')} beside the images {are} not of this job, and loaders may read {them} too: "
            f"{listed(foreign)}; `userdiff verify {config.output_dir}` lists all"
        )
    if plan.num_pending:
        # An image takes as much as one of those that are there; without any, at most what it takes uncompressed.
        size = found.rows.num_bytes() / len(found.rows) if found.rows else model.uncompressed_bytes
        about = "about" if found.rows else "at most"
        needed, free = plan.num_pending * size, _free_bytes(config.output_dir)
        room = "an unknown number of bytes" if free is None else format_bytes(free)
        write(f"Disk: {about} {format_bytes(needed)} to write, {room} free")
        _warn_of_full_disk(config.output_dir, plan.num_pending, about, needed)


def _describe(config: JobConfig, model: JobModel, user_ids: Collection[int]) -> Iterator[str]:
    """Yield what decides the pixels, read or assumed, a line for each part of the model."""
    if config.is_bundled:
        yield "Model: the bundled checkpoint, ten users, user k writes the digit k-1 (no model path was given)"
    else:
        yield f"Model: UNet {config.unet_path}, VAE {config.vae_path}, condition encoder {config.condition_encoder_path}"
    channels, *latents = latents_shape(model.unet)
    yield (
        f"Images: {_sides(model.image_shape)}, of latents {_sides((*latents, channels))}"
        f"{' (--sample_size)' * bool(config.sample_size)}; {_decoding(model.vae)}"
        f"{' (--scaling_factor)' * bool(config.scaling_factor)}; "
        f"pixels taken as {'[0, 1]' if config.vae_output_range == 'unit' else '[-1, 1]'} (--vae_output_range)"
    )
    is_plain = all(row == user_id - 1 for user_id, row in model.user_index.items())
    rows = "id - 1" if is_plain else " ".join(f"{user_id}:{row}" for user_id, row in model.user_index.items())
    num_rows = model.condition_encoder.user_embedding.num_embeddings
    null_row = "" if config.null_row is None else f"; row {config.null_row} is no user's"
    yield f"Users: {format_ids(user_ids)}; row of the embedding, of {num_rows}: {rows}{null_row}"
    source = f"read from {model.schedule}" if model.schedule else "the default, as none lies beside the UNet"
    if config.is_bundled and config.scheduler_path is None:
        source = "its own"
    yield f"Noise schedule: {_schedule(model.scheduler.config)}; {source} (--scheduler_path)"
    yield (
        f"Sampling: DDIM, {count(config.num_inference_steps, 'step')}, eta {config.eta:g}, seed {config.seed}"
        f"{_guided(config.guidance, config.num_inference_steps)}"
    )


def _guided(guidance: GuidanceFlags, num_steps: int) -> str:
    if guidance.scale == 1:
        return ""
    first, end = (int(fraction * num_steps) for fraction in (guidance.start, guidance.stop))
    null = "a token of zeros" if guidance.null_condition == "zeros" else f"the token of {guidance.null_condition}"
    return f"; guidance {guidance.scale:g} away from {null}, at steps {first + 1} to {end}"


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _decoding(vae: Any) -> str:
    scaled = f"decoded from latents / {vae.config.scaling_factor:g}"
    if vae.config.latents_mean is not None:
        return f"{scaled} * latents_std + latents_mean"
    return f"{scaled} + {vae.config.shift_factor:g}" if vae.config.shift_factor else scaled


def _schedule(noise: Any) -> str:
    if noise.trained_betas is None:
        betas = f"{noise.beta_schedule} {noise.beta_start:g} to {noise.beta_end:g}"
    else:
        betas = f"trained_betas {noise.trained_betas[0]:g} to {noise.trained_betas[-1]:g}"
    clipped = f"clipped to {noise.clip_sample_range:g}" if noise.clip_sample else "not clipped"
    if noise.thresholding:
        clipped = f"thresholded at quantile {noise.dynamic_thresholding_ratio:g}, at most {noise.sample_max_value:g}"
    return (
        f"{betas}{', zero terminal SNR' if noise.rescale_betas_zero_snr else ''}, {noise.num_train_timesteps} steps, "
        f"predicts {noise.prediction_type}, samples {clipped}, {noise.timestep_spacing} spacing, "
        f"steps_offset {noise.steps_offset}, set_alpha_to_one {'on' if noise.set_alpha_to_one else 'off'}"
    )


def _warn_of_random_conditioning(config: JobConfig, model: JobModel) -> None:
    """Warn where images will not show the users they are filed under."""
    if model.conditioning == "random":
        warn(
            f"the weights in {config.condition_encoder_path} do not fit; the condition encoder is RANDOM, images do not "
            "show the users they are filed under, and every row says conditioning=random"
        )


def _write_beyond(plan: Plan, found: Finished) -> None:
    """Print what is there beyond the request, and what was there and is not any longer."""
    if num_beyond := len(found.rows) - plan.num_done:
        there = found.rows.image_indices().items()
        users = format_ids(user_id for user_id, indices in there if not plan.asks_for(user_id, indices).all())
        write(f"Beyond this request: {count(num_beyond, 'image')} of users {users} are there too, and stay")
    again = [(user_id, index) for user_id, index in found.lost if plan.asks_for(user_id, np.array([index]))]
    made_again = set(again)
    beyond = [item for item in found.lost if item not in made_again]
    _write_images("Warning", beyond, "beyond this request and missing or damaged")
    _write_images("Note", again, "missing or damaged and made again")


def _write_images(title: str, items: Sequence[Item], what: str, number: int = 0) -> None:
    """Print how many images there are, `number` if more than `items`, and the first ones by name; nothing for none."""
    number = number or len(items)
    if items:
        are = "image is" if number == 1 else "images are"
        write(f"{title}: {number} {are} {what}: {listed([file_name(*item) for item in items], number)}")


def _warn_of_full_disk(output_dir: Path, num_images: int, about: str, needed: float) -> None:
    """Warn where images need more bytes than are free."""
    free = _free_bytes(output_dir)
    if free is not None and needed > free:
        warn(
            f"{num_images} images take {about} {format_bytes(needed)}, and {output_dir} has {format_bytes(free)} free; a "
            "full disk stops the job, and what is made stays"
        )


def _free_bytes(output_dir: Path) -> int | None:
    """Return how many bytes are free; None on a file system that does not count them."""
    usage = shutil.disk_usage(next(folder for folder in (output_dir, *output_dir.parents) if folder.exists()))
    return usage.free if usage.total else None


@contextmanager
def show_progress(output_dir: Path, plan: Plan, coordinator: Coordinator) -> Iterator[Callable[[], None]]:
    """Show one bar for the whole job; the value is a function that refreshes it, and raises when the job is to end.

    As soon as there is a batch of images to judge by, warns of a disk that will not hold the rest.
    """
    images_before, bytes_before = coordinator.published()
    with progress.make_bar(plan.num_items, plan.num_done) as bar:
        shown, is_judged = time.monotonic(), not plan.num_pending

        def show(num_images: int) -> None:
            if num_failed := coordinator.num_reported("failed"):
                bar.set_postfix_str(f"{num_failed} failed", refresh=False)
            # A lost process may come back and make some twice.
            num_made = min(num_images - images_before, plan.num_pending)
            bar.update(plan.num_done + num_made - bar.n)  # shows itself every `mininterval`

        def warn_of_lost() -> None:
            for which in coordinator.newly_lost():
                warn(f"{which}: lost, the others make what it leaves")

        def refresh() -> None:
            nonlocal shown, is_judged
            coordinator.check()
            if time.monotonic() - shown < _REFRESH_SECONDS:
                return
            shown = time.monotonic()
            warn_of_lost()
            num_images, num_bytes = coordinator.published()
            show(num_images)
            num_images, num_bytes = num_images - images_before, num_bytes - bytes_before
            if not is_judged and num_images >= min(plan.batch_size, plan.num_pending):
                is_judged = True
                left = max(plan.num_pending - num_images, 0)
                _warn_of_full_disk(output_dir, left, "about", left * num_bytes / num_images)

        try:
            yield refresh
        finally:
            warn_of_lost()
            with suppress(Halted):  # the store may be gone
                show(coordinator.published()[0])


def conclude(config: JobConfig, model: JobModel, plan: Plan, coordinator: Coordinator, entry: RunEntry) -> None:
    """Print what came of the run, whose entry in the record's history this is, and where to look."""
    seconds = entry.seconds() or 0
    rate = f" in {tqdm.format_interval(seconds)}, {entry.published / seconds:.2f} images/s" if seconds else ""
    of_shard = f" of shard {entry.shard}" if entry.shard else ""
    write(
        f"Done: {plan.num_items - len(entry.failed)} of {count(plan.num_items, 'image')}{of_shard} in {config.output_dir}, "
        f"{entry.published} of them made now{rate if entry.published else ''}"
    )
    if entry.lost:
        were = "was" if len(entry.lost) == 1 else "were"
        of_all = f"{len(entry.lost)} of {count(coordinator.num_processes, 'process', 'processes')}"
        rest = "" if entry.failed else "; the others made what was left"
        write(f"Lost: {of_all} {were} lost ({'; '.join(entry.lost)}){rest}")
    not_finite = set(coordinator.reported("failed"))
    bad = [item for item in entry.failed if item in not_finite]
    gone = [item for item in entry.failed if item not in not_finite]
    _write_images("Failed", bad, "not finite; the same command tries again")
    _write_images("Failed", gone, "not written, or gone or changed since; the same command makes up for it")
    flat, num_flat = coordinator.reported("flat"), coordinator.num_reported("flat")
    _write_images("Warning", flat, "one single colour, which a model seldom means", num_flat)
    _warn_of_random_conditioning(config, model)
    write(f"Labels: {config.output_dir / MANIFEST_NAME}")
    write(f"Look at it: {config.output_dir / PREVIEW_NAME}")
