"""Where a dataset's folder differs from its records: what `userdiff verify` prints."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from userdiff.dataset import layout
from userdiff.dataset.locks import lock_holder
from userdiff.dataset.manifest import manifest_sha256
from userdiff.dataset.png import RUN_CHUNK, decode_png, read_png
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import Row, Rows, as_rows
from userdiff.dataset.run_record import RunEntry, RunRecord
from userdiff.dataset.scan import Track, foreign_names, have_files, read_all, untracked, user_folders
from userdiff.text import count, refusal
from userdiff.tools.status import best_rows, num_of_wanted, state_of

_LISTED = 20  # problems of a kind; --deep on a broken disk may find thousands
_REMEDIES = {
    "missing": "the job's command makes it again",
    "changed": "the job's command makes it again; first remove an image whose size is still that of its row",
    "unreadable": "the system does not read it; see to the disk or its permissions, and leave the file as it is",
    "unmerged": "`userdiff merge` records it, and so does the job's command",
    "unrecorded": "`userdiff merge` records it, and so does the job's command",
    "foreign": "move it away",
}
_OF_MANIFEST = "`userdiff merge` writes it anew, and so does the job's command"


@dataclass(frozen=True, order=True, slots=True)
class Problem:
    """One difference between a folder and its records."""

    kind: str
    """`missing`, `changed`, `unreadable`, `unrecorded`, `unmerged` or `foreign`."""
    name: str
    """A path relative to the folder, with `/`."""
    what: str


def verify(output_dir: Path, *, deep: bool = False, track: Track = untracked) -> list[Problem]:
    """Compare the rows of a dataset with its files by size; `deep`: by hash, decoding every image.

    Raises ValueError where there is no dataset. A folder without `run.json` is compared with its manifest alone.
    """
    run_record = RunRecord.read(output_dir)
    if run_record is None and not (output_dir / layout.MANIFEST_NAME).is_file():
        raise ValueError(f"{output_dir} holds no dataset: neither {layout.RECORD_NAME} nor {layout.MANIFEST_NAME}")
    recipe = Recipe.of(run_record.identity, run_record.run) if run_record else None
    # The files before the rows: while a job runs, an image's row comes after its file.
    folders = list(user_folders(output_dir))
    rows = best_rows(output_dir, recipe)
    problems = [*_record_problems(output_dir, run_record), *_misleading(output_dir)]
    unrecorded: dict[int, list[int]] = {}
    for folder in folders:
        problems += [Problem("foreign", f"{folder.name}/{name}", "not an image of a job") for name in folder.foreign]
        for image_index in folder.without_row(rows).tolist():
            if problem := _problem_without_row(output_dir, recipe, folder.user_id, image_index):
                problems.append(problem)
            else:
                unrecorded.setdefault(folder.user_id, []).append(image_index)
    if lock_holder(output_dir) is None:  # else their rows may be on the way
        problems += [
            Problem("unrecorded", f"user_{user_id:02d}", f"{count(len(indices), 'image')} without a row")
            for user_id, indices in unrecorded.items()
        ]
    suspects = rows if deep else as_rows(rows.array[~have_files(folders, rows)])
    found = read_all(lambda row: _problem(output_dir, row, deep=deep), suspects)
    problems += [problem for problem in track(found, len(suspects)) if problem]
    if run_record and run_record.last:
        problems += _missing(rows, unrecorded, run_record.last)
    return sorted(problems)


def _record_problems(output_dir: Path, run_record: RunRecord | None) -> Iterator[Problem]:
    if run_record is None:
        yield Problem("missing", layout.RECORD_NAME, "the record is gone, and with it what was asked for")
    sha256 = manifest_sha256(output_dir)
    if sha256 is None:
        yield Problem("missing", layout.MANIFEST_NAME, "the manifest is gone")
    elif run_record and run_record.manifest_sha256 not in (None, sha256) and not _is_new(output_dir, sha256):
        yield Problem("changed", layout.MANIFEST_NAME, "the manifest is not as it was published")
    if lock_holder(output_dir) is None:
        for part in layout.part_paths(output_dir):
            yield Problem("unmerged", part.name, "rows of an interrupted run")


def _is_new(output_dir: Path, sha256: str) -> bool:
    """Return whether a manifest has been published since the record was read, or is just being published."""
    run_record = RunRecord.read(output_dir)
    return lock_holder(output_dir) is not None or (run_record is not None and run_record.manifest_sha256 == sha256)


def _misleading(output_dir: Path) -> Iterator[Problem]:
    """Yield what lies beside the users' folders and loaders would take for a class or an image."""
    for name in foreign_names(output_dir):
        yield Problem("foreign", name, "a job's file has this name, and no job is known to have made it")
    for path in layout.entries(output_dir):
        is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where it may not look
        if layout.is_system(path.name) or not os.path.lexists(path):  # gone since it was listed
            continue
        if is_folder and not layout.is_user_folder(path.name):
            yield Problem("foreign", path.name, "loaders take every folder for a class")
        elif not is_folder and layout.is_user_folder(path.name):
            yield Problem("foreign", path.name, "a file where a user's folder goes")
        elif path.suffix.lower() in layout.LOADED_SUFFIXES:
            yield Problem("foreign", path.name, "an image beside the user folders hides all labels from loaders")


