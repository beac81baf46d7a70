"""Which images of a dataset are finished: the files in its folder, compared with its rows."""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset import layout
from userdiff.dataset.manifest import manifest_sha256, recorded_rows
from userdiff.dataset.png import RUN_CHUNK, decode_png, is_remains, png_size
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import MAX_BYTES, Row, Rows, Trust, slices
from userdiff.seeds import Item

READER_THREADS = 8
_SLICE = 1000  # files that are read ahead

T = TypeVar("T")
R = TypeVar("R")
Track = Callable[[Iterable[Any], int], Iterable[Any]]
"""Yields the items it is given, and shows how many of a total have come so far."""


def untracked(items: Iterable[T], total: int) -> Iterable[T]:
    """Pass on the items, showing nothing."""
    return items


class UserFolder(NamedTuple):
    """The files in a user's folder."""

    name: str
    user_id: int
    """-1 for a name that no job gives."""
    image_indices: NDArray[np.uint32]
    """[number] of the files under an image's name, ascending."""
    num_bytes: NDArray[np.uint32]
    """[number] their sizes; MAX_BYTES stands for any larger one too."""
    foreign: list[str]
    """Names of everything else but temporaries, sorted."""

    def without_row(self, rows: Rows) -> NDArray[np.uint32]:
        """Return the images that have a file, and no row among these (one per image): [number], ascending."""
        of_user = rows.of_user(self.user_id)
        return np.setdiff1d(self.image_indices, of_user["image_index"], assume_unique=True)


def user_folders(output_dir: Path) -> Iterator[UserFolder]:
    """Read the name and size of every file in the users' folders, which come sorted by name."""
    for folder in layout.user_folders(output_dir):
        user_id = layout.parse_user_folder(folder.name)
        images, foreign = array("Q"), list[str]()
        with os.scandir(folder) as entries:
            for entry in entries:
                image_index = layout.parse_image(entry.name) if user_id is not None else None
                try:
                    if image_index is not None and entry.is_file():
                        images.extend((image_index, min(entry.stat().st_size, MAX_BYTES)))
                    elif not layout.is_temporary(entry.name):
                        foreign.append(entry.name)
                except FileNotFoundError:  # gone since it was listed
                    continue
        table = np.frombuffer(images, np.uint64).astype(np.uint32).reshape(-1, 2)
        image_indices, num_bytes = table[np.argsort(table[:, 0])].T.copy()
        yield UserFolder(folder.name, -1 if user_id is None else user_id, image_indices, num_bytes, sorted(foreign))


def have_files(folders: Iterable[UserFolder], rows: Rows) -> NDArray[np.bool_]:
    """Return which rows have a file of their size: [number] bool."""
    is_there = np.zeros(len(rows), bool)
    for folder in folders:
        if len(folder.image_indices):
            of_user = rows.of_user(folder.user_id)
            # Where each row's image would stand among the files; one beyond the last file is compared with the last.
            at = np.searchsorted(folder.image_indices[:-1], of_user["image_index"])
            is_file = folder.image_indices[at] == of_user["image_index"]
            is_there[rows.place(folder.user_id)] = is_file & (folder.num_bytes[at] == of_user["num_bytes"])
    return is_there


class Finished(NamedTuple):
    """The finished images of a folder, and what else was found in it."""

    rows: Rows
    """One for every finished image."""
    lost: list[Item]
    """Images that have a row of this recipe, and are missing, damaged or changed."""
    foreign_files: list[str]
    """Paths, relative to the folder, of what lies beside the images in the users' folders."""
    foreign_images: list[Item]
    """Files under an image's name that have no row, are not this recipe's, and are no remains of a job's image."""
    has_manifest: bool
    """Whether the manifest is as it was published."""


