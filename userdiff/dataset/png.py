"""Images as PNG files: encoding with text chunks, decoding, and reading a file's size and text.

What lies under an image's name may be anybody's, and anything. It is read by its header first: a file of 700 kB may decode
to 700 MB. Of large images one is open at a time, whatever the number of threads.
"""

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from userdiff.dataset.files import open_file

RUN_CHUNK = "userdiff_run"
MAX_PIXELS = 2**24
"""Of an image: 4096 x 4096. No job makes a larger one, and none is decoded."""
MAX_SIDE = 2**16 - 1
MAX_FAST_LEVEL = 3  # of compression: up to here every row has one fixed filter, beyond it Pillow chooses row by row

_START = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_RUN_MARK = b"tEXt" + RUN_CHUNK.encode()
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> the number in a PNG's header
_SUB = 1  # the filter that subtracts from each pixel the one to its left
_HEADER_BYTES = 33  # of the start and the first chunk, which says the size
_TEXT_BYTES = 2**16  # more than the chunks with text take, which come next
_LARGE = 2**20  # pixels, or bytes

_large_images = threading.Lock()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is far below its limit


def encode_png(pixels: NDArray[np.uint8], text: Mapping[str, str], compress_level: int = 6) -> bytes:
    """Encode [height, width, channels] uint8 (1, 3 or 4 channels) as PNG with `text` as its text chunks.

    compress_level: zlib's, 0 to 9. Choosing a filter for every row takes most of an encoder's time; up to
    MAX_FAST_LEVEL none is chosen.
    """
    if pixels.shape[2] not in _COLOUR_TYPES:
        raise ValueError(f"a PNG has 1, 3 or 4 channels, the VAE makes {pixels.shape[2]}")
    if compress_level <= MAX_FAST_LEVEL:
        return _encode_fast(pixels, text, compress_level)
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    image.save(buffer, format="PNG", pnginfo=_text_info(text), compress_level=compress_level)
    return buffer.getvalue()


def _text_info(text: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    return info


def _chunks(*contents: tuple[bytes, bytes]) -> bytes:
    """Return chunks, (kind, content) each, as a file has them."""
    buffer = io.BytesIO()
    for kind, content in contents:
        PngImagePlugin.putchunk(buffer, kind, content)
    return buffer.getvalue()


def _text_chunks(text: Mapping[str, str]) -> bytes:
    return _chunks(*((kind, content) for kind, content, _ in _text_info(text).chunks))


def _encode_fast(pixels: NDArray[np.uint8], text: Mapping[str, str], compress_level: int) -> bytes:
    """Write a PNG chunk by chunk, every row with the filter Sub (PNG specification, 5.6, 9.2 and 11.2)."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = _SUB
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    pixel_data = zlib.compress(filtered.data, compress_level)
    end = _chunks((b"IDAT", pixel_data), (b"IEND", b""))
    return _START + _chunks((b"IHDR", header)) + _text_chunks(text) + end


@contextmanager
def read_png(path: Path) -> Iterator[bytes]:
    """Read a file that may be a job's image; raises OSError for one that is no PNG, or larger than its header explains."""
    with open_file(path) as file:
        header = file.read(_HEADER_BYTES)
        num_bytes = os.fstat(file.fileno()).st_size
        if _is_no_jobs(header, num_bytes):
            raise OSError(f"{num_bytes} bytes, {' x '.join(map(str, png_size(header)))} pixels: more than a job writes")
        file.seek(0)
        with _one_of_large(num_bytes):
            yield file.read(num_bytes)


def _is_no_jobs(header: bytes, num_bytes: int, bytes_per_pixel: int = 5) -> bool:
    """Return whether a PNG with this beginning is larger than any that a job writes, or has more bytes than pixels explain."""
    width, height = png_size(header)
    is_large = width * height > MAX_PIXELS or max(width, height) > MAX_SIDE
    return is_large or num_bytes > width * height * bytes_per_pixel + _TEXT_BYTES


@contextmanager
def open_image(path: Path, formats: tuple[str, ...] = ("PNG",)) -> Iterator[Image.Image]:
    """Open an image with Pillow, which decodes it when it is first used; raises one of many errors where it cannot be read.

    formats: others are not even tried. For some, such as EPS, Pillow runs other programs.
    """
    with open_file(path) as file:
        header, num_bytes = file.read(_HEADER_BYTES), os.fstat(file.fileno()).st_size
        # 16 bits for each of four channels
        if num_bytes > MAX_PIXELS * 8 or (header.startswith(_START) and _is_no_jobs(header, num_bytes, 8)):
            raise OSError(f"{num_bytes} bytes, more than its pixels take")
        file.seek(0)
        with Image.open(file, formats=formats) as image, _one_of_large(max(num_bytes, image.width * image.height)):
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            yield image


def _one_of_large(size: int) -> "threading.Lock | nullcontext[None]":
    return _large_images if size > _LARGE else nullcontext()


def decode_png(data: bytes) -> tuple[tuple[int, int], dict[str, str]]:
    """Decode a PNG and return its (width, height) and text chunks; raises OSError where it is not intact.

    Intact: every chunk matches its checksum, all pixels decode, and the file ends with the end chunk. Pillow alone does
    not notice that the end chunk is missing.
    """
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            size, text = image.size, dict(getattr(image, "text", {}))
    except Exception as error:  # Pillow raises a dozen kinds for a broken PNG
        raise OSError("not an intact PNG") from error
    if not data.endswith(_END):
        raise OSError("a PNG cut short")
    return size, text


def png_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) off a PNG's first chunk; raises OSError where it has none."""
    if data[:8] != _START or data[12:16] != b"IHDR" or len(data) < _HEADER_BYTES:
        raise OSError("not a PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def read_text_chunks(path: Path) -> dict[str, str] | None:
    """Read the text chunks before a PNG's pixels, without these; None where it cannot be read as a PNG."""
    try:
        with open_image(path) as image:
            return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
    except Exception:  # Pillow raises a dozen kinds for a broken PNG
        return None


def is_remains(path: Path, text: Mapping[str, str] | None = None) -> bool:
    """Return whether a file that is no intact PNG is what is left of a job's image: cut short, mangled, or zeros.

    text: its text chunks, by which a file that ends within them is known. Raises OSError where the file cannot be read.
    """
    with open_file(path) as file:
        start, num_bytes = file.read(_TEXT_BYTES), os.fstat(file.fileno()).st_size
        if not start.strip(b"\0"):  # as a power cut leaves a file
            return num_bytes <= MAX_PIXELS * 8 and not any(
                piece.strip(b"\0") for piece in iter(lambda: file.read(_LARGE), b"")
            )
    with suppress(OSError):  # its beginning is mangled
        if _is_no_jobs(start, num_bytes):
            return False
    begins_as_png = _START.startswith(start[:8]) and b"IHDR".startswith(start[12:16])
    return _RUN_MARK in start or (begins_as_png and _text_chunks(text or {}).startswith(start[_HEADER_BYTES:]))


def is_flat(pixels: NDArray[np.uint8]) -> bool:
    """Return whether all pixels of [height, width, channels] have one colour."""
    return bool((pixels == pixels[:1, :1]).all())
