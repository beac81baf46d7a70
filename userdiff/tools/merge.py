"""Putting rows together: an interrupted run's parts into its manifest, or the datasets of several jobs into one folder.

Images of several datasets are linked where possible. `find_finished` decides which files count as finished.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from userdiff.dataset import layout, locks
from userdiff.dataset.atomic import publish, remove_temporaries
from userdiff.dataset.manifest import PartWriter, write_manifest
from userdiff.dataset.png import read_png
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import Row, Rows, as_rows
from userdiff.dataset.run_record import NUMERICS_DEFAULTS, RunEntry, RunRecord, now
from userdiff.dataset.scan import Finished, Track, check_own_files, find_finished, foreign_names, read_all, untracked
from userdiff.identity import describe_differences
from userdiff.seeds import Item
from userdiff.shutdown import Failed, Halted, Shutdown
from userdiff.text import format_ids, refusal
from userdiff.tools.preview import preview_page
from userdiff.tools.status import existing_record, num_of_wanted

_CANNOT_LOCK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def merge(output_dir: Path, track: Track = untracked, on_edited: Callable[[Path], None] = lambda copy: None) -> Rows:
    """Put an interrupted run's parts into the manifest, as the next run would; raises ValueError without a dataset.

    on_edited: as of `write_manifest`.
    """
    existing_record(output_dir)
    with locks.folder_lock(output_dir):
        locks.wait_for_writers(output_dir)
        check_own_files(output_dir)
        run_record = existing_record(output_dir)  # as it is now that nobody else writes it
        recipe = Recipe.of(run_record.identity, run_record.run)
        rows = find_finished(output_dir, recipe, run_record.manifest_sha256, track=track).rows_to_keep()
        run_record.manifest_sha256 = write_manifest(output_dir, rows, on_edited)
        run_record.publish(output_dir)
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """The result of joining datasets."""

    num_images: int
    """All images in the joined folder, including those from before."""
    num_linked: int
    """Images added now, as hard links."""
    num_copied: int
    num_missing: int
    """Wanted images that are not there; wanted are all users of the last runs, each with the largest number."""
    left_out: dict[Path, list[Item]]
    """Folder -> its images that are missing, damaged or of another run, and that no other folder has."""
    shards: str
    """What the folders lack as shards of one dataset; may be empty."""
    numerics: list[str]
    """The numerics in which the folders differ, a text each."""


def merge_into(
    sources: Sequence[Path],
    into: Path,
    *,
    shutdown: Shutdown | None = None,
    track: Track = untracked,
    on_edited: Callable[[Path], None] = lambda copy: None,
) -> Joined:
    """Put the finished images of `sources`, which stay as they are, into one dataset; `into` may be one already.

    All must have one identity, and the same bytes of an image that several hold. Raises ValueError, before anything is
    written, where that is not so or a folder is in use; after that, Halted where a signal or a disk ends it. However it
    ended, the same call goes on from there.

    track: is shown the files that are read, then the images that are put.
    """
    shutdown = shutdown or Shutdown()
    sources = _distinct_folders(sources, into)
    _read_records(sources, into)  # before a lock would leave its file in what is no dataset
    with ExitStack() as held:
        held.enter_context(locks.made_folder(into))
        for path in sorted([*sources, into], key=Path.resolve):  # in one order, whoever else joins them
            _hold(path, held, may_be_read_only=path != into)
        locks.wait_for_writers(into, on_poll=shutdown.check)
        records = _read_records(sources, into)  # as they are now that nobody else writes them
        first = next(iter(records.values()))
        recipe = Recipe.of(first.identity, first.run)
        found = {
            path: find_finished(
                path, recipe, one.manifest_sha256, track=lambda items, total: shutdown.checked(track(items, total))
            )
            for path, one in records.items()
        }
        own = found[into].rows if into in found else Rows()
        lost = {path: {*one.lost, *one.foreign_images} for path, one in found.items()}
        num_pending = _check_images(found, records, into) - len(own)
        history: list[RunEntry] = []
        for one in records.values():  # an earlier joining brought some of their runs already
            history += [entry for entry in one.history if entry not in history]
        history.sort(key=lambda entry: entry.started)
        run_record = RunRecord(identity=first.identity, numerics=first.numerics, history=history)
        entry = _new_entry(records, sources, first)
        edited = found[into].edited if into in found else []
        with _noted(into, run_record, entry, own, num_pending, edited, on_edited):
            ways: Counter[str] = Counter()
            putting = _put_all({path: one.rows for path, one in found.items() if path != into}, own, into)
            # Closed, for its threads to have ended before anybody else holds the folder.
            part_path = layout.part_path(into, 0)
            with PartWriter(part_path) as part, closing(putting) as puts:
                for source, row, way in shutdown.checked(track(puts, num_pending)):
                    ways[way] += 1
                    if way == "damaged":
                        lost[source].add((row.user_id, row.image_index))
                    else:
                        part.append(row)
                        entry.published += 1
            # From here on it is the end of any job.
            at_end = find_finished(into, recipe, run_record.manifest_sha256, trusted_parts=[part_path])
            rows = at_end.rows
            entry.failed = [item for item in entry.failed if not rows.of_image(*item)]
            num_missing = sum(entry.wanted().values()) - sum(num_of_wanted(rows, entry).values())
            num_images = len(rows)
            run_record.manifest_sha256 = write_manifest(into, at_end.rows_to_keep(), on_edited)
            page = preview_page(into, rows, run_record, ended=datetime.now(timezone.utc))
            publish(into / layout.PREVIEW_NAME, page)
    left_out = {path: [item for item in sorted(items) if not rows.of_image(*item)] for path, items in lost.items()}
    return Joined(
        num_images=num_images,
        num_linked=ways["linked"],
        num_copied=ways["copied"],
        num_missing=num_missing,
        left_out={path: items for path, items in left_out.items() if items},
        shards=_missing_shards(history),
        numerics=_different_numerics(records),
    )


# What goes together --------------------------------------------------------------------------------------------------


def _distinct_folders(sources: Sequence[Path], into: Path) -> list[Path]:
    """Return each source once; raises ValueError where one lies in the joined folder, or that in one of them."""
    target = _place(into)
    if os.path.lexists(into) and not os.path.isdir(into):  # noqa: PTH112 - Path.is_dir raises where it may not look
        kind = "a file" if into.is_file() else "no folder"
        raise ValueError(f"--into: {into} is {kind}, needed: a folder, or a path where one can be made")
    distinct: dict[Path, Path] = {}
    for source in sources:
        place = _place(source)
        distinct.setdefault(place, source)
        if place == target:
            raise ValueError(
                f"--into: {into} is one of the folders to join; it keeps what it holds, leave it out of them"
            )
        if place in target.parents or target in place.parents:
            outer, inner = (source, into) if place in target.parents else (into, source)
            raise ValueError(
                f"--into: {inner} lies in {outer}, whose folders loaders take for classes; needed: one beside it"
            )
    for folder in layout.entries(into):
        if source_of_link := distinct.get(_place(folder).parent):
            raise ValueError(f"--into: {folder} is a link into {source_of_link}, which is to stay as it is")
    return list(distinct.values())


def _place(path: Path) -> Path:
    """Return where a path leads; unlike `Path.resolve`, of a link to itself too."""
    return Path(os.path.realpath(path))


def _check_user_folders(into: Path, rows: Rows) -> None:
    """Raise ValueError where something that is no folder has the name of one of these users'."""
    for user_id in rows.user_ids:
        folder = (into / layout.file_name(user_id, 0)).parent
        if os.path.lexists(folder) and not os.path.isdir(folder):  # noqa: PTH112 - as above
            raise ValueError(
                f"--into: {folder} is no folder, needed: one for the images of user {user_id}; move it away"
            )


