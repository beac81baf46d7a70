"""Every file name of a dataset's folder, and its grammar."""

import os
import re
import secrets
from collections.abc import Iterator
from itertools import count
from pathlib import Path

RECORD_NAME = "run.json"
MANIFEST_NAME = "manifest.csv"
PREVIEW_NAME = "preview.html"
LOCK_NAME = ".userdiff.lock"
WRITERS_NAME = ".userdiff.writers"
PROBE_NAME = ".userdiff.probe"
PAGE_START = (
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy"'
)
"""How every `preview.html` of ours begins."""

_OWN_NAMES = {RECORD_NAME, MANIFEST_NAME, PREVIEW_NAME, LOCK_NAME, WRITERS_NAME, PROBE_NAME}

MAX_IMAGE_INDEX = 2**32 - 1
LOADED_SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
"""Suffixes of the files that dataset loaders take for images."""

_USER_FOLDER = re.compile(r"user_(\d{2,})", re.ASCII)
_IMAGE = re.compile(r"generated_(\d{3}|[1-9]\d{3,9})\.png", re.ASCII)
_PART = re.compile(r"manifest\.part-\d{5,}\.csv")
_TEMPORARY = re.compile(r"\.(.+)\.tmp-[0-9a-f]{8}")
_SHARED_MARK = re.compile(r"\.userdiff\.shared-[0-9a-f]{16}")
_SYSTEM = re.compile(
    r"\.DS_Store|\.directory|\.localized|\.Spotlight-V100|\.Trashes|\.Trash-\d+|\.fseventsd|\.TemporaryItems|\.AppleDouble|"
    r"\._\.DS_Store|Thumbs\.db|ehthumbs\.db|desktop\.ini|@eaDir|#recycle|@Recycle|\$RECYCLE\.BIN|System Volume Information|"
    r"lost\+found|\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+|\.snapshots?|\.zfs|\.ipynb_checkpoints",
    re.ASCII | re.IGNORECASE,
)


def file_name(user_id: int, image_index: int) -> str:
    """Return an image's path relative to the dataset's folder, with `/`: `user_01/generated_000.png`."""
    return f"user_{user_id:02d}/generated_{image_index:03d}.png"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """Return the (user_id, image_index) of an image's relative path; None for a name that no job gives."""
    folder, _, file = name.partition("/")
    user_id, image_index = parse_user_folder(folder), parse_image(file)
    return (user_id, image_index) if user_id is not None and image_index is not None else None


def is_user_folder(name: str) -> bool:
    """Return whether a folder's name looks like a user's, such as `user_07`, or `user_007`, which no job makes."""
    return _USER_FOLDER.fullmatch(name) is not None


def parse_user_folder(name: str) -> int | None:
    """Return the user id of a folder's name; None for a name that no job gives, such as `user_007`."""
    match = _USER_FOLDER.fullmatch(name)
    return int(match[1]) if match and name == f"user_{int(match[1]):02d}" else None


def parse_image(name: str) -> int | None:
    """Return the image_index of a file's name; None for a name that no job gives."""
    match = _IMAGE.fullmatch(name)
    return int(match[1]) if match and int(match[1]) <= MAX_IMAGE_INDEX else None


def user_folders(output_dir: Path) -> list[Path]:
    """Return the users' folders, sorted by name."""
    named = [path for path in entries(output_dir) if is_user_folder(path.name)]
    return [path for path in named if os.path.isdir(path)]  # noqa: PTH112 - Path.is_dir raises where it may not look


def entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, sorted by name; nothing where there is no such folder.

    Raises OSError where it cannot be listed: `Path.glob` would take it for empty.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def part_path(output_dir: Path, number: int) -> Path:
    """Return the path of a process's part of the manifest, where it records the images that it has finished."""
    return output_dir / f"manifest.part-{number:05d}.csv"


def part_number(path: Path) -> int:
    """Return the number of a part of the manifest."""
    return int(path.stem.rpartition("-")[2])


def part_paths(output_dir: Path) -> list[Path]:
    """Return the existing parts, of this run or an earlier one, sorted by process."""
    return [path for path in entries(output_dir) if _PART.fullmatch(path.name)]


def edited_paths(output_dir: Path) -> Iterator[Path]:
    """Yield the names that a manifest gets which somebody added to, before a new one is written."""
    return (output_dir / f"manifest.edited-{number}.csv" for number in count(1))


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path`, for a file that is renamed to `path` once it is whole."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def is_temporary(name: str) -> bool:
    """Return whether a name is one that `temporary_path` gives for a file of a dataset."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and (match[1] in _OWN_NAMES or parse_image(match[1]) is not None)


def is_own(name: str) -> bool:
    """Return whether a path relative to the dataset's folder is one that jobs write to, or hides labels from loaders."""
    path = Path(name)
    if path.parent == Path():
        is_part = _PART.fullmatch(name) is not None
        return name in _OWN_NAMES or is_part or path.suffix.lower() in LOADED_SUFFIXES
    return parse_user_folder(path.parts[0]) is not None


def is_system(name: str) -> bool:
    """Return whether an operating system or a file server leaves files or folders of this name, as `.DS_Store`."""
    return _SYSTEM.fullmatch(name) is not None


def shared_mark_path(output_dir: Path) -> Path:
    """Return a new name for the file by which machines find out whether they share the folder."""
    return output_dir / f".userdiff.shared-{secrets.token_hex(8)}"


def shared_mark_paths(output_dir: Path) -> list[Path]:
    """Return the existing files of that kind."""
    return [path for path in entries(output_dir) if _SHARED_MARK.fullmatch(path.name)]