def find_finished(
    output_dir: Path,
    recipe: Recipe,
    published_sha256: str | None = None,
    *,
    trust_parts: bool = False,
    track: Track = untracked,
) -> Finished:
    """Look through the folder for finished images.

    An image is finished if a row of the recipe that is to be trusted (see `recorded_rows`) has a file of its size. Any
    other file is read: it is finished if it has the size and hash that some row claims, or if it decodes and carries the
    text chunks that the recipe gives it.

    published_sha256: the manifest's hash as `run.json` noted it. track: is shown the files that are read.
    """
    has_manifest = published_sha256 is not None and manifest_sha256(output_dir) == published_sha256
    rows = recorded_rows(output_dir, trust_manifest=has_manifest, trust_parts=trust_parts)
    folders = list(user_folders(output_dir))
    agrees = recipe.agrees(rows)
    is_trusted = agrees & rows.is_best() & (rows.array["trust"] == Trust.RECORDED)
    rows.array["trust"][is_trusted & have_files(folders, rows)] = Trust.FINISHED

    # Whatever else lies under an image's name is read: it may prove itself, or be somebody's.
    to_read: dict[int, NDArray[np.uint32]] = {}
    for folder in folders:
        of_user = rows.of_user(folder.user_id)
        finished = of_user["image_index"][of_user["trust"] == Trust.FINISHED]
        to_read[folder.user_id] = np.setdiff1d(folder.image_indices, finished, assume_unique=True)
    items = ((user_id, image_index) for user_id, indices in to_read.items() for image_index in indices.tolist())
    foreign_images: list[Item] = []

    def prove(item: Item) -> tuple[Item, Row | None, bool]:
        return (item, *_prove(output_dir, recipe, item, rows.of_image(*item)))

    def proven_rows() -> Iterator[Row]:
        for item, row, is_foreign in track(read_all(prove, items), sum(map(len, to_read.values()))):
            if row:
                yield row
            elif is_foreign and not rows.of_image(*item):
                foreign_images.append(item)

    proven = Rows(proven_rows())
    rows.keep(agrees)
    rows.extend(proven)
    rows.keep_best()  # a finished image's row is the best it has
    is_finished = rows.array["trust"] == Trust.FINISHED
    lost = rows.array[["user_id", "image_index"]][~is_finished].tolist()
    rows.keep(is_finished)
    foreign_files = [f"{folder.name}/{name}" for folder in folders for name in folder.foreign]
    return Finished(rows, lost, foreign_files, sorted(foreign_images), has_manifest)


def _prove(output_dir: Path, recipe: Recipe, item: Item, claims: Iterable[Row]) -> tuple[Row | None, bool]:
    """Read a file under an image's name; returns (row, is_foreign).

    The row is that of a claim with the file's hash, or what the recipe gives for its text chunks; None if neither holds.
    """
    path = output_dir / layout.file_name(*item)
    try:
        data = path.read_bytes()
    except OSError:
        return None, False  # it is made again
    try:
        for claim in claims:
            if claim == recipe.row(*item, size=png_size(data), png=data):
                return claim, False
        size, text = decode_png(data)
    except OSError:
        return None, not is_remains(data)
    if text == recipe.text_chunks(*item):
        return recipe.row(*item, size=size, png=data), False
    return None, text.get(RUN_CHUNK) != recipe.run


def read_all(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Read many files with several threads, a slice at a time, so that a caller who stops waits for no more."""
    with ThreadPoolExecutor(READER_THREADS) as readers:
        for some in slices(items, _SLICE):
            yield from readers.map(read, some)


def listed_rows(output_dir: Path) -> Rows:
    """Read manifest and parts, one row per image, whether it is finished or not; raises ValueError where there are none."""
    rows = recorded_rows(output_dir).keep_best()
    if not rows:
        has_images = any(len(folder.image_indices) for folder in user_folders(output_dir))
        remedy = f"; `userdiff merge {output_dir}` makes its rows from the images" * has_images
        raise ValueError(f"{output_dir} holds no {layout.MANIFEST_NAME} with images in it{remedy}")
    return rows
