"""Which images of a dataset are finished, and what in its folder is not of jobs: its files, compared with its rows."""

import errno
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset import layout, locks
from userdiff.dataset.files import open_file
from userdiff.dataset.manifest import is_manifest, manifest_sha256, recorded_rows
from userdiff.dataset.png import RUN_CHUNK, decode_png, is_remains, png_size, read_png, read_text_chunks
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import MAX_BYTES, Row, Rows, Trust, slices
from userdiff.dataset.run_record import is_record
from userdiff.seeds import Item

READER_THREADS = 8
_SLICE = 1000  # files that are read ahead
_LEADS_NOWHERE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES}

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
    """Names of everything else but temporaries and what a system leaves, sorted."""

    def without_row(self, rows: Rows) -> NDArray[np.uint32]:
        """Return the images that have a file, and no row among these (one per image): [number], ascending."""
        of_user = rows.of_user(self.user_id)
        return np.setdiff1d(self.image_indices, of_user["image_index"], assume_unique=True)


def user_folders(output_dir: Path) -> Iterator[UserFolder]:
    """Read the name and size of every file in the users' folders, which come sorted by name."""
    for folder in layout.user_folders(output_dir):
        user_id = layout.parse_user_folder(folder.name)
        images, foreign = array("Q"), list[str]()
        try:
            found = os.scandir(folder)
        except FileNotFoundError:  # gone since it was listed
            continue
        with found:
            for entry in found:
                image_index = layout.parse_image(entry.name) if user_id is not None else None
                if image_index is not None and (num_bytes := _size(entry)) is not None:
                    images.extend((image_index, min(num_bytes, MAX_BYTES)))
                elif image_index is not None and not os.path.lexists(entry.path):
                    continue  # gone since it was listed
                elif not layout.is_temporary(entry.name) and not layout.is_system(entry.name):
                    foreign.append(entry.name)
        table = np.frombuffer(images, np.uint64).astype(np.uint32).reshape(-1, 2)
        image_indices, num_bytes = table[np.argsort(table[:, 0])].T.copy()
        yield UserFolder(folder.name, -1 if user_id is None else user_id, image_indices, num_bytes, sorted(foreign))


def _size(entry: "os.DirEntry[str]") -> int | None:
    """Return the size of a file, or of the one that a link leads to; None for a folder, a FIFO, a link to nowhere or to itself."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return None
        raise


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
    """What lies under an image's name and is no file, or has no row, is not this recipe's, and no remains of a job's image."""
    edited: list[Row]
    """Rows of those lost ones whose file says that it is the image: somebody has changed it.

    A manifest keeps these rows. Without them, nothing would tell the file from an image as it was made.
    """
    has_manifest: bool
    """Whether the manifest is as it was published."""

    def rows_to_keep(self) -> Rows:
        """Return the rows that a manifest is to have, and make them those of the finished images: call it last."""
        self.rows.extend(self.edited)
        return self.rows


def find_finished(
    output_dir: Path,
    recipe: Recipe,
    published_sha256: str | None = None,
    *,
    trusted_parts: Collection[Path] = (),
    track: Track = untracked,
) -> Finished:
    """Look through the folder for finished images.

    An image is finished if a row of the recipe that is to be trusted (see `recorded_rows`) has a file of its size. Any
    other file is read: it is finished if it has the size and hash that some row claims, or if it decodes and carries the
    text chunks that the recipe gives it, and no row that a job noted says otherwise.

    published_sha256: the manifest's hash as `run.json` noted it. track: is shown the files that are read.
    """
    has_manifest = published_sha256 is not None and manifest_sha256(output_dir) == published_sha256
    rows = recorded_rows(output_dir, trust_manifest=has_manifest, trusted_parts=trusted_parts)
    folders = list(user_folders(output_dir))
    agrees = recipe.agrees(rows)
    is_trusted = agrees & rows.is_best() & (rows.array["trust"] == Trust.RECORDED)
    rows.array["trust"][is_trusted & have_files(folders, rows)] = Trust.FINISHED
    rows.array["trust"][~agrees] = Trust.CLAIMED

    # Whatever else lies under an image's name is read: it may prove itself, or be somebody's.
    to_read: dict[int, NDArray[np.uint32]] = {}
    for folder in folders:
        of_user = rows.of_user(folder.user_id)
        finished = of_user["image_index"][of_user["trust"] == Trust.FINISHED]
        to_read[folder.user_id] = np.setdiff1d(folder.image_indices, finished, assume_unique=True)
    items = ((user_id, image_index) for user_id, indices in to_read.items() for image_index in indices.tolist())
    foreign_images: list[Item] = []
    edited: list[Row] = []

    def prove(item: Item) -> tuple[Item, Row | _Kind | None]:
        noted = rows.of_image(*item, Trust.NOTED)
        return item, _prove(output_dir, recipe, item, noted or rows.of_image(*item), is_noted=bool(noted))

    def proven_rows() -> Iterator[Row]:
        for item, proof in track(read_all(prove, items), sum(map(len, to_read.values()))):
            if isinstance(proof, Row):
                yield proof
            elif proof is _Kind.EDITED:
                edited.append(rows.of_image(*item)[-1])
            elif proof is _Kind.FOREIGN and not rows.of_image(*item):
                foreign_images.append(item)

    proven = Rows(proven_rows())
    rows.keep(agrees)
    rows.extend(proven)
    rows.keep_best()  # a finished image's row is the best it has
    is_finished = rows.array["trust"] == Trust.FINISHED
    lost = rows.array[["user_id", "image_index"]][~is_finished].tolist()
    rows.keep(is_finished)
    foreign_files, no_files = _foreign_in(folders)
    return Finished(
        rows,
        lost,
        foreign_files,
        foreign_images=sorted([*foreign_images, *no_files]),
        edited=edited,
        has_manifest=has_manifest,
    )


