"""The manifest: one CSV row per finished image; a part per process while running, merged into one sorted file."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from userdiff import images
from userdiff.planning import item_seed

MANIFEST_NAME = "manifest.csv"
READER_THREADS = 8
_PART_NAME = re.compile(r"manifest\.part-\d{5,}\.csv")
CONDITIONINGS = ("trained", "random")


@dataclass(frozen=True, slots=True)
class Row:
    """A finished image, in the order of the CSV's columns."""

    file_name: str
    """Relative to the dataset's folder, with `/`."""
    user_id: int
    image_index: int
    seed: int
    """Of this image: `torch.Generator().manual_seed(seed)` draws its noise."""
    num_inference_steps: int
    conditioning: str
    """`trained`, or `random` where the condition encoder's weights were not those of the checkpoint."""
    width: int
    height: int
    num_bytes: int
    sha256: str
    """Of the PNG file."""


COLUMNS = tuple(field.name for field in fields(Row))
_VALUES = attrgetter(*COLUMNS)
_INTEGERS = frozenset(field.name for field in fields(Row) if field.type is int)
_SLICE = 1000
_SHA256 = re.compile("[0-9a-f]{64}")

T = TypeVar("T")
R = TypeVar("R")
Item = tuple[int, int]
"""(user_id, image_index)"""
Track = Callable[[Iterable[Any], int], Iterable[Any]]
"""Passes on what it is given, showing how many of so many have come."""


def untracked(items: Iterable[T], total: int) -> Iterable[T]:
    """Pass on what is given, showing nothing."""
    return items


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What all images of a dataset have in common, and its rows and text chunks say."""

    seed: int
    """The base seed."""
    num_inference_steps: int
    conditioning: str
    run: str
    """The identity hash."""

    @classmethod
    def of(cls, identity: Mapping[str, Any], run: str) -> "Recipe":
        """Read the recipe off an identity and its hash, as `run.json` has them."""
        return cls(
            seed=identity["seed"],
            num_inference_steps=identity["num_inference_steps"],
            conditioning=identity.get("conditioning", "trained"),
            run=run,
        )

    def text_chunks(self, user_id: int, image_index: int) -> dict[str, str]:
        """Give what the PNG of an image says of itself."""
        return {
            "user_id": str(user_id),
            "image_index": str(image_index),
            "seed": str(item_seed(self.seed, user_id, image_index)),
            "num_inference_steps": str(self.num_inference_steps),
            "conditioning": self.conditioning,
            images.RUN_CHUNK: self.run,
        }

    def row(self, user_id: int, image_index: int, size: tuple[int, int], png: bytes) -> Row:
        """Describe an image of `size` (width, height) whose file holds `png`."""
        return Row(
            file_name=images.file_name(user_id, image_index),
            user_id=user_id,
            image_index=image_index,
            seed=item_seed(self.seed, user_id, image_index),
            num_inference_steps=self.num_inference_steps,
            conditioning=self.conditioning,
            width=size[0],
            height=size[1],
            num_bytes=len(png),
            sha256=sha256(png),
        )

    def agrees(self, row: Row) -> bool:
        """Whether a row is one this recipe gives: every field that the plan decides is as planned."""
        return (
            row.file_name == images.file_name(row.user_id, row.image_index)
            and row.seed == item_seed(self.seed, row.user_id, row.image_index)
            and row.num_inference_steps == self.num_inference_steps
            and row.conditioning == self.conditioning
        )


def part_path(output_dir: Path, process_index: int) -> Path:
    """Where a process notes what it has finished."""
    return output_dir / f"manifest.part-{process_index:05d}.csv"


def part_paths(output_dir: Path) -> list[Path]:
    """Find the parts that are there, of this run or an earlier one."""
    return sorted(path for path in output_dir.glob("manifest.part-*.csv") if _PART_NAME.fullmatch(path.name))


def num_part_rows(output_dir: Path) -> int:
    """Count the images that an unfinished run has noted so far."""
    return sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in part_paths(output_dir))


class PartWriter:
    """One process's part of the manifest: rows appended as their images are published, each flushed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()  # rows come from several writer threads
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed by __exit__
        self._file.write(_line(COLUMNS))

    def append(self, row: Row) -> None:
        """Note a published image."""
        with self._lock, images.errors_naming(self._path):
            self._file.write(_line(_VALUES(row)))
            self._file.flush()

    def __enter__(self) -> "PartWriter":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *exc: object) -> None:
        with images.errors_naming(self._path):
            self._file.close()


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a manifest or a part, passing over what is not a whole, well-formed row.

    A job that was killed leaves a torn last line; an image whose row is lost is found again by its text chunks.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and (row := _parse(line)):
            yield row


def _parse(line: str) -> Row | None:
    values = line.rstrip("\n").split(",")
    if len(values) != len(COLUMNS) or '"' in line:
        return None
    try:
        row = Row(*(int(v) if c in _INTEGERS else v for c, v in zip(COLUMNS, values, strict=True)))  # type: ignore[arg-type]
    except ValueError:
        return None
    well_formed = row.conditioning in CONDITIONINGS and _SHA256.fullmatch(row.sha256) and _line(_VALUES(row)) == line
    return row if well_formed and row.user_id >= 1 and row.image_index >= 0 else None