def _problem_without_row(output_dir: Path, recipe: Recipe | None, user_id: int, image_index: int) -> Problem | None:
    """Check an image file that has no row; None if it is an image of the recipe, or of any job if there is no recipe."""
    name = layout.file_name(user_id, image_index)
    try:
        with read_png(output_dir / name) as data:
            _, text = decode_png(data)
    except OSError as error:
        return _unreadable(name, error) or Problem("changed", name, "no row in the manifest, and not a readable PNG")
    if RUN_CHUNK not in text:
        return Problem("foreign", name, "not made by a job")
    if recipe and text[RUN_CHUNK] != recipe.run:
        return Problem("foreign", name, "made with another model or other settings")
    if recipe and text != recipe.text_chunks(user_id, image_index):
        return Problem("changed", name, "it says to be another image")
    return None


def _problem(output_dir: Path, row: Row, *, deep: bool) -> Problem | None:
    """Check the size of a row's file; with `deep`, also its hash, its pixels and its text chunks."""
    path = output_dir / row.file_name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return Problem("missing", row.file_name, "the file is gone")
    except OSError as error:
        return _unreadable(row.file_name, error)
    if size != row.num_bytes:
        return Problem("changed", row.file_name, f"{size} bytes, its row says {row.num_bytes}")
    return _problem_inside(path, row) if deep else None


def _problem_inside(path: Path, row: Row) -> Problem | None:
    try:
        with read_png(path) as data:
            sha256 = hashlib.sha256(data).hexdigest()
            size, text = decode_png(data)
    except OSError as error:
        return _unreadable(row.file_name, error) or Problem("changed", row.file_name, str(error))
    if sha256 != row.sha256 or size != (row.width, row.height):
        return Problem("changed", row.file_name, "its content is not what its row says")
    said = (text.get("user_id"), text.get("image_index"), text.get("seed"))
    if said != (str(row.user_id), str(row.image_index), str(row.seed)):
        return Problem("changed", row.file_name, "it says to be another image")
    return None


def _unreadable(name: str, error: OSError) -> Problem | None:
    """Return the problem with a file that the system does not read; None for one that it reads, and that is no PNG."""
    return None if error.errno is None else Problem("unreadable", name, refusal(error).partition(" (")[0])


def _missing(rows: Rows, unrecorded: Mapping[int, list[int]], entry: RunEntry) -> Iterator[Problem]:
    """Yield a problem for each user with images that a run was asked for and that have neither a row nor a file."""
    known = num_of_wanted(rows, entry)
    of_shard = f" of shard {entry.shard}" if entry.shard else ""
    for user_id, number in entry.wanted().items():
        num_known = known[user_id] + int(entry.asks_for(user_id, np.array(unrecorded.get(user_id, []), np.int64)).sum())
        if num_known < number:
            what = f"{number - num_known} of {number} images{of_shard} are not there"
            yield Problem("missing", f"user_{user_id:02d}", what)


def problem_lines(output_dir: Path, problems: list[Problem], *, deep: bool) -> Iterator[str]:
    """Yield what `userdiff verify` prints: the problems by kind, how thorough the search was, and what to do about them."""
    kinds = Counter(problem.kind for problem in problems)
    for kind, number in kinds.items():
        for problem in [problem for problem in problems if problem.kind == kind][:_LISTED]:
            yield f"{kind:<10}  {problem.name}: {problem.what}"
        if number > _LISTED:
            yield f"{kind:<10}  and {number - _LISTED} more"
    found = "all is well"
    if problems:
        found = f"{count(len(problems), 'problem')}: {', '.join(f'{number} {kind}' for kind, number in kinds.items())}"
    yield f"{output_dir}: {found} ({'every image read' if deep else 'sizes compared, contents not read'})"
    holder = lock_holder(output_dir)
    if holder is None and (end := _early_end(output_dir)):
        yield f"The last run {end}; the job's command goes on from there, and mends what is missing, unmerged or unrecorded"
    for kind in kinds:
        names = {problem.name for problem in problems if problem.kind == kind}
        if names - {layout.MANIFEST_NAME}:
            yield f"What is {kind}: {_REMEDIES[kind]}"
        if kind in ("missing", "changed") and layout.MANIFEST_NAME in names:
            yield f"{layout.MANIFEST_NAME} is {kind}: {_OF_MANIFEST}"
    if holder:
        yield f"A job is at work here ({holder}): what is missing may be on its way"


def _early_end(output_dir: Path) -> str | None:
    """Return how the last run ended, if it did not come to its end: `was killed`, `was stopped by SIGTERM`."""
    run_record = RunRecord.read(output_dir)
    entry = run_record.last if run_record else None
    if entry is None or entry.state == "ended":
        return None
    state, detail = state_of(output_dir, entry, is_complete=False)
    return f"{'' if state == 'failed' else 'was '}{state}{f' ({detail})' if detail else ''}"
