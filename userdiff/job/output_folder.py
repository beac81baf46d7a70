"""The output folder of a job: held, checked, shared by all machines, emptied if asked, and its history kept."""

import errno
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from userdiff.config import JobConfig, UsageError, errors_of
from userdiff.dataset import layout, locks
from userdiff.dataset.atomic import check_file_system, remove_temporaries
from userdiff.dataset.manifest import keep_edited, num_part_rows, recorded_rows
from userdiff.dataset.png import RUN_CHUNK, is_remains, read_text_chunks
from userdiff.dataset.run_record import RunEntry, RunRecord, now
from userdiff.dataset.scan import check_own_files, have_files, images_without_record, user_folders
from userdiff.diffusion.model import JobModel
from userdiff.identity import describe_differences
from userdiff.job.plan import Plan
from userdiff.job.store import Coordinator
from userdiff.seeds import Item
from userdiff.shard import WHOLE, Shard
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped
from userdiff.text import format_ids, refusal

LOOK_SECONDS = 0.2
NUM_LOOKS = 450  # 90 s: network file systems cache the content of a folder for up to a minute
SEEN_SECONDS = 100.0
LEAVE_SECONDS = 7.0  # for the other processes to write what they have computed, when a job ends early

_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EROFS: "have it mounted for writing",
    errno.EACCES: "have it made writable",
    errno.EPERM: "have it made writable",
    errno.EISDIR: "move it away",
    errno.ENOTDIR: "move it away",
    errno.ENOTSUP: "move it away",
    errno.EFBIG: "move it away",
}


class OpenFolder(NamedTuple):
    """An output folder that is held for this job."""

    record: RunRecord
    """That of a new folder has neither numerics nor history."""
    num_removed: int
    """Images that --overwrite removed."""
    edited_manifest: Path | None
    """The new name of a manifest that --overwrite would have removed, but that somebody had added to."""


@contextmanager
def open_folder(config: JobConfig, model: JobModel, coordinator: Coordinator) -> Iterator[OpenFolder]:
    """Hold the output folder for this job.

    Raises UsageError where another job holds the folder, or where it holds images of another identity or of unknown origin.
    A dry run checks the same, and changes nothing.
    """
    output_dir, shutdown = config.output_dir, coordinator.shutdown
    with ExitStack() as held:
        if config.dry_run:
            _check_writable(output_dir)
            with errors_of("--output_dir"):
                check_own_files(output_dir)
        else:
            with errors_of("--output_dir"):
                # 1. The folder exists; if this job leaves nothing in it, it is removed again.
                held.enter_context(locks.made_folder(output_dir))
                # 2. No other job has it, ...
                held.enter_context(locks.folder_lock(output_dir))
                # 3. ... nothing else has the names that jobs write to, its file system can do what is needed, ...
                check_own_files(output_dir)
                check_file_system(output_dir)
                # 4. ... and no process that outlived an earlier job can still write to it.
                locks.wait_for_writers(output_dir, on_poll=coordinator.check)
            held.callback(_forget_writers, output_dir)
        # 5. What lies there is ours and of the same identity, or may be removed; so far, nothing has been written.
        is_anew = config.overwrite and not _was_begun_by(coordinator.launch_id(), output_dir)
        own = _own_images(config, model, shutdown) if is_anew else []
        edited = None
        record = None if is_anew else _checked_record(config, model, shutdown)
        _check_user_folders(config, model)
        if not config.dry_run:
            # 6. Every machine sees the folder. Only now may anything be removed.
            held.enter_context(shown(output_dir, coordinator))
            if is_anew:
                edited = _remove(output_dir, own, shutdown)
        yield OpenFolder(record or RunRecord(identity=model.identity, numerics={}), len(own), edited)


def _was_begun_by(launch: str | None, output_dir: Path) -> bool:
    """Return whether this launch has begun the folder: a group that its launcher restarted goes on, despite --overwrite."""
    with errors_of("--output_dir"), suppress(ValueError):  # a damaged record is no hindrance to starting again
        record = RunRecord.read(output_dir)
        return launch is not None and record is not None and launch in [entry.launch for entry in record.history]
    return False


def has_ended(output_dir: Path, launch: str | None) -> bool:
    """Return whether the folder's record says that a run of this launch has come to its end, with every image there."""
    with suppress(ValueError, OSError):
        record = RunRecord.read(output_dir)
        entries = [entry for entry in record.history if entry.launch == launch] if record and launch else []
        return bool(entries) and entries[-1].state == "ended" and not entries[-1].failed
    return False


