"""Images on disk: where they lie, what their PNG says of itself, and how they get there whole."""

import io
import math
import os
import re
import secrets
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import BoundedSemaphore, Lock
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

FOLDER_NAME = re.compile(r"user_(\d{2,})", re.ASCII)
_IMAGE_NAME = re.compile(r"generated_(\d{3}|[1-9]\d{3,9})\.png", re.ASCII)
MAX_IMAGE_INDEX = 2**32 - 1
MAX_BYTES = 2**32 - 1  # of a file, as far as its size is told
_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # as a PNG's header has them
RUN_CHUNK = "userdiff_run"
_RUN_MARK = b"tEXt" + RUN_CHUNK.encode()
MAX_FAST_LEVEL = 3  # of compression: up to here one fixed filter, from here on Pillow's choice row by row
_SUB = 1  # the number of PNG's filter that takes from each pixel the one to its left
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DRAIN_SECONDS = 5.0


def file_name(user_id: int, image_index: int) -> str:
    """Path of an image relative to the dataset's folder, with `/`: `user_01/generated_000.png`."""
    return f"user_{user_id:02d}/generated_{image_index:03d}.png"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """Give the (user_id, image_index) that a relative path stands for; None where it is not an image of a job."""
    folder, _, file = name.partition("/")
    user_id, image_index = _user_id(folder), _image_index(file)
    return (user_id, image_index) if user_id and image_index is not None else None


def _user_id(folder: str) -> int:
    match = FOLDER_NAME.fullmatch(folder)
    user_id = int(match[1]) if match else 0
    return user_id if folder == f"user_{user_id:02d}" else 0


def _image_index(file: str) -> int | None:
    match = _IMAGE_NAME.fullmatch(file)
    return int(match[1]) if match and int(match[1]) <= MAX_IMAGE_INDEX else None


class UserFolder(NamedTuple):
    """What lies in a user's folder."""

    name: str
    user_id: int
    """0 where a job gives no folder such a name."""
    image_indices: NDArray[np.uint32]
    """[number] of the images lying under their final names, ascending; those of a user."""
    num_bytes: NDArray[np.uint32]
    """[number] of their files; MAX_BYTES stands for more too."""
    others: list[str]
    """Names of all else but temporaries."""


def user_folders(output_dir: Path) -> Iterator[UserFolder]:
    """Look through the user folders, in the order of their names, at the name and size of every file."""
    for folder in sorted(output_dir.glob("user_*")):
        if FOLDER_NAME.fullmatch(folder.name) and folder.is_dir():
            yield _user_folder(folder)


def _user_folder(folder: Path) -> UserFolder:
    user_id, found, others = _user_id(folder.name), array("Q"), []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _IMAGE_NAME.fullmatch(entry.name) if user_id else None
            try:
                if match and entry.is_file() and (image_index := int(match[1])) <= MAX_IMAGE_INDEX:
                    size = entry.stat().st_size
                    found.append(image_index)
                    found.append(size)
                elif not _TEMPORARY.fullmatch(entry.name):
                    others.append(entry.name)
            except FileNotFoundError:  # gone since
                continue
    images = np.minimum(np.frombuffer(found, np.uint64), MAX_BYTES).astype(np.uint32).reshape(-1, 2)
    images = images[np.argsort(images[:, 0])]
    return UserFolder(folder.name, user_id, images[:, 0].copy(), images[:, 1].copy(), sorted(others))


def user_files(output_dir: Path) -> Iterator[Path]:
    """Find everything that lies in user folders, whosever it is, but temporaries."""
    for folder in sorted(output_dir.glob("user_*")):
        if FOLDER_NAME.fullmatch(folder.name) and folder.is_dir():
            yield from (path for path in sorted(folder.iterdir()) if not _TEMPORARY.fullmatch(path.name))


def remove_temporaries(output_dir: Path) -> None:
    """Remove what a killed job was just writing. Only for the one who holds the folder's lock."""
    for path in [*output_dir.glob(".*.tmp-*"), *output_dir.glob("user_*/.*.tmp-*")]:
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def encode_png(pixels: NDArray[np.uint8], text: Mapping[str, str], compress_level: int = 6) -> bytes:
    """Encode [height, width, channels] uint8 (1, 3 or 4 channels) as PNG with `text` as its text chunks.

    compress_level: zlib's, 0 to 9. Most of an encoder's time goes into the choice of a filter for every row; up to
    MAX_FAST_LEVEL none is chosen.
    """
    mode = _MODES.get(pixels.shape[2])
    if mode is None:
        raise ValueError(f"a PNG has 1, 3 or 4 channels, the VAE makes {pixels.shape[2]}")
    if compress_level <= MAX_FAST_LEVEL:
        return _encode_fast(pixels, text, compress_level)
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if mode == "L" else pixels))
    image.save(buffer, format="PNG", pnginfo=chunks, compress_level=compress_level)
    return buffer.getvalue()


