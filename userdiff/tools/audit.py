"""What a dataset's folder holds, against what its records say."""

import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from userdiff.dataset import images, manifest
from userdiff.dataset.manifest import Recipe, Track
from userdiff.dataset.rows import COLUMNS, Item, Row, Table
from userdiff.dataset.run_record import RECORD_NAME, RunRecord, folder_lock, lock_holder
from userdiff.text import id_range
from userdiff.tools.run_summary import count

LITTLE_ROOM = 2**16  # bytes
FLAT_TOLERANCE = 1.5  # times the size of a black image's file, whose text may be longer
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}

_NONE = np.zeros(0, np.uint32)
_STOPPED = re.compile(r"stopped by signal (\d+)")

# Status --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How far a dataset is."""

    state: str
    """`running`, `complete`, `incomplete`, `killed`, `stopped by SIGTERM` (or another) or `failed`; of the last run."""
    detail: str
    """Who is running it, or what ended it; may be empty."""
    wanted: dict[int, int]
    """User id -> images that the last run was asked for."""
    done: dict[int, int]
    """User id -> how many of them have a row and a file of the row's size."""
    failed: dict[int, int]
    """User id -> how many of the others the last run could not make."""
    beyond: int
    """Images that are there and were not asked for by the last run."""
    unrecorded: int
    """Files under an image's name without a row; their rows may be on the way while a job runs."""


def read_status(output_dir: Path) -> Status:
    """Read how far a dataset is, from its records and the sizes of its files; raises ValueError where there is none."""
    run_record = _record(output_dir)
    entry = _last_run(run_record)
    wanted = _wanted(run_record)
    rows = _rows(output_dir, Recipe.of(run_record.identity, run_record.run))
    unrecorded = _keep_those_with_files(output_dir, rows)
    done = _number_of(rows, wanted)
    failed = Counter(user_id for user_id, index in entry.get("failed", []) if not rows.of_image(user_id, index))
    is_complete = sum(done.values()) == sum(wanted.values())
    state, detail = _state(entry, lock_holder(output_dir), is_complete=is_complete)
    if state == "killed" and (free := images.space(output_dir, 1, 1).free) < LITTLE_ROOM:
        detail = f"or out of room, {free} bytes are free"  # a full disk cannot even note that it is full
    beyond = len(rows) - sum(done.values())
    return Status(
        state=state,
        detail=detail,
        wanted=wanted,
        done=done,
        failed=failed,
        beyond=beyond,
        unrecorded=unrecorded,
    )


def _keep_those_with_files(output_dir: Path, rows: Table) -> int:
    """Keep the rows for which there is a file of the row's size; gives how many files have no row."""
    without, num_unrecorded = set(rows.user_ids), 0
    for folder in images.user_folders(output_dir):
        block = rows.block(folder.user_id)
        num_unrecorded += int((~np.isin(folder.image_indices, block["image_index"], assume_unique=True)).sum())
        if folder.user_id in without:
            without.remove(folder.user_id)
            rows.keep(folder.user_id, manifest.is_recorded(folder, block))
    for user_id in without:
        rows.keep(user_id, np.zeros(len(rows.block(user_id)), bool))
    return num_unrecorded


def _number_of(rows: Table, wanted: Mapping[int, int]) -> dict[int, int]:
    """Count the rows of images that were asked for: user id -> how many."""
    indices = rows.image_indices()
    return {user_id: int((indices.get(user_id, _NONE) < number).sum()) for user_id, number in wanted.items()}


def _state(entry: dict[str, Any], holder: str | None, *, is_complete: bool) -> tuple[str, str]:
    if holder:
        return "running", holder
    state = entry.get("state", "running")
    if state == "running":
        return "killed", ""  # it could not say more, and holds no lock any longer
    if state == "ended":
        return ("complete" if is_complete else "incomplete"), ""
    if match := _STOPPED.fullmatch(state):
        with suppress(ValueError):  # of another system, or edited
            state = f"stopped by {signal.Signals(int(match[1])).name}"
    return state, entry.get("cause") or ""


# Verification --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True, slots=True)
class Problem:
    """Something in a folder that is not as its records say."""

    kind: str
    """`missing`, `changed`, `unrecorded`, `unmerged` or `foreign`."""
    name: str
    """A path relative to the folder, with `/`."""
    what: str