def _foreign_in(folders: Iterable[UserFolder]) -> tuple[list[str], list[Item]]:
    """Return what lies beside the images, and what lies under an image's name and is no file."""
    files: list[str] = []
    images: list[Item] = []
    for folder in folders:
        for name in folder.foreign:
            image_index = layout.parse_image(name) if folder.user_id >= 0 else None
            if image_index is None:
                files.append(f"{folder.name}/{name}")
            else:
                images.append((folder.user_id, image_index))
    return files, images


class _Kind(Enum):
    """What a file under an image's name is that is neither the image nor its remains."""

    FOREIGN = auto()
    EDITED = auto()


def _prove(
    output_dir: Path, recipe: Recipe, item: Item, claims: Iterable[Row], *, is_noted: bool
) -> Row | _Kind | None:
    """Read a file under an image's name; returns the row that it proves to be right, or whose it is if not a job's.

    The row is that of a claim with the file's hash, or what the recipe gives for its text chunks. Where a job noted
    it, text chunks prove nothing against that: whoever edits an image keeps them.
    """
    path = output_dir / layout.file_name(*item)
    try:
        with read_png(path) as data:
            for claim in claims:
                if claim == recipe.row(*item, size=png_size(data), png=data):
                    return claim
            size, text = decode_png(data)
            if text != recipe.text_chunks(*item):  # a whole image of something else
                return _Kind.FOREIGN
            return _Kind.EDITED if is_noted else recipe.row(*item, size=size, png=data)
    except OSError:
        with suppress(OSError):  # what cannot be read is left alone
            return None if is_remains(path, recipe.text_chunks(*item)) else _Kind.FOREIGN
        return _Kind.FOREIGN


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


# What is not of jobs -------------------------------------------------------------------------------------------------


def foreign_names(output_dir: Path) -> Iterator[str]:
    """Yield the names of files beside the users' folders that jobs write, where something else has them.

    Where somebody has added to a job's manifest, see `keep_edited`.
    """
    record, manifest = output_dir / layout.RECORD_NAME, output_dir / layout.MANIFEST_NAME
    is_ours: dict[Path, Callable[[Path], bool]] = {
        record: is_record,
        output_dir / layout.PREVIEW_NAME: _is_page,
        **dict.fromkeys(layout.part_paths(output_dir), is_manifest),
        output_dir / layout.LOCK_NAME: locks.is_lock,
        output_dir / layout.WRITERS_NAME: locks.is_lock,
        output_dir / layout.PROBE_NAME: lambda path: path.lstat().st_size <= 1,
        # Beside a job's record, a manifest that does not begin as one has been edited.
        manifest: (lambda _: True) if record.is_file() else is_manifest,
    }
    for path, is_own in is_ours.items():
        if os.path.lexists(path) and not _holds(path, is_own):
            yield path.name


def _holds(path: Path, is_own: Callable[[Path], bool]) -> bool:
    """Return whether a file is what `is_own` says, or has gone since it was listed."""
    try:
        return path.is_file() and is_own(path)
    except FileNotFoundError:
        return True
    except OSError:  # it cannot be read
        return False


def check_own_files(output_dir: Path) -> None:
    """Raise ValueError where a job would replace or remove one of `foreign_names`."""
    for name in foreign_names(output_dir):
        raise ValueError(
            f"{output_dir} holds {name}, which no job is known to have made; use another folder, or move it away"
        )


def _is_page(path: Path) -> bool:
    with open_file(path) as file:
        start = file.read(len(layout.PAGE_START))
    return layout.PAGE_START.startswith(start) or not start.strip(b"\0")  # as a power cut leaves it


def images_without_record(output_dir: Path) -> Iterator[tuple[str, str | None]]:
    """Yield every file in the users' folders, as one that a job may have left without a record: (name, its identity hash).

    The hash is None for a file that no job is known to have made.
    """
    for folder in layout.user_folders(output_dir):
        for path in layout.entries(folder):
            if not layout.is_temporary(path.name) and not layout.is_system(path.name):
                name = path.relative_to(output_dir).as_posix()
                text = read_text_chunks(path) if layout.parse_file_name(name) else None
                yield name, (text or {}).get(RUN_CHUNK)