def recorded_rows(
    output_dir: Path, manifest_sha256: str | None = None, *, believe_parts: bool = False
) -> tuple[dict[Item, Row], dict[Item, list[Row]]]:
    """Read what is recorded of each image: the rows to be believed, and those that are claims.

    A manifest that has the hash it was published with is believed; one that has not was damaged or edited. So are
    the parts of the run that asks; those of an interrupted one may stand for files that a power cut has emptied.
    """
    believed: dict[Item, Row] = {}
    claims: dict[Item, list[Row]] = {}
    path = output_dir / MANIFEST_NAME
    is_believed = manifest_sha256 is not None and file_sha256(path) == manifest_sha256
    for source, is_sure in [(path, is_believed), *((part, believe_parts) for part in part_paths(output_dir))]:
        for row in read_rows(source):
            if is_sure:
                believed[row.user_id, row.image_index] = row
            else:
                claims.setdefault((row.user_id, row.image_index), []).append(row)
    return believed, claims


def merged_rows(output_dir: Path) -> list[Row]:
    """Read a manifest; raises ValueError where it holds no row, saying what would help."""
    rows = list(read_rows(output_dir / MANIFEST_NAME))
    if not rows:
        where = "; an interrupted run's rows are in part files, `userdiff merge` first" * bool(part_paths(output_dir))
        raise ValueError(f"{output_dir} holds no {MANIFEST_NAME} with images in it{where}")
    return rows


class Finished(NamedTuple):
    """What is there of a dataset, sorted by (user_id, image_index)."""

    rows: list[Row]
    """One for every finished image."""
    lost: list[Item]
    """Images that were recorded, and are missing, damaged or changed."""
    strangers: list[Item]
    """Intact images under the name of one, that nobody recorded and that are not this run's."""


def find_finished(
    output_dir: Path,
    recipe: Recipe,
    manifest_sha256: str | None = None,
    *,
    believe_parts: bool = False,
    track: Track = untracked,
) -> Finished:
    """Look through the folder for finished images.

    Finished: a row that is believed (`recorded_rows` tells which) and agrees with the recipe, and a file of the row's
    size. Any other file is read: it is finished if it has the size and hash that a row claims, or if it decodes whole
    and its text chunks are those the recipe gives it. `track` is shown the files that are read.
    """
    believed, claims = recorded_rows(output_dir, manifest_sha256, believe_parts=believe_parts)
    rows: dict[Item, Row] = {}
    unproven: list[Item] = []
    strangers: list[Item] = []
    for item in images.image_files(output_dir):
        row = believed.get(item)
        if row and recipe.agrees(row) and row.num_bytes == (output_dir / row.file_name).stat().st_size:
            rows[item] = row
        else:
            unproven.append(item)

    def prove(item: Item) -> tuple[Row | None, bool]:
        return _prove(output_dir, recipe, item, claims.get(item, ()))

    for item, (row, is_strange) in zip(unproven, track(read_all(prove, unproven), len(unproven)), strict=True):
        if row:
            rows[item] = row
        elif is_strange and item not in believed and item not in claims:
            strangers.append(item)
    recorded = [*believed.values(), *(row for of_item in claims.values() for row in of_item)]
    lost = {(row.user_id, row.image_index) for row in recorded if recipe.agrees(row)} - rows.keys()
    return Finished([rows[item] for item in sorted(rows)], sorted(lost), sorted(strangers))


def finished_rows(output_dir: Path, recipe: Recipe, manifest_sha256: str | None = None, **options: Any) -> list[Row]:
    """Collect the rows that `find_finished` finds."""
    return find_finished(output_dir, recipe, manifest_sha256, **options).rows


def read_all(read: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Read many files at once; a slice at a time, so that whoever stops listening waits for no more than that."""
    with ThreadPoolExecutor(READER_THREADS) as readers:
        for start in range(0, len(items), _SLICE):
            yield from readers.map(read, items[start : start + _SLICE])


def _prove(output_dir: Path, recipe: Recipe, item: Item, claims: Iterable[Row]) -> tuple[Row | None, bool]:
    """Read a file and give its row, if it is what a row claims or what the recipe makes; and else whether it is intact."""
    path = output_dir / images.file_name(*item)
    try:
        data = path.read_bytes()
        for claim in claims:
            if recipe.agrees(claim) and claim == recipe.row(*item, size=images.png_size(data), png=data):
                return claim, False
        size, text = images.decode_png(data)
    except OSError:
        return None, False  # unreadable, truncated or not a PNG: it is made again
    if text == recipe.text_chunks(*item):
        return recipe.row(*item, size=size, png=data), False
    return None, text.get(images.RUN_CHUNK) != recipe.run


def is_manifest(path: Path) -> bool:
    """Whether a file begins as a manifest does."""
    with open(path, "rb") as file:
        return file.readline() in (b"", _line(COLUMNS).encode())


def write_manifest(output_dir: Path, rows: Iterable[Row]) -> str:
    """Publish `manifest.csv` with these rows, then remove the parts that went into it; gives the file's SHA-256."""
    parts = part_paths(output_dir)
    data = "".join([_line(COLUMNS), *(_line(_VALUES(row)) for row in rows)]).encode()
    images.publish(output_dir / MANIFEST_NAME, data, sync=True)
    for path in parts:
        path.unlink(missing_ok=True)
    return sha256(data)


def sha256(data: bytes) -> str:
    """Hash the content of a file, as the rows do."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str | None:
    """Hash a file; None where there is none."""
    return sha256(path.read_bytes()) if path.is_file() else None


def _line(values: Iterable[object]) -> str:
    return ",".join(map(str, values)) + "\n"  # no field of ours holds a comma or a quote