def verify(output_dir: Path, *, deep: bool = False, track: Track = manifest.untracked) -> list[Problem]:
    """Compare the rows of a dataset with its files by size; `deep`: by hash, decoding every image.

    Raises ValueError where there is no dataset. A folder without `run.json` is compared with its manifest alone.
    """
    run_record = RunRecord.read(output_dir)
    if run_record is None and not (output_dir / manifest.MANIFEST_NAME).is_file():
        raise ValueError(f"{output_dir} holds no dataset: neither {RECORD_NAME} nor {manifest.MANIFEST_NAME}")
    recipe = Recipe.of(run_record.identity, run_record.run) if run_record else None
    folders = list(images.user_folders(output_dir))  # before the rows, which come after the files while a job runs
    rows = _rows(output_dir, recipe)
    strange, unrecorded = _without_rows(output_dir, folders, rows, recipe)
    problems = [*_record_problems(output_dir, run_record), *_misleading(output_dir), *strange]
    if lock_holder(output_dir) is None:  # else their rows may be on the way
        problems += [
            Problem("unrecorded", f"user_{user_id:02d}", f"{count(len(indices), 'image')} without a row")
            for user_id, indices in unrecorded.items()
        ]
    check = _deep_problem if deep else _problem
    suspects = rows if deep else _without_files(folders, rows)
    found = manifest.read_all(lambda row: check(output_dir, row), suspects)
    problems += [problem for problem in track(found, len(suspects)) if problem]
    if run_record:
        wanted = _wanted(run_record)
        known = _number_of(rows, wanted)
        for user_id, number in wanted.items():
            known[user_id] += sum(index < number for index in unrecorded.get(user_id, ()))
        problems += [
            Problem("missing", f"user_{user_id:02d}", f"{number - known[user_id]} of {number} images are not there")
            for user_id, number in wanted.items()
            if known[user_id] < number
        ]
    return sorted(problems)


def _record_problems(output_dir: Path, run_record: RunRecord | None) -> Iterator[Problem]:
    if run_record is None:
        yield Problem("missing", RECORD_NAME, "the record is gone, and with it what was asked for")
    sha256 = manifest.file_sha256(output_dir / manifest.MANIFEST_NAME)
    if sha256 is None:
        yield Problem("missing", manifest.MANIFEST_NAME, "the manifest is gone")
    elif run_record and run_record.manifest_sha256 not in (None, sha256):
        yield Problem("changed", manifest.MANIFEST_NAME, "the manifest is not as it was published")
    if lock_holder(output_dir) is None:
        for part in manifest.part_paths(output_dir):
            yield Problem("unmerged", part.name, "rows of an interrupted run")


def _without_files(folders: Iterable[images.UserFolder], rows: Table) -> list[Row]:
    """Find the rows for which there was no file of the row's size."""
    with_files = {folder.user_id: folder for folder in folders}
    suspects: list[Row] = []
    for user_id in rows.user_ids:
        block, folder = rows.block(user_id), with_files.get(user_id)
        has_file = manifest.is_recorded(folder, block) if folder else np.zeros(len(block), bool)
        suspects += [row for index in block["image_index"][~has_file].tolist() for row in rows.of_image(user_id, index)]
    return suspects


def _without_rows(
    output_dir: Path, folders: Iterable[images.UserFolder], rows: Table, recipe: Recipe | None
) -> tuple[list[Problem], dict[int, list[int]]]:
    """Find what lies in user folders and has no row: what is not a job's or is damaged, and a job's images by user.

    A job's are those of the recipe, where there is one.
    """
    strange: list[Problem] = []
    unrecorded: dict[int, list[int]] = {}
    recorded = rows.image_indices()
    for folder in folders:
        strange += [Problem("foreign", f"{folder.name}/{name}", "not an image of a job") for name in folder.others]
        known = recorded.get(folder.user_id, _NONE)
        for image_index in np.setdiff1d(folder.image_indices, known, assume_unique=True).tolist():
            name = images.file_name(folder.user_id, image_index)
            text = images.read_text_chunks(output_dir / name)
            if text is None:
                strange.append(Problem("changed", name, "no row in the manifest, and not a readable PNG"))
            elif images.RUN_CHUNK not in text:
                strange.append(Problem("foreign", name, "not made by a job"))
            elif recipe and text[images.RUN_CHUNK] != recipe.run:
                strange.append(Problem("foreign", name, "made with another model or other settings"))
            elif recipe and text != recipe.text_chunks(folder.user_id, image_index):
                strange.append(Problem("changed", name, "it says to be another image"))
            else:
                unrecorded.setdefault(folder.user_id, []).append(image_index)
    return strange, unrecorded


