"""The output folder as a job finds and leaves it: locked, its record checked, started again, its history kept."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from userdiff.config import JobConfig, UsageError, errors_of
from userdiff.dataset import images, manifest
from userdiff.dataset import run_record as record
from userdiff.dataset.run_record import RunRecord
from userdiff.identity import describe_differences, identity_hash
from userdiff.job import console, launcher
from userdiff.job import shared_folder as sharing
from userdiff.job.plan import Plan
from userdiff.job.store import Coordinator
from userdiff.seeds import Item
from userdiff.shutdown import Failed, Halted, Interrupt, Stopped, refusal
from userdiff.text import format_ids
from userdiff.tools.preview import PREVIEW_NAME

LEAVE_SECONDS = 7.0  # for the others to write what they have computed, when a job ends early


@contextmanager
def open_folder(
    config: JobConfig, identity: dict[str, Any], user_ids: Collection[int], coordinator: Coordinator
) -> Iterator[RunRecord | None]:
    """Make the folder if needed, hold its lock, have every machine see it, and give the record it has, if any.

    Raises UsageError where it holds images of another identity or of nobody knows what. With --overwrite those of
    a job are removed first, and all it recorded; a folder begun anew has no record.
    """
    output_dir, interrupt = config.output_dir, coordinator.interrupt
    with ExitStack() as held:
        with errors_of("--output_dir"):
            held.enter_context(record.made_folder(output_dir))
            held.enter_context(record.folder_lock(output_dir))
            with interrupt.abandonable():
                record.wait_for_writers(output_dir)
        held.callback(_forget_writers, output_dir)
        if config.overwrite and launcher.restart_count() == 0:  # a restarted group goes on where the first one failed
            old, own = None, _own_images(config, user_ids, interrupt)
        else:
            old, own = _checked_record(config, identity, interrupt), None
        held.enter_context(sharing.shown(output_dir, coordinator))
        if own is not None:
            _start_again(config, own)
        yield old


def look_into(
    config: JobConfig, identity: dict[str, Any], user_ids: Collection[int], interrupt: Interrupt
) -> RunRecord | None:
    """Do of `open_folder` what changes nothing."""
    nearest = next(path for path in (config.output_dir, *config.output_dir.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir: {nearest} cannot be written to")
    if config.overwrite:
        console.say_removed(config, len(_own_images(config, user_ids, interrupt)))
        return None
    return _checked_record(config, identity, interrupt)


def _checked_record(config: JobConfig, identity: dict[str, Any], interrupt: Interrupt) -> RunRecord | None:
    with errors_of("--output_dir"):
        old = RunRecord.read(config.output_dir)
    if old is None:
        with interrupt.abandonable():
            _refuse_foreign(config.output_dir, identity_hash(identity))
    else:
        _refuse_other_identity(config, old, identity)
    return old


def _forget_writers(output_dir: Path) -> None:
    with suppress(ValueError, OSError):  # one may be at it still: the next job will wait for it
        record.wait_for_writers(output_dir, seconds=0)


def _refuse_foreign(output_dir: Path, run: str | None = None) -> None:
    """Raise UsageError where user folders hold anything but this run's images (of any run, without `run`)."""
    labels = output_dir / manifest.MANIFEST_NAME
    if labels.is_file() and not manifest.is_manifest(labels):
        raise UsageError(
            f"--output_dir: {output_dir} has no {record.RECORD_NAME} but holds a {labels.name} that no job made; use "
            "another folder, or move it away"
        )
    for path in images.user_files(output_dir):
        name = path.relative_to(output_dir).as_posix()
        text = images.read_text_chunks(path) if images.parse_file_name(name) else None
        made_by = (text or {}).get(images.RUN_CHUNK)
        if made_by is None:
            raise UsageError(
                f"--output_dir: {output_dir} has no {record.RECORD_NAME} but holds {name}, which no job is known to have "
                "made; use another folder, or move it away"
            )
        if run not in (None, made_by):
            raise UsageError(
                f"--output_dir: {output_dir} has no {record.RECORD_NAME} but holds {name}, made with another model or "
                "other settings; use another folder, or start again with --overwrite"
            )


def _refuse_other_identity(config: JobConfig, old: RunRecord, identity: dict[str, Any]) -> None:
    if changed := describe_differences(old.identity, identity):
        precisions = [one.get("mixed_precision", "no") for one in (old.identity, identity)]
        keeps = f"--mixed_precision {precisions[0]} keeps that; " if precisions[0] != precisions[1] else ""
        raise UsageError(
            f"--output_dir: {config.output_dir} holds images made otherwise ({changed}); {keeps}use another folder, or start "
            "again with --overwrite"
        )


def refuse_strangers(config: JobConfig, user_ids: Collection[int], strangers: Collection[Item], flag: str) -> None:
    """Raise UsageError where an image of the job would take the place of one that no job is known to have made."""
    asked_for = set(user_ids)
    for user_id, image_index in strangers:
        if user_id in asked_for and image_index < config.num_images_per_user:
            path = config.output_dir / images.file_name(user_id, image_index)
            raise UsageError(
                f"{flag}: {path} was not made by this job or one before it, but an image of this one goes there; move it "
                "away"
            )


