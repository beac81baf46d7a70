"""How much of a dataset is done, and how its last run ended: what `userdiff status` prints."""

import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from userdiff.dataset.layout import MANIFEST_NAME, RECORD_NAME
from userdiff.dataset.locks import lock_holder
from userdiff.dataset.manifest import recorded_rows
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import Rows
from userdiff.dataset.run_record import RunEntry, RunRecord
from userdiff.dataset.scan import have_files, user_folders
from userdiff.text import count

LITTLE_ROOM = 2**16  # bytes
_LOOKS = 5

_STOPPED = re.compile(r"stopped by signal (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How much of a dataset is done."""

    state: str
    """`running`, `complete`, `incomplete`, `killed`, `stopped by SIGTERM` (or another) or `failed`; of the last run."""
    detail: str
    """Who is running it, or what ended it; may be empty."""
    wanted: dict[int, int]
    """User id -> images that the last run was asked for."""
    done: dict[int, int]
    """User id -> how many of them have a row, and a file of the row's size."""
    failed: dict[int, int]
    """User id -> how many of the others the last run could not make."""
    beyond: int
    """Images that are there and were not asked for by the last run."""
    shard: str | None
    """`2/7`, where the last run was asked for this shard alone."""
    unrecorded: int
    """Files under an image's name without a row; their rows may be on the way while a job runs."""


def existing_record(output_dir: Path) -> RunRecord:
    """Read a dataset's record; raises ValueError, with what to do, where there is none."""
    if run_record := RunRecord.read(output_dir):
        return run_record
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} holds no dataset: there is no such folder")
    remedy = "; the job's command makes it again" * (output_dir / MANIFEST_NAME).is_file()
    raise ValueError(f"{output_dir} holds no dataset: no {RECORD_NAME}{remedy}")


def best_rows(output_dir: Path, recipe: Recipe | None) -> Rows:
    """Read manifest and parts, one row per image; with a recipe, only rows that agree with it."""
    rows = recorded_rows(output_dir)
    if recipe:
        rows.keep(recipe.agrees(rows))
    return rows.keep_best()


def num_of_wanted(rows: Rows, entry: RunEntry) -> dict[int, int]:
    """Return how many of the images that a run was asked for have a row: user id -> number."""
    return {
        user_id: int(entry.asks_for(user_id, rows.of_user(user_id)["image_index"]).sum()) for user_id in entry.wanted()
    }


def read_status(output_dir: Path) -> Status:
    """Read a dataset's status from its records and the sizes of its files; raises ValueError if there is no dataset."""
    for _ in range(_LOOKS):
        run_record = existing_record(output_dir)
        status = _status(output_dir, run_record)
        if RunRecord.read(output_dir) == run_record:  # else a run has begun or ended meanwhile
            break
    return status


def _status(output_dir: Path, run_record: RunRecord) -> Status:
    entry, wanted = run_record.last, run_record.last.wanted() if run_record.last else {}
    rows = best_rows(output_dir, Recipe.of(run_record.identity, run_record.run))
    folders = list(user_folders(output_dir))
    unrecorded = sum(len(folder.without_row(rows)) for folder in folders)
    rows.keep(have_files(folders, rows))
    done = num_of_wanted(rows, entry) if entry else {}
    failed = Counter(item[0] for item in (entry.failed if entry else ()) if not rows.of_image(*item))
    state, detail = state_of(output_dir, entry, is_complete=sum(done.values()) == sum(wanted.values()))
    return Status(
        state=state,
        detail=detail,
        wanted=wanted,
        done=done,
        failed=failed,
        beyond=len(rows) - sum(done.values()),
        shard=entry.shard if entry else None,
        unrecorded=unrecorded,
    )


def state_of(output_dir: Path, entry: RunEntry | None, *, is_complete: bool) -> tuple[str, str]:
    """Return the state of a folder whose last run this is, and its detail, as `Status` has them."""
    if holder := lock_holder(output_dir):
        return "running", holder
    if entry is None or entry.state == "running":  # it could not note more, and holds no lock any longer
        total, _, free = shutil.disk_usage(output_dir)
        # a full disk cannot even note that it is full
        return "killed", f"or out of room, {free} bytes are free" if total and free < LITTLE_ROOM else ""
    if entry.state == "ended":
        return ("complete" if is_complete else "incomplete"), ""
    state = entry.state
    if match := _STOPPED.fullmatch(state):
        with suppress(ValueError):  # a number of another system
            state = f"stopped by {signal.Signals(int(match[1])).name}"
    return state, entry.cause or ""


def status_lines(output_dir: Path) -> Iterator[str]:
    """Yield what `userdiff status` prints; raises ValueError where there is no dataset."""
    found = read_status(output_dir)
    of_shard = f", shard {found.shard}" if found.shard else ""
    yield f"{output_dir}: {found.state}{f' ({found.detail})' if found.detail else ''}{of_shard}"
    yield f"{'user':>8} {'done':>8} {'missing':>8} {'failed':>8}"
    lines = [
        (user_id, found.done[user_id], wanted - found.done[user_id], found.failed.get(user_id, 0))
        for user_id, wanted in found.wanted.items()
    ]
    totals = [sum(line[column] for line in lines) for column in (1, 2, 3)]
    for line in [*lines, ("all", *totals)]:
        yield " ".join(f"{value:>8}" for value in line)
    if found.beyond:
        yield f"and {count(found.beyond, 'image')} beyond the last request"
    if found.unrecorded and found.state != "running":
        yield (
            f"{count(found.unrecorded, 'image')} without a row, not counted here: `userdiff merge {output_dir}` records "
            "what is this job's, and so does the job's command"
        )
