"""The manifest: one CSV row per finished image; a part per process while running, then one sorted file."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from threading import Lock

from userdiff.dataset.atomic import errors_naming, publish
from userdiff.dataset.files import open_file
from userdiff.dataset.layout import MANIFEST_NAME, edited_paths, part_paths
from userdiff.dataset.rows import COLUMNS, HEADER, Row, Rows, Trust, lines, read_lines, slices

_PIECE_BYTES = 2**18
_SLICE = 1000  # rows that are written at a time


class PartWriter:
    """One process's part of the manifest: rows appended as their images are published, each flushed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()  # rows come from several writer threads
        path.unlink(missing_ok=True)  # what it leads to is not written to
        self._file = open(path, "x", encoding="utf-8", newline="")  # noqa: SIM115 - closed by __exit__
        self._file.write(HEADER)

    def append(self, row: Row) -> None:
        """Append the row of a published image."""
        with self._lock, errors_naming(self._path):
            self._file.write(row.line)
            self._file.flush()

    def __enter__(self) -> "PartWriter":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *exc: object) -> None:
        with errors_naming(self._path):
            self._file.close()


def num_part_rows(output_dir: Path) -> int:
    """Return how many rows the parts of an unfinished run hold so far."""
    return sum(max(sum(piece.count(b"\n") for piece in _pieces(path)) - 1, 0) for path in part_paths(output_dir))


def recorded_rows(output_dir: Path, *, trust_manifest: bool = False, trusted_parts: Collection[Path] = ()) -> Rows:
    """Read the rows of the manifest and of all parts.

    The parts first: a merge that ends meanwhile has put their rows into the manifest before it removes them.

    A manifest is trusted if it still has the hash it was published with; otherwise it was damaged or edited. Parts of the
    current run are trusted; those of an interrupted run, or of a machine that was lost, may name files that a power cut has
    emptied.
    """
    noted = [path for path in part_paths(output_dir) if path not in trusted_parts]
    rows = Rows(chain.from_iterable(map(read_lines, trusted_parts)), Trust.RECORDED)
    rows.extend(chain.from_iterable(map(read_lines, noted)), Trust.NOTED)
    rows.extend(read_lines(output_dir / MANIFEST_NAME), Trust.RECORDED if trust_manifest else Trust.CLAIMED)
    return rows


def is_manifest(path: Path) -> bool:
    """Return whether a file begins as a manifest or a part does, as far as it goes."""
    with open_file(path) as file:
        start = file.read(len(HEADER))
    return HEADER.encode().startswith(start) or not start.strip(b"\0")  # as a power cut leaves it


def keep_edited(output_dir: Path) -> Path | None:
    """Rename a manifest that somebody added columns to, or another table in its place; returns its new path.

    A header with some damage is no such table.
    """
    path = output_dir / MANIFEST_NAME
    fields = next(lines(path), HEADER).rstrip().split(",")
    num_ours = len(set(COLUMNS) & set(fields))
    has_more = num_ours == len(COLUMNS) < len(fields)
    is_another = num_ours <= len(COLUMNS) / 2 and len(fields) > 1 and not any(map(str.isdecimal, fields))
    if not (has_more or is_another):
        return None
    edited = next(edited for edited in edited_paths(output_dir) if not os.path.lexists(edited))
    path.rename(edited)
    return edited


def write_manifest(output_dir: Path, rows: Iterable[Row], on_edited: Callable[[Path], None] = lambda copy: None) -> str:
    """Publish `manifest.csv` with these rows, then remove the parts that went into it; returns the file's SHA-256.

    on_edited: is told where `keep_edited` has kept what somebody added to the one before.
    """
    if copy := keep_edited(output_dir):
        on_edited(copy)
    parts = part_paths(output_dir)
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for some in slices(chain([HEADER], (row.line for row in rows)), _SLICE):
            piece = "".join(some).encode()
            digest.update(piece)
            yield piece

    publish(output_dir / MANIFEST_NAME, pieces(), sync=True)
    for path in parts:
        path.unlink(missing_ok=True)
    return digest.hexdigest()


def manifest_sha256(output_dir: Path) -> str | None:
    """Return the SHA-256 of a folder's manifest; None where there is none.

    Of a file that is no manifest, only what comes before the first sign of that is read.
    """
    path = output_dir / MANIFEST_NAME
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    for number, piece in enumerate(_pieces(path)):
        digest.update(piece)
        if b"\0" in piece or (number == 0 and not piece.startswith(HEADER.encode())):
            break
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