def _misleading(output_dir: Path) -> Iterator[Problem]:
    """Find what loaders would take for a class or an image, beside the user folders."""
    for path in output_dir.iterdir():
        if path.is_dir() and not images.FOLDER_NAME.fullmatch(path.name):
            yield Problem("foreign", path.name, "loaders take every folder for a class")
        elif not path.is_dir() and images.FOLDER_NAME.fullmatch(path.name):
            yield Problem("foreign", path.name, "a file where a user's folder goes")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield Problem("foreign", path.name, "an image beside the user folders hides all labels from loaders")


def _problem(output_dir: Path, row: Row) -> Problem | None:
    size = _size(output_dir / row.file_name)
    if size is None:
        return Problem("missing", row.file_name, "the file is gone")
    if size != row.num_bytes:
        return Problem("changed", row.file_name, f"{size} bytes, its row says {row.num_bytes}")
    return None


def _deep_problem(output_dir: Path, row: Row) -> Problem | None:
    """Read an image: its hash, its pixels, and what it says of itself."""
    shallow = _problem(output_dir, row)
    if shallow:
        return shallow
    try:
        data = (output_dir / row.file_name).read_bytes()
        size, text = images.decode_png(data)
    except OSError as error:
        return Problem("changed", row.file_name, str(error))
    if manifest.sha256(data) != row.sha256 or size != (row.width, row.height):
        return Problem("changed", row.file_name, "its content is not what its row says")
    said = (text.get("user_id"), text.get("image_index"), text.get("seed"))
    if said != (str(row.user_id), str(row.image_index), str(row.seed)):
        return Problem("changed", row.file_name, "it says to be another image")
    return None


# Merging, and what is seldom meant -----------------------------------------------------------------------------------


def merge(output_dir: Path, track: Track = manifest.untracked) -> Table:
    """Put an interrupted run's parts into the manifest, as the next run would; raises ValueError without a dataset."""
    _record(output_dir)
    with folder_lock(output_dir):
        run_record = _record(output_dir)  # as it is now that nobody else writes it
        recipe = Recipe.of(run_record.identity, run_record.run)
        rows = manifest.finished_rows(output_dir, recipe, run_record.manifest_sha256, track=track)
        run_record.manifest_sha256 = manifest.write_manifest(output_dir, rows)
        images.publish(output_dir / RECORD_NAME, run_record.to_bytes(), sync=True)
    return rows


def flat_images(output_dir: Path, rows: Table) -> tuple[list[Item], set[Item]]:
    """Find the images of one single colour, and those among the small ones that cannot be read.

    Only files no larger than an image of one colour can be are opened.
    """
    flat: list[Item] = []
    broken: set[Item] = set()
    for width, height in rows.sizes():
        black = np.zeros((height, width, 4), np.uint8)
        limit = FLAT_TOLERANCE * len(images.encode_png(black, dict.fromkeys(COLUMNS[:6], "0" * 64)))
        for item in rows.smaller_than(width, height, limit):
            try:
                if images.is_flat(output_dir / images.file_name(*item)):
                    flat.append(item)
            except OSError:  # noqa: PERF203 - opening a file takes far longer
                broken.add(item)
    return sorted(flat), broken


def _record(output_dir: Path) -> RunRecord:
    run_record = RunRecord.read(output_dir)
    if run_record is not None:
        return run_record
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} holds no dataset: there is no such folder")
    remedy = "; the job's command makes it again" * (output_dir / manifest.MANIFEST_NAME).is_file()
    raise ValueError(f"{output_dir} holds no dataset: no {RECORD_NAME}{remedy}")


def _last_run(run_record: RunRecord) -> dict[str, Any]:
    return run_record.history[-1] if run_record.history else {}


def _wanted(run_record: RunRecord) -> dict[int, int]:
    """User id -> images that the last run was asked for."""
    entry = _last_run(run_record)
    user_ids = (user_id for text in entry.get("user_ids", "").split() for user_id in id_range(text))
    return dict.fromkeys(user_ids, entry.get("num_images_per_user", 0))


def _rows(output_dir: Path, recipe: Recipe | None) -> Table:
    """Read what is recorded, a row an image; with a recipe, what agrees with it."""
    rows = manifest.recorded_rows(output_dir)
    for user_id in rows.user_ids:
        if recipe:
            rows.keep(user_id, recipe.agrees(user_id, rows.block(user_id)))
    return rows.keep_best()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