def _encode_fast(pixels: NDArray[np.uint8], text: Mapping[str, str], compress_level: int) -> bytes:
    """Write a PNG chunk by chunk, every row with the filter Sub: PNG specification, 5.6, 11.2 and 9.2."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = _SUB
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    texts = [_text_chunk(key, value) for key, value in text.items()]
    data = _chunk(b"IDAT", zlib.compress(filtered.data, compress_level))
    return b"".join([_PNG_START, _chunk(b"IHDR", header), *texts, data, _PNG_END])


def _text_chunk(key: str, value: str) -> bytes:
    try:
        return _chunk(b"tEXt", f"{key}\0{value}".encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", f"{key}\0\0\0\0\0{value}".encode())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_png(data: bytes) -> tuple[tuple[int, int], dict[str, str]]:
    """Decode a PNG whole and give its (width, height) and text chunks; raises OSError where it is not intact.

    Intact: every chunk has its checksum, all pixels decode, and the file ends with the end chunk, which Pillow alone
    would not miss.
    """
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            size, text = image.size, dict(getattr(image, "text", {}))
    except Exception as error:  # Pillow has many words for a broken PNG
        raise OSError("not an intact PNG") from error
    if not data.endswith(_PNG_END):
        raise OSError("a PNG cut short")
    return size, text


def is_what_is_left(data: bytes) -> bool:
    """Whether a file that is no intact PNG may be what is left of a job's: cut, mangled, or zeros after a power cut."""
    return data.startswith(_PNG_START) or _PNG_START.startswith(data) or not data.strip(b"\0") or _RUN_MARK in data


def png_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) off a PNG's first chunk; raises OSError where it has none."""
    if data[:8] != _PNG_START or data[12:16] != b"IHDR":
        raise OSError("not a PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def read_text_chunks(path: Path) -> dict[str, str] | None:
    """Read what a PNG says of itself, without its pixels; None where it cannot be read as a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(getattr(image, "text", {}))
    except Exception:  # Pillow has many words for a broken PNG
        return None


def is_flat(path: Path) -> bool:
    """Whether an image has one single colour; raises OSError where it is not intact."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return all(low == high for low, high in np.atleast_2d(image.getextrema()))
    except Exception as error:  # Pillow has many words for a broken PNG
        raise OSError("not an intact PNG") from error


def publish(path: Path, data: bytes | Iterable[bytes], *, sync: bool = False) -> None:
    """Put `data`, or its pieces, under `path` in one step: whoever opens `path` sees all, or what was there before.

    With `sync` that is so after a power cut too.

    The temporary lies in the same folder, so that the rename stays within one file system, and has the permissions
    the user's umask gives.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with errors_naming(path), open(temporary, "xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        with errors_naming(path):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # where nothing could be made, there is nothing to remove
            temporary.unlink()
        raise


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Let an OSError name `path`: a failed write names no file, a failed open one that the user never saw."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class Space(NamedTuple):
    """What some files take of a disk, and what it has. A quota shows in none of this."""

    num_files: int
    needed: int
    """Bytes; a file takes whole blocks."""
    free: int
    """Bytes."""
    free_files: float
    """How many more files it has room for; infinite where the file system does not count them."""

    @property
    def is_short(self) -> bool:
        """Whether something will not fit."""
        return self.needed > self.free or self.num_files > self.free_files


def space(output_dir: Path, num_files: int, bytes_per_file: float) -> Space:
    """Compare so many files with the room that a folder's disk has, or that it would have."""
    disk = os.statvfs(next(folder for folder in (output_dir, *output_dir.parents) if folder.exists()))
    needed = num_files * math.ceil(bytes_per_file / disk.f_frsize) * disk.f_frsize
    return Space(num_files, needed, disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else math.inf)


class WriterPool:
    """A bounded pool of writer threads; the first failure is raised, with its cause, to whoever submits or closes.

    At most `max_pending` tasks are waiting or under way; `submit` blocks when there are more, so memory stays flat
    when the disk is slower than the model. Leaving the `with` block waits for all of them; by an exception, no longer
    than DRAIN_SECONDS for those that have not begun.
    """

    def __init__(self, num_threads: int, max_pending: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="writer")
        self._max_pending = max_pending
        self._free = BoundedSemaphore(max_pending)
        self._lock = Lock()
        self._error: BaseException | None = None

    def submit(self, task: Callable[[], object]) -> None:
        """Queue `task` for a writer thread; raises what an earlier task failed of, and then takes nothing more."""
        self._free.acquire()
        if self._error is not None:
            self._free.release()
            raise self._error
        self._executor.submit(task).add_done_callback(self._finished)

    def _finished(self, future: "Future[object]") -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            with self._lock:  # so that nothing takes the first error's place
                self._error = self._error or error
        self._free.release()

    def _drain(self, deadline: float) -> None:
        for _ in range(self._max_pending):
            if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return

    def __enter__(self) -> "WriterPool":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._drain(time.monotonic() + DRAIN_SECONDS)
        self._executor.shutdown(wait=True, cancel_futures=error is not None)
        if error is None and self._error is not None:
            raise self._error