def _check_writable(output_dir: Path) -> None:
    """Raise UsageError where the folder, or the nearest one above it that exists, cannot be written to."""
    nearest = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir: {nearest} cannot be written to")


def _check_user_folders(config: JobConfig, model: JobModel) -> None:
    """Raise UsageError where something that is no folder has the name of a user's, or two users' folders are one."""
    places: dict[tuple[int, int], Path] = {}
    for user_id in config.user_ids or model.user_index:
        folder = (config.output_dir / layout.file_name(user_id, 0)).parent
        if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises where it may not look
            found = folder.stat()
            other = places.setdefault((found.st_dev, found.st_ino), folder)
            if other != folder:
                raise UsageError(f"--output_dir: {folder} and {other} are one place, needed: a folder for each user")
        elif os.path.lexists(folder):
            raise UsageError(
                f"--output_dir: {folder} is no folder, needed: one for the images of user {user_id}; move it away"
            )


def _checked_record(config: JobConfig, model: JobModel, shutdown: Shutdown) -> RunRecord | None:
    """Read the folder's record; raises UsageError where what lies there is not of the model's identity."""
    with errors_of("--output_dir"):
        record = RunRecord.read(config.output_dir)
    if record is None:
        _refuse_unknown_origin(config.output_dir, shutdown, model.run)
    elif changed := describe_differences(record.identity, model.identity):
        raise UsageError(
            f"--output_dir: {config.output_dir} holds images made otherwise ({changed}); "
            f"{_why_otherwise(config, model, record.identity)}use another folder, or start again with --overwrite"
        )
    return record


def _why_otherwise(config: JobConfig, model: JobModel, before: Mapping[str, Any]) -> str:
    """Return what else to say where a difference may not be of the user's own doing."""
    precisions = [one.get("mixed_precision", "no") for one in (before, model.identity)]
    why = ""
    if precisions[0] != precisions[1]:
        if not config.mixed_precision and "ACCELERATE_MIXED_PRECISION" in os.environ:
            why = f"{precisions[1]} is the launcher's, by its configuration or ACCELERATE_MIXED_PRECISION; "
        why += f"--mixed_precision {precisions[0]} keeps that; "
    # Earlier versions did not read these, and made other images.
    if (
        before.get("noise_schedule") != model.identity["noise_schedule"]
        and model.schedule
        and not config.scheduler_path
    ):
        why += f"the schedule is read from {model.schedule}, unless --scheduler_path names another; "
    if before.get("latents") != model.identity.get("latents"):
        why += "latents are shifted where the VAE's config.json says so; "
    return why


def _refuse_unknown_origin(output_dir: Path, shutdown: Shutdown, run: str | None = None) -> None:
    """Raise UsageError where a folder without a record holds anything but images of jobs.

    run: the identity hash that these images have to carry; any will do where it is not given.
    """
    has_no_record = f"--output_dir: {output_dir} has no {layout.RECORD_NAME} but holds"
    for name, made_by in shutdown.checked(images_without_record(output_dir)):
        if made_by is None:
            raise UsageError(
                f"{has_no_record} {name}, which no job is known to have made; use another folder, or move it away"
            )
        if run not in (None, made_by):
            raise UsageError(
                f"{has_no_record} {name}, made with another model or other settings; use another folder, or start again "
                "with --overwrite"
            )


def _own_images(config: JobConfig, model: JobModel, shutdown: Shutdown) -> list[Item]:
    """Return the images that --overwrite removes: those with the size of their row, and those that say that a job made them.

    A user's folder may be a link to another place. There, an image is known to be this folder's only by its row. Raises
    UsageError where an image of unknown origin is in the way, and where a folder's images cannot be removed.
    """
    output_dir = config.output_dir
    if not (output_dir / layout.RECORD_NAME).exists():
        _refuse_unknown_origin(output_dir, shutdown)
    rows, folders = recorded_rows(output_dir), list(user_folders(output_dir))
    rows.keep(have_files(folders, rows))
    own: list[Item] = []
    foreign: list[Item] = []
    for folder in folders:
        foreign += [
            (folder.user_id, index) for name in folder.foreign if (index := layout.parse_image(name)) is not None
        ]
        for image_index in shutdown.checked(folder.image_indices.tolist()):
            item = (folder.user_id, image_index)
            path = output_dir / layout.file_name(*item)
            is_own = rows.of_image(*item) or (not path.parent.is_symlink() and _is_a_jobs(path))
            (own if is_own else foreign).append(item)
    refuse_foreign_images(config, model, foreign, "--overwrite")
    for path in {(output_dir / layout.file_name(*item)).parent for item in own}:
        if not os.access(path, os.W_OK | os.X_OK):
            raise UsageError(f"--overwrite: {path} cannot be written to, needed: a folder whose images can be removed")
    return own


