"""The rows of a manifest, one per finished image: as lines of a CSV file, and together as one flat array.

Ten million rows take 0.6 GB, and all rows of a user are compared with its files at once.
"""

import re
from collections.abc import Iterable, Iterator
from enum import IntEnum
from io import TextIOWrapper
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset.files import open_file
from userdiff.dataset.layout import MAX_IMAGE_INDEX, file_name
from userdiff.dataset.png import MAX_PIXELS

MAX_BYTES = 2**32 - 1  # of a file, as far as a row can tell its size

_CONDITIONINGS = ("trained", "random")
_AT_ONCE = 2000  # rows that are Python objects at a time
_LINE_CHARS = 1000  # more than a row has
_MAX_LINE = 2**20
_MAX_OTHERS = 10_000  # lines in a row that are no rows

T = TypeVar("T")


class Trust(IntEnum):
    """How far a row is believed; of several rows of one image, the one with the most trust counts."""

    CLAIMED = 1
    """From a manifest that may have been edited."""
    NOTED = 2
    """From a part of an interrupted run, which may name files that a power cut has emptied."""
    RECORDED = 3
    """From a manifest with the hash that `run.json` records, or from a part of the current run."""
    FINISHED = 4
    """The image is on disk."""


class Row(NamedTuple):
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

    @property
    def line(self) -> str:
        """The row as the CSV has it."""
        return ",".join(map(str, self)) + "\n"  # no field of ours holds a comma or a quote


COLUMNS = Row._fields
HEADER = ",".join(COLUMNS) + "\n"

