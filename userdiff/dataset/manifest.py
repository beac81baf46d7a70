"""The manifest: one CSV row per finished image; a part per process while running, merged into one sorted file."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset import images
from userdiff.dataset.rows import BELIEVED, CLAIMED, FINISHED, HEADER, Item, Row, Table, is_last, slices
from userdiff.seeds import item_seed, item_seeds

MANIFEST_NAME = "manifest.csv"
READER_THREADS = 8
_PART_NAME = re.compile(r"manifest\.part-\d{5,}\.csv")
_PIECE_BYTES = 2**18
_SLICE = 1000

T = TypeVar("T")
R = TypeVar("R")
Images = dict[int, NDArray[np.integer]]
"""User id -> image indices, ascending."""
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

    def agrees(self, user_id: int, block: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which rows of a user are those this recipe gives: [number] bool, every field that the plan decides as planned."""
        is_as_planned: NDArray[np.bool_] = block["seed"] == item_seeds(self.seed, user_id, block["image_index"])
        is_as_planned &= block["num_inference_steps"] == self.num_inference_steps
        is_as_planned &= block["is_random"] == (self.conditioning == "random")
        return is_as_planned


def part_path(output_dir: Path, process_index: int) -> Path:
    """Where a process notes what it has finished."""
    return output_dir / f"manifest.part-{process_index:05d}.csv"


def part_paths(output_dir: Path) -> list[Path]:
    """Find the parts that are there, of this run or an earlier one."""
    return sorted(path for path in output_dir.glob("manifest.part-*.csv") if _PART_NAME.fullmatch(path.name))


def num_part_rows(output_dir: Path) -> int:
    """Count the images that an unfinished run has noted so far."""
    return sum(max(sum(piece.count(b"\n") for piece in _pieces(path)) - 1, 0) for path in part_paths(output_dir))


class PartWriter:
    """One process's part of the manifest: rows appended as their images are published, each flushed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()  # rows come from several writer threads
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed by __exit__
        self._file.write(HEADER)

    def append(self, row: Row) -> None:
        """Note a published image."""
        with self._lock, images.errors_naming(self._path):
            self._file.write(row.line)
            self._file.flush()

    def __enter__(self) -> "PartWriter":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *exc: object) -> None:
        with images.errors_naming(self._path):
            self._file.close()


def recorded_rows(output_dir: Path, *, believe_manifest: bool = False, believe_parts: bool = False) -> Table:
    """Read what is recorded of the images.

    A manifest that has the hash it was published with is believed; one that has not was damaged or edited. So are
    the parts of the run that asks; those of an interrupted one may stand for files that a power cut has emptied.
    """
    rows = Table()
    path = output_dir / MANIFEST_NAME
    for source, is_sure in [(path, believe_manifest), *((part, believe_parts) for part in part_paths(output_dir))]:
        rows.read(source, BELIEVED if is_sure else CLAIMED)
    return rows


def listed_images(output_dir: Path) -> Table:
    """Read manifest and parts, a row an image, as they are; raises ValueError where they name none.

    Of what is not finished, as `find_finished` tells, there may be rows.
    """
    rows = recorded_rows(output_dir).keep_best()
    if not rows:
        has_images = any(len(folder.image_indices) for folder in images.user_folders(output_dir))
        remedy = f"; `userdiff merge {output_dir}` makes its rows from the images" * has_images
        raise ValueError(f"{output_dir} holds no {MANIFEST_NAME} with images in it{remedy}")
    return rows


class Finished(NamedTuple):
    """What is there of a dataset."""

    rows: Table
    """One for every finished image."""
    lost: list[Item]
    """Images that were recorded, and are missing, damaged or changed."""
    others: list[str]
    """Paths, relative to the folder, of what else lies beside the images."""
    has_manifest: bool
    """Whether the manifest is as it was published."""
    strangers: list[Item]
    """Files under the name of one, that nobody recorded, are not this run's and not a damaged one of a job."""


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
    has_manifest = manifest_sha256 is not None and file_sha256(output_dir / MANIFEST_NAME) == manifest_sha256
    rows = recorded_rows(output_dir, believe_manifest=has_manifest, believe_parts=believe_parts)
    unproven: Images = {}
    others: list[str] = []
    for folder in images.user_folders(output_dir):
        others += [f"{folder.name}/{name}" for name in folder.others]
        block = rows.block(folder.user_id)
        is_finished = is_recorded(folder, block) & recipe.agrees(folder.user_id, block)
        is_finished &= block["standing"] == BELIEVED
        block["standing"][is_finished] = FINISHED
        unproven[folder.user_id] = np.setdiff1d(
            folder.image_indices, block["image_index"][is_finished], assume_unique=True
        )
    proven, strangers = Table(), []
    for some in slices(_prove_all(output_dir, recipe, rows, unproven, track), _SLICE):
        proven.extend(row for _, row, _ in some if row)
        strangers += [item for item, _, is_strange in some if is_strange and not rows.of_image(*item)]
    rows.join(proven)
    lost = _keep_finished(rows, recipe)
    return Finished(rows, sorted(lost), others, has_manifest, sorted(strangers))