def _read_records(sources: Sequence[Path], into: Path) -> dict[Path, RunRecord]:
    """Read the records of all folders, first that of `into` if it has one; raises ValueError where identities differ."""
    needed = "needed: a new folder, or one that a job or an earlier merge made"
    for name in foreign_names(into):
        raise ValueError(f"--into: {into} holds {name}, which no job is known to have made; {needed}")
    own = RunRecord.read(into)
    records = {into: own} if own else {}
    if own is None:
        for path in chain.from_iterable(map(layout.entries, layout.user_folders(into))):
            if layout.is_system(path.name):
                continue
            raise ValueError(
                f"--into: {into} has no {layout.RECORD_NAME} but holds {path.relative_to(into).as_posix()}; {needed}"
            )
    for source in sources:
        one = RunRecord.read(source)
        if one is None:
            raise ValueError(f"{source} holds no dataset: no {layout.RECORD_NAME}; leave it out, or run its job first")
        records[source] = one
    first = next(iter(records))
    other = next((path for path in records if records[path].run != records[first].run), None)
    if other:

        def describe(name: str, ours: str, theirs: str) -> str:
            return f"{name} is {ours} in {first}, {theirs} in {other}"

        changed = describe_differences(records[first].identity, records[other].identity, describe)
        raise ValueError(
            f"{other} holds images made otherwise than those of {first} ({changed}); only jobs of one model with the same "
            "flags can be joined, but for users and numbers of images"
        )
    return records