ROW = np.dtype(
    [
        ("user_id", "<i8"),
        ("image_index", "<u4"),
        ("seed", "<u4"),
        ("num_inference_steps", "<u2"),
        ("is_random", "?"),
        ("trust", "u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("num_bytes", "<u4"),
        ("sha256", "V32"),
    ]
)
"""A row in 60 bytes. A job writes no row with a number too large for its field."""
# The hash in two halves: rows are moved column by column, so the widest column decides how much memory a move takes.
_COLUMNS_TO_MOVE = np.dtype([*ROW.descr[:-1], ("sha256_0", "V16"), ("sha256_1", "V16")])

# Stricter than Python's `int`, which also reads +7, 007 and the digits of other scripts.
_NUMBER = r"(0|[1-9][0-9]{0,9})"
_LINE = re.compile(
    rf"([^,]+),(0|[1-9][0-9]{{0,17}}),{_NUMBER},{_NUMBER},{_NUMBER},(trained|random),{_NUMBER},{_NUMBER},{_NUMBER},"
    r"([0-9a-f]{64})\r?\n"
)
_MAX_4, _MAX_2 = 2**32 - 1, 2**16 - 1  # what fields of so many bytes hold


def _parse(line: str) -> Row | None:
    """Parse a line of a manifest; None for the header and whatever is not, letter by letter, a row as we write it.

    A killed job leaves a torn last line. An image whose row is lost is found again by its text chunks.
    """
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    name, *planned, conditioning, wide, high, size, sha256 = match.groups()
    user_id, index, seed, steps = map(int, planned)
    width, height, num_bytes = int(wide), int(high), int(size)
    fits_4 = index <= _MAX_4 and seed <= _MAX_4 and num_bytes <= _MAX_4
    fits_2 = steps <= _MAX_2 and width <= _MAX_2 and height <= _MAX_2 and width * height <= MAX_PIXELS
    if not (fits_4 and fits_2) or name != file_name(user_id, index):
        return None
    return Row(name, user_id, index, seed, steps, conditioning, width, height, num_bytes, sha256)


def read_lines(path: Path) -> Iterator[Row]:
    """Yield the rows of a manifest or a part, in the order of their lines; nothing where there is no such file.

    What comes after _MAX_OTHERS other lines, or one of _MAX_LINE characters, is not read: a file may be a terabyte of zeros.
    """
    num_others = 0
    for row in map(_parse, lines(path)):
        if row is not None:
            num_others = 0
            yield row
        elif (num_others := num_others + 1) > _MAX_OTHERS:
            return


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a manifest or a part as `read_lines` reads them."""
    if path.is_file():
        try:
            opened = open_file(path)
        except FileNotFoundError:  # a part, merged meanwhile
            return
        with TextIOWrapper(opened, encoding="ascii", errors="replace", newline="\n") as file:
            while line := file.readline(_LINE_CHARS):
                yield line
                length = len(line)
                while length >= _LINE_CHARS and not line.endswith("\n"):  # no row; what follows it may be one
                    line = file.readline(_LINE_CHARS)
                    length += len(line)
                    if not line or length > _MAX_LINE:
                        return


class Rows:
    """Rows sorted by user and image. There may be several of an image, until `keep_best` is called.

    `array` and what the methods return of it are views: use them only until rows are added or removed.
    """

    def __init__(self, rows: Iterable[Row] = (), trust: Trust = Trust.FINISHED) -> None:
        self.array: NDArray[np.void] = np.zeros(0, ROW)
        """All rows: [number] ROW."""
        self.places: dict[int, slice] = {}
        """User id -> where in `array` the rows of that user are; ascending."""
        self.extend(rows, trust)

    def extend(self, rows: Iterable[Row], trust: Trust = Trust.FINISHED) -> None:
        """Add rows."""
        for some in slices(rows, _AT_ONCE):
            start = len(self.array)
            self._resize(start + len(some))
            self.array[start:] = [
                (user, index, seed, steps, kind == "random", trust, width, height, size, bytes.fromhex(sha256))
                for _, user, index, seed, steps, kind, width, height, size, sha256 in some
            ]
        self._sort()

    def _resize(self, length: int) -> None:
        try:
            self.array.resize(length)  # the system moves large arrays without copying them
        except ValueError:  # somebody holds a view
            self.array = np.resize(self.array, length)

    def _take(self, chosen: NDArray[np.integer]) -> None:
        """Keep the chosen rows in this order, column by column: a copy of the whole array would double the memory."""
        columns = self.array.view(_COLUMNS_TO_MOVE)
        for name in _COLUMNS_TO_MOVE.names or ():
            columns[name][: len(chosen)] = columns[name][chosen]
        del columns
        self._resize(len(chosen))

    def _sort(self) -> None:
        user_ids, image_indices = self.array["user_id"], self.array["image_index"]
        is_same_user = user_ids[1:] == user_ids[:-1]
        if not ((user_ids[1:] > user_ids[:-1]) | (is_same_user & (image_indices[1:] > image_indices[:-1]))).all():
            # Stable: of equals the last one stays the last. As uint32, the order takes half the memory.
            order = np.lexsort((self.array["trust"], image_indices, user_ids)).astype(np.uint32)
            self._take(order)
        user_ids = self.array["user_id"]
        starts = np.flatnonzero(np.diff(user_ids, prepend=-1)).tolist()
        bounds = pairwise([*starts, len(user_ids)])
        self.places = {int(user_ids[start]): slice(start, end) for start, end in bounds}

    @property
    def user_ids(self) -> list[int]:
        """User ids with at least one row, ascending."""
        return list(self.places)

    def of_user(self, user_id: int) -> NDArray[np.void]:
        """Return a user's rows: [number] ROW, sorted by image; of several of an image, the best is the last."""
        return self.array[self.place(user_id)]

    def place(self, user_id: int) -> slice:
        """Return where in `array` a user's rows are."""
        return self.places.get(user_id, slice(0, 0))

    def of_image(self, user_id: int, image_index: int, trust: Trust = Trust.CLAIMED) -> list[Row]:
        """Return the rows of an image that have at least this trust, the best last."""
        if not 0 <= image_index <= MAX_IMAGE_INDEX:  # as an edited record may have it
            return []
        of_user, key = self.of_user(user_id), np.uint32(image_index)  # any other type would cast the whole column
        first, last = (np.searchsorted(of_user["image_index"], key, side) for side in ("left", "right"))
        of_image = of_user[first:last]
        return as_rows(of_image[of_image["trust"] >= trust])

    def image_indices(self) -> dict[int, NDArray[np.uint32]]:
        """Return the images that have rows: user id -> [number] image indices, ascending."""
        return {user_id: self.array["image_index"][place] for user_id, place in self.places.items()}

    def num_bytes(self) -> int:
        """Return the size of all files together."""
        return int(self.array["num_bytes"].sum(dtype=np.int64))

    def sizes(self) -> list[tuple[int, int]]:
        """Return the different (width, height) of the images, ascending."""
        found: list[tuple[int, int]] = np.unique(self.array[["width", "height"]]).tolist()
        return found

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Keep the rows that `mask`, [number] bool, is true for."""
        if not mask.all():
            self._take(np.flatnonzero(mask))
            self._sort()

    def keep_best(self) -> "Rows":
        """Keep one row per image, the best one; returns the table itself."""
        self.keep(self.is_best())
        return self

    def is_best(self) -> NDArray[np.bool_]:
        """Return which rows are the best of their image: [number] bool."""
        user_ids, image_indices = self.array["user_id"], self.array["image_index"]
        is_best = np.ones(len(self), bool)
        is_best[:-1] = (user_ids[1:] != user_ids[:-1]) | (image_indices[1:] != image_indices[:-1])
        return is_best

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _AT_ONCE):
            yield from as_rows(self.array[start : start + _AT_ONCE])


def as_rows(array: NDArray[np.void]) -> list[Row]:
    """Return the rows of an array, [number] ROW, as objects."""
    return [
        Row(
            file_name(user, index),
            user,
            index,
            seed,
            steps,
            _CONDITIONINGS[is_random],
            width,
            height,
            size,
            sha256.hex(),
        )
        for user, index, seed, steps, is_random, _, width, height, size, sha256 in array.tolist()
    ]


def slices(values: Iterable[T], number: int) -> Iterator[list[T]]:
    """Yield the values in lists of `number`; the last one may be shorter."""
    left = iter(values)
    while some := list(islice(left, number)):
        yield some
