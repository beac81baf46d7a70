"""Images as PNG files: encoding with text chunks, decoding, and reading a file's size and text."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

RUN_CHUNK = "userdiff_run"
MAX_FAST_LEVEL = 3  # of compression: up to here every row has one fixed filter, beyond it Pillow chooses row by row

_START = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_RUN_MARK = b"tEXt" + RUN_CHUNK.encode()
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> the number in a PNG's header
_SUB = 1  # the filter that subtracts from each pixel the one to its left


def encode_png(pixels: NDArray[np.uint8], text: Mapping[str, str], compress_level: int = 6) -> bytes:
    """Encode [height, width, channels] uint8 (1, 3 or 4 channels) as PNG with `text` as its text chunks.

    compress_level: zlib's, 0 to 9. Choosing a filter for every row takes most of an encoder's time; up to
    MAX_FAST_LEVEL none is chosen.
    """
    if pixels.shape[2] not in _COLOUR_TYPES:
        raise ValueError(f"a PNG has 1, 3 or 4 channels, the VAE makes {pixels.shape[2]}")
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    if compress_level <= MAX_FAST_LEVEL:
        return _encode_fast(pixels, chunks, compress_level)
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    image.save(buffer, format="PNG", pnginfo=chunks, compress_level=compress_level)
    return buffer.getvalue()


def _encode_fast(pixels: NDArray[np.uint8], chunks: PngImagePlugin.PngInfo, compress_level: int) -> bytes:
    """Write a PNG chunk by chunk, every row with the filter Sub (PNG specification, 5.6, 9.2 and 11.2)."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = _SUB
    filtered[:, 1 : 1 + channels] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, 1 + channels :])
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    texts = [(kind, content) for kind, content, _ in chunks.chunks]
    pixel_data = zlib.compress(filtered.data, compress_level)
    buffer = io.BytesIO()
    buffer.write(_START)
    for kind, content in [(b"IHDR", header), *texts, (b"IDAT", pixel_data), (b"IEND", b"")]:
        PngImagePlugin.putchunk(buffer, kind, content)
    return buffer.getvalue()


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
    if data[:8] != _START or data[12:16] != b"IHDR":
        raise OSError("not a PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def read_text_chunks(path: Path) -> dict[str, str] | None:
    """Read a PNG's text chunks, without its pixels; None where it cannot be read as a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(getattr(image, "text", {}))
    except Exception:  # Pillow raises a dozen kinds for a broken PNG
        return None


def is_remains(data: bytes) -> bool:
    """Return whether a file that is no intact PNG may be a job's: cut short, mangled, or zeros after a power cut."""
    return data.startswith(_START) or _START.startswith(data) or not data.strip(b"\0") or _RUN_MARK in data


def is_flat(pixels: NDArray[np.uint8]) -> bool:
    """Return whether all pixels of [height, width, channels] have one colour."""
    return bool((pixels == pixels[:1, :1]).all())
