"""The manifest: one CSV row per finished image; a part per process while running, merged into one sorted file."""

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from threading import Lock

from userdiff import images
from userdiff.planning import item_seed

MANIFEST_NAME = "manifest.csv"
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
_INTEGERS = frozenset(field.name for field in fields(Row) if field.type is int)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What all images of a dataset have in common, and its rows and text chunks say."""

    seed: int
    """The base seed."""
    num_inference_steps: int
    conditioning: str
    run: str
    """The identity hash."""

    def text_chunks(self, user_id: int, image_index: int) -> dict[str, str]:
        """Give what the PNG of an image says of itself."""
        return {
            "user_id": str(user_id),
            "image_index": str(image_index),
            "seed": str(item_seed(self.seed, user_id, image_index)),
            "num_inference_steps": str(self.num_inference_steps),
            "conditioning": self.conditioning,
            "userdiff_run": self.run,
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
            sha256=hashlib.sha256(png).hexdigest(),
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


class PartWriter:
    """One process's part of the manifest: rows appended as their images are published, each flushed."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()  # rows come from several writer threads
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed by __exit__
        self._file.write(_line(COLUMNS))

    def append(self, row: Row) -> None:
        """Note a published image."""
        with self._lock:
            self._file.write(_line(astuple(row)))
            self._file.flush()

    def __enter__(self) -> "PartWriter":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *exc: object) -> None:
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
    values = line.rstrip("\n").split(",")  # no field of ours holds a comma or a quote
    if len(values) != len(COLUMNS):
        return None
    try:
        row = Row(*(int(v) if c in _INTEGERS else v for c, v in zip(COLUMNS, values, strict=True)))  # type: ignore[arg-type]
    except ValueError:
        return None
    well_formed = row.conditioning in CONDITIONINGS and len(row.sha256) == 64 and _line(astuple(row)) == line
    return row if well_formed and row.user_id >= 1 and row.image_index >= 0 else None


def finished_rows(output_dir: Path, recipe: Recipe) -> list[Row]:
    """Collect one row for every finished image in the folder, sorted by (user_id, image_index).

    Finished: a row that agrees with the recipe and a file of the row's size; or, without such a row, a PNG that
    decodes whole and whose text chunks are those the recipe gives it.
    """
    rows: dict[tuple[int, int], Row] = {}
    recorded = {
        (row.user_id, row.image_index, row.num_bytes): row
        for path in [output_dir / MANIFEST_NAME, *part_paths(output_dir)]
        for row in read_rows(path)
        if recipe.agrees(row)
    }
    for user_id, image_index in images.image_files(output_dir):
        path = output_dir / images.file_name(user_id, image_index)
        row = recorded.get((user_id, image_index, path.stat().st_size)) or _adopt(path, user_id, image_index, recipe)
        if row is not None:
            rows[user_id, image_index] = row
    return [rows[item] for item in sorted(rows)]


def _adopt(path: Path, user_id: int, image_index: int, recipe: Recipe) -> Row | None:
    try:
        size, text = images.read_png(path)
        if text == recipe.text_chunks(user_id, image_index):
            return recipe.row(user_id, image_index, size, path.read_bytes())
    except OSError:
        pass  # truncated, or not ours: it is made again
    return None


def write_manifest(output_dir: Path, rows: Iterable[Row]) -> None:
    """Publish `manifest.csv` with these rows, then remove the parts that went into it."""
    parts = part_paths(output_dir)
    buffer = io.StringIO()
    buffer.writelines([_line(COLUMNS), *(_line(astuple(row)) for row in rows)])
    images.publish(output_dir / MANIFEST_NAME, buffer.getvalue().encode())
    for path in parts:
        path.unlink()


def _line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