def is_recorded(folder: images.UserFolder, block: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which rows of a user, the best of their image, have a file of their size: [number] bool."""
    at = np.searchsorted(folder.image_indices, block["image_index"])
    has_file = at < len(folder.image_indices)
    at = at[has_file]
    has_file[has_file] = (folder.image_indices[at] == block["image_index"][has_file]) & (
        folder.num_bytes[at] == block["num_bytes"][has_file]
    )
    return has_file & is_last(block)


def _keep_finished(rows: Table, recipe: Recipe) -> list[Item]:
    """Keep the finished rows; gives the images that only other rows speak of, which agree with the recipe."""
    lost: list[Item] = []
    for user_id in rows.user_ids:
        block = rows.block(user_id)
        is_finished = (block["standing"] == FINISHED) & is_last(block)
        recorded = block["image_index"][recipe.agrees(user_id, block)]
        without = recorded[~np.isin(recorded, block["image_index"][is_finished])]
        lost += [(user_id, index) for index in np.unique(without).tolist()]
        rows.keep(user_id, is_finished)
    return lost


def finished_rows(output_dir: Path, recipe: Recipe, manifest_sha256: str | None = None, **options: Any) -> Table:
    """Collect the rows that `find_finished` finds."""
    return find_finished(output_dir, recipe, manifest_sha256, **options).rows


def read_all(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Read many files at once; a slice at a time, so that whoever stops listening waits for no more than that."""
    with ThreadPoolExecutor(READER_THREADS) as readers:
        for some in slices(items, _SLICE):
            yield from readers.map(read, some)


def _prove_all(
    output_dir: Path, recipe: Recipe, rows: Table, unproven: Images, track: Track
) -> Iterable[tuple[Item, Row | None, bool]]:
    """Read files whose rows do not suffice, and give what `_prove` finds."""

    def prove(item: Item) -> tuple[Item, Row | None, bool]:
        return (item, *_prove(output_dir, recipe, item, rows.of_image(*item)))

    items = ((user_id, index) for user_id, of_user in unproven.items() for index in of_user.tolist())
    return track(read_all(prove, items), sum(map(len, unproven.values())))


def _prove(output_dir: Path, recipe: Recipe, item: Item, claims: Iterable[Row]) -> tuple[Row | None, bool]:
    """Read a file and give its row, if it is what a row claims or what the recipe makes; else whether it may be a user's."""
    path = output_dir / images.file_name(*item)
    try:
        data = path.read_bytes()
    except OSError:
        return None, False  # it is made again
    try:
        for claim in claims:
            if claim == recipe.row(*item, size=images.png_size(data), png=data):
                return claim, False
        size, text = images.decode_png(data)
    except OSError:
        return None, not images.is_what_is_left(data)
    if text == recipe.text_chunks(*item):
        return recipe.row(*item, size=size, png=data), False
    return None, text.get(images.RUN_CHUNK) != recipe.run


def is_manifest(path: Path) -> bool:
    """Whether a file begins as a manifest does."""
    with open(path, "rb") as file:
        return file.readline() in (b"", HEADER.encode())


def write_manifest(output_dir: Path, rows: Iterable[Row]) -> str:
    """Publish `manifest.csv` with these rows, then remove the parts that went into it; gives the file's SHA-256."""
    parts = part_paths(output_dir)
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for lines in slices(chain([HEADER], (row.line for row in rows)), _SLICE):
            piece = "".join(lines).encode()
            digest.update(piece)
            yield piece

    images.publish(output_dir / MANIFEST_NAME, pieces(), sync=True)
    for path in parts:
        path.unlink(missing_ok=True)
    return digest.hexdigest()


def sha256(data: bytes) -> str:
    """Hash the content of a file, as the rows do."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str | None:
    """Hash a file; None where there is none."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