def _hold(path: Path, held: ExitStack, *, may_be_read_only: bool) -> None:
    """Hold a folder until `held` ends; one that cannot be written to need only be free: its images are whole or absent."""
    try:
        held.enter_context(locks.folder_lock(path))
    except OSError as error:
        if not may_be_read_only or error.errno not in _CANNOT_LOCK:
            raise
        if holder := locks.lock_holder(path):
            raise ValueError(f"{path} is in use by another job ({holder})") from error


def _check_images(found: Mapping[Path, Finished], records: Mapping[Path, RunRecord], into: Path) -> int:
    """Return how many different images all folders hold.

    Raises ValueError where two hold different bytes of one, or where a foreign image is in the way of one.
    """
    together = Rows(row for one in found.values() for row in one.rows)
    _check_user_folders(into, together)
    for item in found[into].foreign_images if into in found else ():
        if together.of_image(*item):
            raise ValueError(f"--into: {into / layout.file_name(*item)} was not made by these jobs; move it away")
    array, is_best = together.array, together.is_best()
    differs = ~is_best[:-1] & (array["sha256"][1:] != array["sha256"][:-1])
    clashes = {(row.user_id, row.image_index) for row in as_rows(array[:-1][differs])}
    if clashes:
        name = layout.file_name(*min(clashes))
        hashes = {path: one.rows.of_image(*min(clashes)) for path, one in found.items()}
        holders = [(path, rows[0].sha256) for path, rows in hashes.items() if rows]
        other = next(path for path, sha256 in holders if sha256 != holders[0][1])
        more = f", and so do {len(clashes) - 1} more that several folders hold" * (len(clashes) > 1)
        why = "; ".join(_different_numerics(records))
        raise ValueError(
            f"{holders[0][0] / name} and {other / name} differ{more}{why and f' ({why})'}; join without one of the two folders"
        )
    return int(is_best.sum())


def _different_numerics(records: Mapping[Path, RunRecord]) -> list[str]:
    """Return the numerics in which the folders differ: `batch_size is 4 in A, 8 in B and 2 more`."""
    texts = []
    for name in sorted({name for one in records.values() for name in one.numerics}):
        holders: dict[str, list[Path]] = {}
        for path, one in records.items():
            if (value := one.numerics.get(name, NUMERICS_DEFAULTS.get(name))) is not None:
                holders.setdefault(str(value), []).append(path)
        if len(holders) > 1:
            more = {value: f" and {len(paths) - 1} more" * (len(paths) > 1) for value, paths in holders.items()}
            texts.append(f"{name} is " + ", ".join(f"{v} in {paths[0]}{more[v]}" for v, paths in holders.items()))
    return texts


