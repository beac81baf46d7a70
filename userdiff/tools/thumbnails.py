"""Small copies of images, to be embedded in a page: few enough bytes, whatever the images are."""

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, features

from userdiff.dataset.png import open_image

SIDE = 96  # pixels, of the longer one

_LOSSY = "WEBP" if features.check("webp") else "JPEG"
_QUALITIES = (90, 75, 60, 40, 20, 5)


class Thumbnail(NamedTuple):
    """A small copy of an image."""

    source: str
    """A `data:` URL."""
    width: int
    """On the page, in CSS pixels: the copy's own, or a multiple of it where that is small."""
    height: int
    is_enlarged: bool
    """True where it is shown larger than it is."""


def make_thumbnail(path: Path, max_bytes: int) -> Thumbnail | None:
    """Make an image's small copy, at most SIDE pixels wide and high; None where the image cannot be read.

    It is the best of some encodings that takes no more than `max_bytes`, or the smallest of them. An image that is
    small itself is kept pixel for pixel, where `max_bytes` allows.
    """
    try:
        with open_image(path) as image:
            small = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGBA")
            kinds: list[tuple[str, dict[str, Any]]] = [("PNG", {"optimize": True})] if max(small.size) <= SIDE else []
            kinds += [(_LOSSY, {"quality": quality}) for quality in _QUALITIES]
            small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
            small.load()
        for kind, options in kinds:  # smaller each time
            buffer = io.BytesIO()
            (small.convert("RGB") if kind == "JPEG" else small).save(buffer, kind, **options)
            if buffer.tell() <= max_bytes:
                break
    except Exception:  # Pillow has many words for a broken PNG
        return None
    scale = max(SIDE // max(small.size), 1)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(source, small.width * scale, small.height * scale, is_enlarged=scale > 1)
