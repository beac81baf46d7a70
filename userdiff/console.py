"""What the main process tells the user: the plan, one progress bar for the whole job, warnings, the outcome."""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed import DistError
from tqdm import tqdm

from userdiff.config import JobConfig, format_ids
from userdiff.coordination import Coordinator
from userdiff.gallery import PREVIEW_NAME
from userdiff.images import file_name
from userdiff.loading import JobModel
from userdiff.manifest import MANIFEST_NAME
from userdiff.planning import Plan


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)  # unlike print, it does not tear the progress bar
    sys.stdout.flush()


def _warn(line: str) -> None:
    tqdm.write(f"Warning: {line}", file=sys.stderr)


def announce(config: JobConfig, model: JobModel, plan: Plan, num_processes: int) -> None:
    """Say what is about to be made, from what, by whom."""
    if config.is_bundled:
        _say("Model: the bundled checkpoint, ten users, user k writes the digit k-1 (no model path was given)")
    if model.conditioning == "random":
        _warn_of_random_conditioning(config)
    plain = all(index == user_id - 1 for user_id, index in model.user_index.items())
    rows = "id - 1" if plain else " ".join(f"{user_id}:{index}" for user_id, index in model.user_index.items())
    _say(f"Users: {format_ids(plan.user_ids)}; row of the embedding: {rows}")
    if config.train_user_ids and len(config.train_user_ids) < config.num_users:
        _warn(
            f"--train_user_ids names {len(config.train_user_ids)} users, the table has {config.num_users} rows; a missing "
            "id shifts the rows of all after it"
        )
    made = plan.num_items - plan.num_waiting
    _say(
        f"Plan: {plan.num_items} images ({len(plan.user_ids)} users x {plan.num_images_per_user}), {made} already there, "
        f"{plan.num_waiting} to make in {len(plan.batches)} batches of {plan.batch_size} by {num_processes} "
        f"{'process' if num_processes == 1 else 'processes'} on {model.device.type}"
    )
    if 0 < plan.num_items < plan.batch_size and config.batch_size is None:
        _say(f"Note: {plan.num_items} images in batches of {plan.batch_size}; --batch_size {plan.num_items} would do")


@contextmanager
def show_progress(plan: Plan, coordinator: Coordinator) -> Iterator[Callable[[], None]]:
    """Show one bar for the whole job; the function given refreshes it and raises when the job is to end."""
    done = plan.num_items - plan.num_waiting
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=plan.num_items,
        initial=done,
        unit=" images",
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",  # never seconds/image
        mininterval=seconds,
        dynamic_ncols=True,
        disable=plan.num_waiting == 0,
    ) as bar:
        shown = time.monotonic()

        def refresh() -> None:
            nonlocal shown
            coordinator.check()
            if time.monotonic() - shown >= seconds:
                bar.n, shown = done + coordinator.count_published(0), time.monotonic()
                bar.refresh()

        try:
            yield refresh
        finally:
            with suppress(DistError):  # a launcher that was killed took its store along
                bar.n = done + coordinator.count_published(0)


def conclude(
    config: JobConfig, model: JobModel, plan: Plan, entry: dict[str, Any], not_finite: Collection[tuple[int, int]]
) -> None:
    """Say what came of it and where to look; `entry` is the run's in the record's history."""
    failed = entry["failed"]
    _say(
        f"Done: {plan.num_items - len(failed)} of {plan.num_items} images in {config.output_dir}, {entry['published']} "
        "of them made now"
    )
    for item in failed:
        what = "is not finite" if item in not_finite else "is gone or changed since it was written"
        _say(f"Failed: {file_name(*item)} {what}; the same command tries it again")
    if model.conditioning == "random":
        _warn_of_random_conditioning(config)
    _say(f"Labels: {config.output_dir / MANIFEST_NAME}")
    _say(f"Look at it: {config.output_dir / PREVIEW_NAME}")


def warn_of_numerics(name: str, before: object, after: object) -> None:
    """Warn that a folder goes on with other numerics than it began with."""
    _warn(f"{name} was {before} when this folder was begun, is {after}; new images may differ in last bits")


def warn_of_range(output_range: str) -> None:
    """Warn that decoded images contradict `--vae_output_range`."""
    other = "signed" if output_range == "unit" else "unit"
    _warn(f"the decoded images contradict --vae_output_range {output_range}; --vae_output_range {other} may be right")


def _warn_of_random_conditioning(config: JobConfig) -> None:
    _warn(
        f"the weights in {config.condition_encoder_path} do not fit; the condition encoder is RANDOM, images do not show "
        "the users they are filed under, and every row says conditioning=random"
    )