def _is_a_jobs(path: Path) -> bool:
    """Return whether an image carries our text chunks, or is what is left of one that did."""
    with suppress(OSError):
        return RUN_CHUNK in (read_text_chunks(path) or {}) or is_remains(path)
    return False


def refuse_foreign_images(config: JobConfig, model: JobModel, foreign: Collection[Item], flag: str) -> None:
    """Raise UsageError where an image of this job would replace one that no job is known to have made."""
    asked_for = set(config.user_ids or model.user_index)
    for user_id, image_index in foreign:
        if user_id in asked_for and image_index < config.num_images_per_user:
            path = config.output_dir / layout.file_name(user_id, image_index)
            raise UsageError(
                f"{flag}: {path} was not made by this job or one before it, but an image of this one goes there; move it "
                "away"
            )


def refuse_other_shard(config: JobConfig, record: RunRecord, shard: Shard, batch_size: int) -> None:
    """Raise UsageError where a folder that holds images was made as another shard than this one, or cut otherwise.

    Without --shard, any folder may become the whole dataset, and after that be this shard's again.
    """
    if shard == WHOLE or not record.history:
        return
    runs = takewhile(lambda entry: entry.joined is None, reversed(record.history))  # a joined dataset is none's
    if not any(entry.shard_of_all() == shard for entry in runs):
        before = record.history[-1].shard
        what, way = (f"as shard {before}", f"--shard {before}") if before else ("without --shard", "no --shard")
        raise UsageError(
            f"--shard: {shard}, but {config.output_dir} was made {what}; needed: a folder of its own for each shard; {way} goes "
            "on here" + ", and no --shard makes it the whole dataset" * bool(before)
        )
    if (begun := record.numerics["batch_size"]) != batch_size:
        raise UsageError(
            f"--batch_size: {batch_size} cuts other shards than {begun}, with which {config.output_dir} was begun; --batch_size "
            f"{begun} keeps it, needed: one for all shards"
        )


def _remove(output_dir: Path, own: Collection[Item], shutdown: Shutdown) -> Path | None:
    """Remove these images and what else jobs wrote, and nothing besides; returns what `keep_edited` does."""
    shutdown.check()  # also where there is no image
    with errors_of("--output_dir"):
        for item in shutdown.checked(own):
            (output_dir / layout.file_name(*item)).unlink(missing_ok=True)
        remove_temporaries(output_dir)
        for folder in {(output_dir / layout.file_name(*item)).parent for item in own}:
            if not folder.is_symlink() and not layout.entries(folder):
                folder.rmdir()
        # The record goes last: if this is interrupted, the folder is still known to be a job's.
        edited = keep_edited(output_dir)
        manifest, page, record = layout.MANIFEST_NAME, layout.PREVIEW_NAME, layout.RECORD_NAME
        for path in (output_dir / manifest, output_dir / page, *layout.part_paths(output_dir), output_dir / record):
            path.unlink(missing_ok=True)
        return edited


def make_user_folders(output_dir: Path, plan: Plan) -> None:
    """Make the folders of the users who have images in the plan, where there are none."""
    for user_id, number in plan.wanted.items():
        if number:
            (output_dir / layout.file_name(user_id, 0)).parent.mkdir(exist_ok=True)


def _forget_writers(output_dir: Path) -> None:
    with suppress(ValueError, OSError):  # one may still be writing: the next job will wait for it
        locks.wait_for_writers(output_dir, seconds=0)


# Shared by all machines, which is checked before anything is written -----------------------------------------------


