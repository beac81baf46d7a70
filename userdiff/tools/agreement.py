"""Whether datasets can be joined: what their folders, records and images must have in common."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, repeat
from pathlib import Path
from typing import NamedTuple

from userdiff.dataset import manifest
from userdiff.dataset.manifest import Finished, Recipe, Track
from userdiff.dataset.rows import Item, Row, Table
from userdiff.dataset.run_record import NUMERICS_DEFAULTS, RECORD_NAME, RunRecord
from userdiff.identity import describe_differences


class Dataset(NamedTuple):
    """A folder, its record, and what is finished of it."""

    path: Path
    record: RunRecord
    found: Finished


class Plan(NamedTuple):
    """What is to be done."""

    into: Path
    """The joined dataset's folder."""
    datasets: list[Dataset]
    """That of `into` first, if it has one."""
    num_waiting: int
    """Images to be put into it."""
    left_out: dict[Path, list[Item]]
    """Folder -> its images that are gone, damaged or of another run, and that no other folder has."""

    @property
    def own_rows(self) -> Table:
        """Of what `into` holds already."""
        first = self.datasets[0]
        return first.found.rows if first.path == self.into else Table()


Copies = list[tuple[Row, Path]]
"""The rows of one image and the folders that hold it, in the order of a plan's datasets."""


# Folders and records ------------------------------------------------------------------------------------------------


def distinct_folders(sources: Sequence[Path], into: Path) -> list[Path]:
    """Give each source once; raises ValueError where one lies in the joined folder, or that in one of them."""
    target = into.resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"--into: {into} is a file, needed: a folder, or a path where one can be made")
    distinct: dict[Path, Path] = {}
    for source in sources:
        place = distinct.setdefault(source.resolve(), source).resolve()
        if place == target:
            raise ValueError(
                f"--into: {into} is one of the folders to join; it keeps what it holds, leave it out of them"
            )
        if place in target.parents or target in place.parents:
            outer, inner = (source, into) if place in target.parents else (into, source)
            raise ValueError(
                f"--into: {inner} lies in {outer}, whose folders loaders take for classes; needed: one beside it"
            )
    for folder in into.glob("user_*"):
        if folder.resolve().parent in distinct:
            raise ValueError(
                f"--into: {folder} is a link into {distinct[folder.resolve().parent]}, which is to stay as it is"
            )
    return list(distinct.values())


def read_records(sources: Sequence[Path], into: Path) -> dict[Path, RunRecord]:
    """Read the records of all, first that of `into` if it has one; raises ValueError where they do not go together."""
    own = RunRecord.read(into)
    records = {into: own} if own else {}
    if own is None:
        _refuse_unknown(into)
    for source in sources:
        one = RunRecord.read(source)
        if one is None:
            raise ValueError(f"{source} holds no dataset: no {RECORD_NAME}; leave it out, or run its job first")
        records[source] = one
    first, begun = next(iter(records.items()))
    for path, other in records.items():
        if other.run != begun.run:
            raise ValueError(
                f"{path} holds images made otherwise than those of {first} ({_changes(begun, first, other, path)}); only "
                "jobs of one model with the same flags can be joined, but for users and numbers of images"
            )
    return records


def _changes(one: RunRecord, first: Path, other: RunRecord, second: Path) -> str:
    def tell(name: str, before: str, after: str) -> str:
        return f"{name} is {before} in {first}, {after} in {second}"

    return describe_differences(one.identity, other.identity, tell)


def _refuse_unknown(into: Path) -> None:
    """Raise ValueError where a folder without a record holds a manifest or images of nobody knows whom."""
    labels = into / manifest.MANIFEST_NAME
    is_ours = not labels.is_file() or manifest.is_manifest(labels)
    for path in sorted(into.glob("user_*/*")) if is_ours else [labels]:
        raise ValueError(
            f"--into: {into} has no {RECORD_NAME} but holds {path.relative_to(into).as_posix()}; needed: a new folder, "
            "or one that a job or an earlier merge made"
        )


# Images -------------------------------------------------------------------------------------------------------------


def find_finished(path: Path, run_record: RunRecord, track: Track) -> Dataset:
    """Look through a folder for what is to be believed, or proves itself; `track` is shown the files that are read."""
    recipe = Recipe.of(run_record.identity, run_record.run)
    found = manifest.find_finished(path, recipe, run_record.manifest_sha256, track=track)
    return Dataset(path, run_record, found)


def by_image(datasets: Sequence[Dataset]) -> Iterator[Copies]:
    """Go through the images of all datasets, in the order of the manifest."""
    rows = [zip(dataset.found.rows, repeat(dataset.path)) for dataset in datasets]  # each in that order

    def item(copy: tuple[Row, Path]) -> Item:
        return copy[0].user_id, copy[0].image_index

    for _, copies in groupby(heapq.merge(*rows, key=item), key=item):
        yield list(copies)


def make_plan(into: Path, datasets: list[Dataset]) -> Plan:
    """Find what is to be put into the folder, and what no folder can give.

    Raises ValueError where two folders hold different bytes of one image, or a stranger's lies where one is to go.
    """
    bad = {dataset.path: {*dataset.found.lost, *dataset.found.strangers} for dataset in datasets}
    in_the_way = {item for dataset in datasets if dataset.path == into for item in dataset.found.strangers}
    nowhere: set[Item] = set().union(*bad.values())
    num_waiting, num_clashes, clash = 0, 0, ""
    for (row, path), *others in by_image(datasets):
        item = (row.user_id, row.image_index)
        if item in in_the_way:
            raise ValueError(f"--into: {into / row.file_name} was not made by these jobs; move it away")
        other = next((other for twin, other in others if twin.sha256 != row.sha256), None)
        if other is not None:
            clash = clash or f"{path / row.file_name} and {other / row.file_name}"
            num_clashes += 1
        num_waiting += path != into
        nowhere.discard(item)
    if num_clashes:
        more = f", and so do {num_clashes - 1} more that several folders hold" * (num_clashes > 1)
        why = "; ".join(other_numerics({dataset.path: dataset.record for dataset in datasets}))
        raise ValueError(f"{clash} differ{more}{why and f' ({why})'}; join without one of the two folders")
    left_out = {path: sorted(items & nowhere) for path, items in bad.items() if items & nowhere}
    return Plan(into, datasets, num_waiting, left_out)


def other_numerics(records: Mapping[Path, RunRecord]) -> list[str]:
    """Tell in which numerics the folders differ: `batch_size is 4 in A, 8 in B and 2 more`."""
    texts = []
    for name in sorted({name for one in records.values() for name in one.numerics}):
        holders: dict[str, list[Path]] = {}
        for path, one in records.items():
            if (value := one.numerics.get(name, NUMERICS_DEFAULTS.get(name))) is not None:
                holders.setdefault(str(value), []).append(path)
        if len(holders) > 1:
            values = (f"{value} in {_first(paths)}" for value, paths in holders.items())
            texts.append(f"{name} is {', '.join(values)}")
    return texts


def _first(paths: Sequence[Path]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else str(paths[0])