def _start_again(config: JobConfig, own: Collection[Item]) -> None:
    """Remove what a job wrote, these images and its records, and nothing else."""
    output_dir = config.output_dir
    with errors_of("--output_dir"):
        for item in own:
            (output_dir / images.file_name(*item)).unlink()
        images.remove_temporaries(output_dir)
        for folder in {(output_dir / images.file_name(*item)).parent for item in own}:
            if not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        for path in [output_dir / manifest.MANIFEST_NAME, *manifest.part_paths(output_dir), output_dir / PREVIEW_NAME]:
            path.unlink(missing_ok=True)
        if own:
            console.say_removed(config, len(own))
        (output_dir / record.RECORD_NAME).unlink(missing_ok=True)  # last: until then the folder is known for a job's


def _own_images(config: JobConfig, user_ids: Collection[int], interrupt: Interrupt) -> list[Item]:
    """Find what a job wrote, by its records and by the images' own text chunks.

    Where a user's folder is a link to another place, only what is recorded is known to have been put there.
    """
    output_dir = config.output_dir
    own: list[Item] = []
    strangers: list[Item] = []
    with interrupt.abandonable():
        if not (output_dir / record.RECORD_NAME).exists():
            _refuse_foreign(output_dir)
        rows = manifest.recorded_rows(output_dir)
        for user in images.user_folders(output_dir):
            for image_index in user.image_indices.tolist():
                item = (user.user_id, image_index)
                path = output_dir / images.file_name(*item)
                is_own = rows.of_image(*item) or (not path.parent.is_symlink() and _explains_itself(path))
                (own if is_own else strangers).append(item)
    refuse_strangers(config, user_ids, strangers, "--overwrite")
    return own


def _explains_itself(path: Path) -> bool:
    """Whether an image says that a job made it, or is what a power cut leaves of one: nothing."""
    return images.RUN_CHUNK in (images.read_text_chunks(path) or {}) or path.stat().st_size == 0


def new_record(
    identity: dict[str, Any], numerics: dict[str, Any], old: RunRecord | None, *, has_images: bool
) -> RunRecord:
    """Make a run's record. It keeps the numerics of the first images; those of every run are in its history."""
    first = old.numerics if old and has_images else numerics
    for name, before, after in record.changed_numerics(first, numerics):
        console.warn_of_numerics(name, before, after)
    return RunRecord(identity=identity, numerics=first, history=old.history if old else [])


@contextmanager
def history_entry(
    config: JobConfig, run_record: RunRecord, numerics: dict[str, Any], plan: Plan, coordinator: Coordinator
) -> Iterator[dict[str, Any]]:
    """Keep `run.json` true while a run goes on: it says `running`, then how the run ended.

    When it ends early, the other processes get a moment to write what they have computed; an OSError goes on as Failed.
    """
    entry = _new_entry(numerics, plan, coordinator)

    def publish(state: str) -> None:
        entry["state"], entry["ended"] = state, None if state == "running" else record.now()
        images.publish(config.output_dir / record.RECORD_NAME, run_record.to_bytes(), sync=True)

    def note_early_end(error: BaseException) -> None:
        silent: list[str] = []
        with suppress(Halted):  # the store may be gone
            coordinator.halt(error)
            silent = coordinator.wait_until_left(LEAVE_SECONDS)
        entry["published"] = entry["published"] or manifest.num_part_rows(config.output_dir)
        if isinstance(error, Halted):
            done = plan.num_items - plan.num_waiting + entry["published"]
            error.progress = f"{done} of {plan.num_items} images are in {config.output_dir}"
        cause = str(error) or type(error).__name__
        if isinstance(error, Stopped):  # by a launcher, maybe, of which a process died
            cause = f"no sign of life from {', '.join(silent)}" if silent else ""
            error.progress = f"{cause}; {error.progress}" if silent else error.progress
        entry["cause"] = cause or None
        with suppress(OSError):  # the disk may be what it ends of; `running` without a holder says enough
            publish(f"stopped by signal {error.signal_number}" if isinstance(error, Stopped) else "failed")

    run_record.history.append(entry)
    try:
        publish("running")
        yield entry
        publish("ended")
    except OSError as error:
        failed = disk_failure(error)
        note_early_end(failed)
        raise failed from error
    except BaseException as error:
        note_early_end(error)
        raise


def _new_entry(numerics: dict[str, Any], plan: Plan, coordinator: Coordinator) -> dict[str, Any]:
    return {
        "started": record.now(),
        "ended": None,
        "state": "running",
        "cause": None,
        "num_processes": coordinator.num_processes,
        "user_ids": format_ids(plan.user_ids),
        "num_images_per_user": plan.num_images_per_user,
        "numerics": numerics,
        "published": 0,
        "failed": [],
    }


def disk_failure(error: OSError) -> Failed:
    """Say what a file system refused, where, and what would help."""
    remedy = {
        errno.ENOSPC: "make room",
        errno.EDQUOT: "make room, or have the quota raised",
        errno.EROFS: "have it mounted for writing",
        errno.EACCES: "have it made writable",
        errno.EPERM: "have it made writable",
        errno.EISDIR: "move it away",
        errno.ENOTDIR: "move it away",
    }.get(error.errno or 0, "see to the disk")
    return Failed(f"--output_dir: {refusal(error)}, {remedy}")
