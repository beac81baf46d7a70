"""The datasets of independent jobs, joined in one folder: by hard links where possible, and only what is proven."""

import errno
import os
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from userdiff.dataset import images, manifest
from userdiff.dataset import run_record as record
from userdiff.dataset.manifest import Track
from userdiff.dataset.rows import Item, Row, Table
from userdiff.dataset.run_record import RECORD_NAME, RunRecord
from userdiff.shutdown import Failed, Halted, Interrupt, Stopped, refusal
from userdiff.text import format_ids, id_range
from userdiff.tools import agreement
from userdiff.tools import preview as gallery
from userdiff.tools.agreement import Copies, Plan

_SLICE = 1000  # images; whoever stops listening waits for no more than that
_TASK = 25  # of them, for a thread: a link takes less than handing it over
_CANNOT_LOCK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_LINKED, _COPIED, _DAMAGED = "linked", "copied", "damaged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """What came of joining."""

    num_images: int
    """In the joined folder, those that were there before included."""
    num_linked: int
    """Put there now, as hard links."""
    num_copied: int
    num_missing: int
    """Of those that the last runs in the folders were asked for, all users by the largest number."""
    left_out: dict[Path, list[Item]]
    """Folder -> its images that are gone, damaged or of another run; and that no other folder has."""
    numerics: list[str]
    """The numerics in which the folders differ, a text each."""


def join(
    sources: Sequence[Path], into: Path, *, interrupt: Interrupt | None = None, track: Track = manifest.untracked
) -> Joined:
    """Put the finished images of `sources`, which stay as they are, into one dataset; `into` may be one already.

    All must have one identity, and an image that several hold the same bytes. Raises ValueError where that is not so or
    a folder is in use, before anything is written; after that, Halted when a signal or a disk ends it. However it
    ended, the same call goes on from there.

    track: is shown the files that are read, then the images that are put.
    """
    interrupt = interrupt or Interrupt()
    sources = agreement.distinct_folders(sources, into)
    agreement.read_records(sources, into)  # before a lock would leave its file in what is no dataset
    with ExitStack() as held:
        held.enter_context(record.made_folder(into))
        for path in sorted([*sources, into], key=Path.resolve):
            held.enter_context(record.folder_lock(path) if path == into else _held(path))
        with interrupt.abandonable():
            record.wait_for_writers(into)
            records = agreement.read_records(sources, into)  # as they are now that nobody else writes them
            plan = agreement.make_plan(
                into, [agreement.find_finished(path, one, track) for path, one in records.items()]
            )
        run_record = _joined_record(records, sources)
        with _last_entry(plan, run_record):
            ways = _put_all(plan, run_record, interrupt, track)
            num_images, num_missing = _conclude(plan, run_record, interrupt)
    put = {"num_linked": ways[_LINKED], "num_copied": ways[_COPIED], "num_missing": num_missing}
    return Joined(num_images=num_images, **put, left_out=plan.left_out, numerics=agreement.other_numerics(records))


@contextmanager
def _held(source: Path) -> Iterator[None]:
    """Hold a folder; one that nothing can be written to need only be free, since its images are whole or not there."""
    with ExitStack() as held:
        try:
            held.enter_context(record.folder_lock(source))
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            if holder := record.lock_holder(source):
                raise ValueError(f"{source} is in use by another job ({holder})") from error
        yield


def _joined_record(records: Mapping[Path, RunRecord], sources: Collection[Path]) -> RunRecord:
    """Make the record of the joined dataset: the first one's numerics, the runs of all, and this joining as the last.

    It asks for what their last runs asked for: all users, and of each the largest number of images.
    """
    first = next(iter(records.values()))
    history: list[dict[str, Any]] = []
    for one in records.values():
        history += [entry for entry in one.history if entry not in history]  # an earlier joining brought some already
    history.sort(key=lambda entry: str(entry.get("started")))
    last = [one.history[-1] for one in records.values() if one.history]
    wanted = [_wanted(entry) for entry in last]
    entry = {
        "started": record.now(),
        "ended": None,
        "state": "running",
        "cause": None,
        "joined": [source.resolve().name for source in sources],
        "num_processes": 1,
        "user_ids": format_ids(set().union(*(users for users, _ in wanted))),
        "num_images_per_user": max((number for _, number in wanted), default=0),
        "numerics": first.numerics,
        "published": 0,
        "failed": sorted(
            {(user_id, image_index) for entry in last for user_id, image_index in entry.get("failed", [])}
        ),
    }
    return RunRecord(identity=first.identity, numerics=first.numerics, history=[*history, entry])


@contextmanager
def _last_entry(plan: Plan, run_record: RunRecord) -> Iterator[None]:
    """Keep the joined dataset's `run.json` true meanwhile: it says `running`, then how the joining ended."""
    entry = run_record.history[-1]

    def publish(state: str) -> None:
        entry["state"], entry["ended"] = state, None if state == "running" else record.now()
        images.publish(plan.into / RECORD_NAME, run_record.to_bytes(), sync=True)

    try:
        images.remove_temporaries(plan.into)
        own_rows = plan.own_rows  # a killed joining's parts are among them, and go
        run_record.manifest_sha256 = manifest.write_manifest(plan.into, own_rows)
        publish("running")
        yield
        publish("ended")
    except BaseException as error:
        end = Failed(refusal(error)) if isinstance(error, OSError) else error
        if isinstance(end, Halted):
            num_own = len(plan.own_rows)
            end.progress = f"{num_own + entry['published']} of {num_own + plan.num_waiting} images are in {plan.into}"
        entry["cause"] = None if isinstance(end, Stopped) else str(end) or type(end).__name__
        with suppress(OSError):  # the disk may be what it ends of; `running` without a holder says enough
            publish(f"stopped by signal {end.signal_number}" if isinstance(end, Stopped) else "failed")
        raise end from error.__cause__ if end is error else error