@contextmanager
def shown(output_dir: Path, coordinator: Coordinator) -> Iterator[None]:
    """Put a file into the folder, and go on once a process of every other machine has seen it (main process).

    A machine that does not see it has ended the job by SEEN_SECONDS; one that has not come by then is not waited for. The
    file's name is new, so that no machine has cached it as missing. It stays until the job ends, for processes that come
    late. Call it only while holding the folder's lock: files that killed jobs left are removed with it.
    """
    try:
        if coordinator.num_machines > 1:
            mark = layout.shared_mark_path(output_dir)
            with errors_of("--output_dir"):
                mark.touch()
            coordinator.set("shown", json.dumps([socket.gethostname(), str(mark.absolute())]))
            deadline = time.monotonic() + SEEN_SECONDS
            seen = [f"seen/{machine}" for machine in range(1, coordinator.num_machines)]
            coordinator.wait_until(lambda: all(map(coordinator.has, seen)) or time.monotonic() > deadline)
        yield
    finally:
        for path in layout.shared_mark_paths(output_dir):
            with suppress(OSError):  # a folder of that name, or a disk that is gone
                path.unlink()


def look(output_dir: Path, coordinator: Coordinator) -> None:
    """Return once this process sees the file that the main process shows; on that one's machine, at once.

    Writes nothing. Where the file does not appear, raises UsageError and ends the job on every machine with that line.
    """
    if coordinator.machine_index == 0:
        return
    main_host, path = json.loads(coordinator.wait_for("shown"))
    mark = Path(path)
    for _ in range(NUM_LOOKS):
        is_seen = os.path.exists(output_dir / mark.name)  # noqa: PTH110 - Path.exists raises where it may not look
        if is_seen or coordinator.has_ended():
            coordinator.set(f"seen/{coordinator.machine_index}")
            return
        coordinator.check()
        time.sleep(LOOK_SECONDS)
    error = UsageError(
        f"--output_dir: {socket.gethostname()} does not see what {main_host} wrote to {mark.parent}; "
        "needed: a folder that all machines share"
    )
    coordinator.halt(error, cause=str(error))
    raise error


def look_meanwhile(output_dir: Path, coordinator: Coordinator) -> None:
    """Look in a thread too, while this process loads its models, so that a slow machine does not hold up the others."""

    def look_quietly() -> None:
        with suppress(Halted, UsageError):  # every process has been told
            look(output_dir, coordinator)

    Thread(target=look_quietly, name="look", daemon=True).start()


# How a run ends -----------------------------------------------------------------------------------------------------


@contextmanager
def history_entry(
    output_dir: Path, record: RunRecord, numerics: dict[str, Any], plan: Plan, coordinator: Coordinator
) -> Iterator[RunEntry]:
    """Keep an entry for this run in `run.json`, which says `running`, then how the run ended; the value is the entry.

    When the run ends early, the other processes get time to write what they have computed, as far as this process still
    has any. An OSError is raised as Failed.
    """
    entry = RunEntry(
        started=now(),
        shard=None if plan.shard == WHOLE else str(plan.shard),
        num_processes=coordinator.num_processes,
        user_ids=format_ids(plan.user_ids),
        num_images_per_user=plan.num_images_per_user,
        numerics=numerics,
        launch=coordinator.launch_id(),
    )

    def note_early_end(error: BaseException, cause: str = "") -> None:
        """Note how the run ended. cause: why a launcher may have sent the signal."""
        if entry.state == "running":
            entry.published += num_part_rows(output_dir)
            entry.lost = list(coordinator.lost().values()) or None
        if isinstance(error, Halted):
            error.progress = f"{plan.num_done + entry.published} of {plan.num_items} images are in {output_dir}"
        if isinstance(error, Stopped) and cause:
            entry.cause = cause
            error.progress = f"{entry.cause}; {error.progress}"
        with suppress(OSError):  # the disk may be the cause; `running`, with nobody holding the folder, says enough
            record.end(output_dir, error)

    with coordinator.shutdown.last_words(note_early_end):
        try:
            record.begin(output_dir, entry)
            yield entry
            record.end(output_dir)
        except BaseException as error:
            end = disk_failure(error) if isinstance(error, OSError) else error
            cause = ""
            with suppress(Halted):  # the store may be gone
                reason = coordinator.halt(end)
                if isinstance(reason, Failed) and reason is not end:  # others had given this process up
                    cause = str(reason)
                seconds_left = coordinator.shutdown.seconds_left() - 1  # one to note the end
                if silent := coordinator.wait_until_left(min(LEAVE_SECONDS, seconds_left)):
                    cause = f"no sign of life from {', '.join(silent)}"
            note_early_end(end, cause)
            if end is error:
                raise
            raise end from error


def disk_failure(error: OSError) -> Failed:
    """Return the error that ends a job whose disk refused something: what, where, and what would help."""
    return Failed(f"--output_dir: {refusal(error)}, {_REMEDIES.get(error.errno or 0, 'see to the disk')}")
