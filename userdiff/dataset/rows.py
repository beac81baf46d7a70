"""The rows of manifests as arrays: ten million take half a gigabyte, and those of a user are compared at once."""

import gc
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset import images
from userdiff.seeds import Item

CONDITIONINGS = ("trained", "random")
CLAIMED, BELIEVED, FINISHED = 1, 2, 3
"""What a row is worth: it says so; who wrote it is known; its image is there."""
_AT_ONCE = 10_000  # rows that are Python objects at a time

RECORD = np.dtype(
    [
        ("image_index", "<u4"),
        ("seed", "<u4"),
        ("num_inference_steps", "<u2"),
        ("is_random", "?"),
        ("standing", "u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("num_bytes", "<u4"),
        ("sha256", "V32"),
    ]
)
"""A row of a known user, in 52 bytes. One with a number too large for it is not a job's."""
_NUMBERS = ("image_index", "seed", "num_inference_steps", "width", "height", "num_bytes")  # as the line has them
_NONE = np.zeros(0, RECORD)

_NUMBER = rb"(?:0|[1-9]\d{0,9})"
_LINE = re.compile(
    rb"^user_(?=0\d/|[1-9]\d+/)0?([1-9]\d{0,17})/generated_(?=\d{3}\.|[1-9]\d{3,}\.)0{0,2}(0|[1-9]\d{0,9})\.png,"
    + rb"(\1,\2,%b,%b),(trained|random),(%b,%b,%b),([0-9a-f]{64})\r?\n" % (5 * (_NUMBER,)),
    re.MULTILINE,
)
_PIECE_BYTES = 2**18  # some 2,000 lines, whose objects fit into a cache

T = TypeVar("T")


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


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a manifest or a part as they come, passing over what is not a whole, well-formed row.

    A job that was killed leaves a torn last line; an image whose row is lost is found again by its text chunks.
    """
    for user_ids, records in _read_records(path, CLAIMED):
        yield from map(_row, user_ids.tolist(), records.tolist())


class Table:
    """Rows by user and image. There may be several of an image, until `keep_best` is called."""

    def __init__(self, rows: Iterable[Row] = (), standing: int = FINISHED) -> None:
        self._blocks: dict[int, NDArray[np.void]] = {}  # with room for more
        self._lengths: dict[int, int] = {}
        self._unsorted: set[int] = set()
        self.extend(rows, standing)

    def read(self, path: Path, standing: int = CLAIMED) -> None:
        """Add the rows of a manifest or a part, as `read_rows` does."""
        for user_ids, records in _read_records(path, standing):
            self._add(user_ids, records)

    def extend(self, rows: Iterable[Row], standing: int = FINISHED) -> None:
        """Add rows."""
        for some in slices(rows, _AT_ONCE):
            user_ids = np.array([row.user_id for row in some])
            self._add(user_ids, np.array([_record(row, standing) for row in some], RECORD))

    def join(self, other: "Table") -> None:
        """Add the rows of another table, as many as it holds."""
        for user_id in other.user_ids:
            self._append(user_id, other.block(user_id))

    def _add(self, user_ids: NDArray[np.int64], records: NDArray[np.void]) -> None:
        if (user_ids[1:] < user_ids[:-1]).any():
            order = np.argsort(user_ids, kind="stable")
            user_ids, records = user_ids[order], records[order]
        starts = np.flatnonzero(np.diff(user_ids, prepend=-1))
        for start, of_user in zip(starts.tolist(), np.split(records, starts[1:]), strict=True):
            self._append(int(user_ids[start]), of_user)

    def _append(self, user_id: int, records: NDArray[np.void]) -> None:
        block, length = self._blocks.get(user_id, _NONE), self._lengths.get(user_id, 0)
        end = length + len(records)
        if end > len(block):
            block = _room_for(max(end, 2 * len(block)))
            block[:length] = self._blocks.get(user_id, _NONE)[:length]
            self._blocks[user_id] = block
        block[length:end] = records
        self._lengths[user_id] = end
        self._unsorted.add(user_id)

    @property
    def user_ids(self) -> list[int]:
        """Of whom there are rows, ascending."""
        return sorted(user_id for user_id, length in self._lengths.items() if length)

    def block(self, user_id: int) -> NDArray[np.void]:
        """Give a user's rows: [number] RECORD by image, the last one of the highest standing last. Theirs, no copy."""
        block = self._blocks.get(user_id, _NONE)[: self._lengths.get(user_id, 0)]
        if user_id in self._unsorted:
            self._unsorted.remove(user_id)
            if (block["image_index"][1:] <= block["image_index"][:-1]).any():
                block[:] = block[np.lexsort((block["standing"], block["image_index"]))]
        return block

    def of_image(self, user_id: int, image_index: int) -> list[Row]:
        """Give the rows of an image."""
        if not 0 <= image_index <= images.MAX_IMAGE_INDEX:  # as an edited record may say
            return []
        block, key = self.block(user_id), np.uint32(image_index)  # of another type, it would have the whole column cast
        first, last = (np.searchsorted(block["image_index"], key, side) for side in ("left", "right"))
        return [_row(user_id, record) for record in block[first:last].tolist()]

    def keep(self, user_id: int, mask: NDArray[np.bool_]) -> None:
        """Keep of a user's block what the mask says."""
        if not mask.all():
            kept = self.block(user_id)[mask]
            self._blocks[user_id][: len(kept)] = kept
            self._lengths[user_id] = len(kept)

    def keep_best(self) -> "Table":
        """Keep one row an image: the last of the highest standing."""
        for user_id in self.user_ids:
            self.keep(user_id, is_last(self.block(user_id)))
        return self

    def image_indices(self) -> dict[int, NDArray[np.uint32]]:
        """Of which images there are rows: user id -> [number] ascending. The table's, no copy."""
        return {user_id: self.block(user_id)["image_index"] for user_id in self.user_ids}

    def num_bytes(self) -> int:
        """Add up what all files take."""
        return sum(int(self.block(user_id)["num_bytes"].sum(dtype=np.int64)) for user_id in self.user_ids)

    def sizes(self) -> set[tuple[int, int]]:
        """Which (width, height) the images have."""
        found: set[tuple[int, int]] = set()
        for user_id in self.user_ids:
            found.update(np.unique(self.block(user_id)[["width", "height"]]).tolist())
        return found

    def smaller_than(self, width: int, height: int, limit: float) -> Iterator[Item]:
        """Give the images of a size whose files are no larger than so many bytes."""
        for user_id in self.user_ids:
            block = self.block(user_id)
            is_small = (block["width"] == width) & (block["height"] == height) & (block["num_bytes"] <= limit)
            yield from ((user_id, image_index) for image_index in block["image_index"][is_small].tolist())

    def remove(self, items: Iterable[Item]) -> None:
        """Remove the rows of some images."""
        of_users: dict[int, list[int]] = {}
        for user_id, image_index in items:
            of_users.setdefault(user_id, []).append(image_index)
        for user_id, image_indices in of_users.items():
            self.keep(user_id, ~np.isin(self.block(user_id)["image_index"], image_indices))

    def of_user(self, user_id: int, limit: int | None = None) -> list[Row]:
        """Give a user's rows, or the first so many."""
        return [_row(user_id, record) for record in self.block(user_id)[:limit].tolist()]

    def __len__(self) -> int:
        return sum(self._lengths.values())

    def __iter__(self) -> Iterator[Row]:
        for user_id in self.user_ids:
            block = self.block(user_id)
            for start in range(0, len(block), _AT_ONCE):
                for record in block[start : start + _AT_ONCE].tolist():
                    yield _row(user_id, record)


def _room_for(number: int) -> NDArray[np.void]:
    """Make a block in pages of its own: they take memory only once written to, and leave no hole behind."""
    return np.frombuffer(mmap.mmap(-1, number * RECORD.itemsize), RECORD)


def is_last(block: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which rows of a sorted block are the last of their image: [number] bool."""
    image_indices = block["image_index"]
    last = np.ones(len(block), bool)
    last[:-1] = image_indices[1:] != image_indices[:-1]
    return last


def slices(values: Iterable[T], number: int) -> Iterator[list[T]]:
    """Take so many values at a time."""
    left = iter(values)
    while some := list(islice(left, number)):
        yield some


def _row(user_id: int, record: tuple[Any, ...]) -> Row:
    image_index, seed, num_inference_steps, is_random, _, width, height, num_bytes, sha256 = record
    return Row(
        images.file_name(user_id, image_index),
        user_id,
        image_index,
        seed,
        num_inference_steps,
        CONDITIONINGS[is_random],
        width,
        height,
        num_bytes,
        sha256.hex(),
    )


def _record(row: Row, standing: int) -> tuple[Any, ...]:
    is_random, sha256 = row.conditioning == "random", bytes.fromhex(row.sha256)
    size = (row.width, row.height, row.num_bytes)
    return (row.image_index, row.seed, row.num_inference_steps, is_random, standing, *size, sha256)


def _read_records(path: Path, standing: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.void]]]:
    """Read a file, so many lines at a time: user ids, and RECORD."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while lines := file.read(_PIECE_BYTES) + file.readline():
            with _uncollected():
                matches = _LINE.findall(lines)
                parsed = _parsed(matches, standing) if matches else None
                del matches
            if parsed and len(parsed[0]):  # of rows that match, all may hold too large a number
                yield parsed


@contextmanager
def _uncollected() -> Iterator[None]:
    """Make many objects without the garbage collector looking through them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parsed(matches: list[tuple[bytes, ...]], standing: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    _, _, planned, conditionings, measured, sha256 = zip(*matches, strict=True)
    user_ids, *numbers = [*_columns(planned), *_columns(measured)]
    records = np.zeros(len(matches), RECORD)
    records["standing"] = standing
    records["is_random"] = [conditioning == b"random" for conditioning in conditionings]
    records["sha256"] = np.frombuffer(bytes.fromhex(b"".join(sha256).decode()), "V32")
    fits = np.ones(len(records), bool)
    for name, values in zip(_NUMBERS, numbers, strict=True):
        fits &= values <= np.iinfo(RECORD[name]).max
        records[name] = values
    return user_ids[fits], records[fits]


def _columns(numbers: Sequence[bytes]) -> NDArray[np.int64]:
    """Parse so many numbers a line, with commas in between: [number, line]."""
    parsed = np.fromstring(b",".join(numbers).decode(), np.int64, sep=",")
    return parsed.reshape(len(numbers), -1).T