def _put_all(plan: Plan, run_record: RunRecord, interrupt: Interrupt, track: Track) -> Counter[str]:
    """Put every image that waits into the folder and note it in a part; count in which way it came."""
    entry = run_record.history[-1]
    ways: Counter[str] = Counter()
    part_path = manifest.part_path(plan.into, 0)
    with manifest.PartWriter(part_path) as part, closing(_puts(plan)) as puts, interrupt.abandonable():
        for (row, source), way in track(puts, plan.num_waiting):
            ways[way] += 1
            if way == _DAMAGED:
                plan.left_out.setdefault(source, []).append((row.user_id, row.image_index))
            else:
                part.append(row)
                entry["published"] += 1
    return ways


def _puts(plan: Plan) -> Generator[tuple[tuple[Row, Path], str], None, None]:
    """Put the images that wait, a slice at a time by several threads; gives each with the way in which it came."""
    waiting = (copies for copies in agreement.by_image(plan.datasets) if copies[0][1] != plan.into)

    def put(task: list[Copies]) -> list[tuple[tuple[Row, Path], str]]:
        return [(copies[0], _put(copies, plan.into)) for copies in task]

    while some := list(islice(waiting, _SLICE)):
        for folder in {images.file_name(copies[0][0].user_id, 0) for copies in some}:
            (plan.into / folder).parent.mkdir(exist_ok=True)
        tasks = [some[start : start + _TASK] for start in range(0, len(some), _TASK)]
        for done in manifest.read_all(put, tasks):
            yield from done


def _put(copies: Copies, into: Path) -> str:
    """Put one image into the folder in one step: as a link where that can be, else as a copy that has its row's hash."""
    for row, source in copies:
        with suppress(OSError):  # another file system, or one without links; a damaged file of that name
            path = source / row.file_name
            os.link(path.resolve() if path.is_symlink() else path, into / row.file_name)
            return _LINKED
    for row, source in copies:
        data = (source / row.file_name).read_bytes()
        if manifest.sha256(data) == row.sha256:
            images.publish(into / row.file_name, data)
            return _COPIED
    return _DAMAGED


def _conclude(plan: Plan, run_record: RunRecord, interrupt: Interrupt) -> tuple[int, int]:
    """Write the manifest and the page, and give the numbers of images that are there and that are missing."""
    rows = Table()
    for dataset in plan.datasets:
        rows.join(dataset.found.rows)
    rows.keep_best().remove(item for items in plan.left_out.values() for item in items)
    run_record.manifest_sha256 = manifest.write_manifest(plan.into, rows)
    entry = run_record.history[-1]
    entry["failed"] = [item for item in entry["failed"] if not rows.of_image(*item)]
    with interrupt.abandonable():
        page = gallery.preview_page(plan.into, rows, run_record, ended=datetime.now(timezone.utc))
    images.publish(plan.into / gallery.PREVIEW_NAME, page)
    users, number = _wanted(entry)
    num_done = sum(int((rows.block(user_id)["image_index"] < number).sum()) for user_id in users)
    return len(rows), len(users) * number - num_done


def _wanted(entry: Mapping[str, Any]) -> tuple[set[int], int]:
    """Read off a run's entry which users it was asked for, and how many images of each."""
    users = {user_id for text in entry.get("user_ids", "").split() for user_id in id_range(text)}
    return users, entry.get("num_images_per_user", 0)