def _missing_shards(history: Sequence[RunEntry]) -> str:
    """Return which shards no run was asked for, or that shards were cut otherwise than others; empty where all is well."""
    cuts: dict[tuple[int, int], set[int]] = {}
    for entry in history:
        if entry.shard:
            shard = entry.shard_of_all()
            cuts.setdefault((shard.count, entry.numerics["batch_size"]), set()).add(shard.number)
    if len(cuts) > 1:
        texts = [f"{num_shards} with --batch_size {batch_size}" for num_shards, batch_size in sorted(cuts)]
        return f"these are shards of different cuts, of {', of '.join(texts)}, and images may be in none of them"
    for (num_shards, _), there in cuts.items():
        if absent := set(range(1, num_shards + 1)) - there:
            return f"no folder is of shard {format_ids(absent)} of {num_shards}"
    return ""


# The joined dataset's record -----------------------------------------------------------------------------------------


def _new_entry(records: Mapping[Path, RunRecord], sources: Sequence[Path], first: RunRecord) -> RunEntry:
    """Return the history entry of this merge. It asks for all users of the last runs, and the largest number of images."""
    last = [one.last for one in records.values() if one.last]
    return RunEntry(
        started=now(),
        joined=[_place(source).name for source in sources],
        num_processes=1,
        user_ids=format_ids({user_id for entry in last for user_id in entry.wanted()}),
        num_images_per_user=max((entry.num_images_per_user for entry in last), default=0),
        numerics=first.numerics,
        failed=sorted({item for entry in last for item in entry.failed}),
    )


@contextmanager
def _noted(
    into: Path,
    run_record: RunRecord,
    entry: RunEntry,
    own: Rows,
    num_pending: int,
    edited: Sequence[Row],
    on_edited: Callable[[Path], None],
) -> Iterator[None]:
    """Record in `run.json` that the merge is `running`, then how it ended. An OSError is raised as Failed."""
    try:
        remove_temporaries(into)
        # A killed joining's parts have gone into it.
        run_record.manifest_sha256 = write_manifest(into, chain(own, edited), on_edited)
        run_record.begin(into, entry)
        yield
        run_record.end(into)
    except BaseException as error:
        end = Failed(refusal(error)) if isinstance(error, OSError) else error
        if isinstance(end, Halted):
            end.progress = f"{len(own) + entry.published} of {len(own) + num_pending} images are in {into}"
        with suppress(OSError):  # the disk may be the cause; `running` without a holder says enough
            run_record.end(into, end)
        raise end from (error.__cause__ if end is error else error)


# Images --------------------------------------------------------------------------------------------------------------


def _put_all(sources: Mapping[Path, Rows], own: Rows, into: Path) -> Generator[tuple[Path, Row, str], None, None]:
    """Put every image that is not there yet into the folder; yields (source, row, `linked`, `copied` or `damaged`)."""
    done = {user_id: indices.copy() for user_id, indices in own.image_indices().items()}
    for source, rows in sources.items():
        for user_id in rows.user_ids:
            there = done.get(user_id, np.zeros(0, np.uint32))
            of_user = rows.of_user(user_id)
            to_put = as_rows(of_user[~np.isin(of_user["image_index"], there)])
            (into / layout.file_name(user_id, 0)).parent.mkdir(exist_ok=True)
            put_now = []
            for row, way in zip(to_put, read_all(partial(_put, source, into), to_put), strict=True):
                if way != "damaged":  # else another source may have it whole
                    put_now.append(row.image_index)
                yield source, row, way
            done[user_id] = np.concatenate([there, np.array(put_now, np.uint32)])


def _put(source: Path, into: Path, row: Row) -> str:
    """Put one image into the folder in one step: as a link where that can be, else as a copy that has its row's hash."""
    path = source / row.file_name
    if not path.is_symlink():  # what a link leads to is not of the source
        with suppress(OSError):  # another file system, or one without links; a damaged file of that name
            os.link(path, into / row.file_name)
            return "linked"
    try:
        with read_png(path) as data:
            if hashlib.sha256(data).hexdigest() != row.sha256:
                return "damaged"
            publish(into / row.file_name, data)
            return "copied"
    except OSError as error:
        if error.errno is None:  # no PNG
            return "damaged"
        raise
