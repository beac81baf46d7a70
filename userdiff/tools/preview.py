"""`preview.html`: a page that shows a dataset at a glance; and the same as one picture."""

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw, ImageFont

from userdiff.dataset.png import open_image
from userdiff.dataset.rows import Row, Rows, as_rows
from userdiff.dataset.run_record import RunRecord
from userdiff.dataset.scan import read_all
from userdiff.text import count
from userdiff.tools.run_summary import notices, run_summary
from userdiff.tools.thumbnails import Thumbnail, make_thumbnail

IMAGES_SHOWN = 16  # of each user, its first
USERS_SHOWN = 64
PAGE_BYTES = 5_000_000  # at most: a page that opens at once, and can be sent by mail

_IMAGE_BYTES = 4_700_000  # of those for the images; the rest is far more than all else takes
_TAG_BYTES = 400  # more than the page has around an image, whatever the user's id
_GAP = 4  # pixels between the images of a picture
_SHEET_PIXELS = 2**27  # of a picture: 400 MB


# The page ------------------------------------------------------------------------------------------------------------


def preview_page(
    output_dir: Path, rows: Rows, run_record: RunRecord | None = None, ended: datetime | None = None
) -> bytes:
    """Return the page of a dataset: the first images of its first users, and how it was made.

    The page needs no other file, takes PAGE_BYTES at most, and says how much it does not show. It names no path but
    those of the images, relative to it. An image that cannot be read is shown as such.

    ended: when the record's last run ended, where that is now and its entry does not say so yet.
    """
    environment = Environment(loader=PackageLoader("userdiff", "tools"), autoescape=True, trim_blocks=True)
    environment.globals["count"] = count
    template = environment.get_template("preview.html.jinja")
    source = files("userdiff.tools").joinpath("preview.html.jinja").read_text(encoding="utf-8")
    page = template.render(
        policy=_policy(source),
        name=output_dir.resolve().name or "dataset",
        summary=_summary(rows),
        notices=notices(rows, run_record, ended),
        summary_of_runs=run_summary(run_record, ended) if run_record else (),
        users=_users(output_dir, rows),
        num_hidden_users=max(len(rows.user_ids) - USERS_SHOWN, 0),
    )
    return page.encode(errors="replace")  # a folder's name need not be UTF-8


def _policy(source: str) -> str:
    """Return a policy by which a browser fetches nothing, and applies no style and runs no script but the page's own."""
    hashes = {}
    for tag in ("style", "script"):
        content = source.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    return (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; script-src {hashes['script']}; base-uri 'none'; "
        "form-action 'none'"
    )


def _summary(rows: Rows) -> str:
    sizes = rows.sizes()
    size = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys([*sizes[:1], *sizes[-1:]]))
    return f"{count(len(rows), 'image')} of {count(len(rows.user_ids), 'user')}" + (f", {size} pixels" if size else "")


class _User(NamedTuple):
    """What the page shows of a user."""

    user_id: int
    num_images: int
    shown: list[tuple[Row, Thumbnail | None]]
    """None for an image that cannot be read."""
    num_hidden: int


def _users(output_dir: Path, rows: Rows) -> Iterator[_User]:
    """Yield the users that the page shows, with as many of their first images as it has room for."""
    room = _IMAGE_BYTES
    users = {user_id: as_rows(rows.of_user(user_id)[:IMAGES_SHOWN]) for user_id in rows.user_ids[:USERS_SHOWN]}
    num_shown = sum(map(len, users.values()))
    max_bytes = (_IMAGE_BYTES // max(num_shown, 1) - _TAG_BYTES) * 3 // 4  # base64 makes four bytes of three

    def thumbnail(row: Row) -> Thumbnail | None:
        return make_thumbnail(output_dir / row.file_name, max_bytes)

    for user_id, first in users.items():
        shown = []
        for row, small in zip(first, read_all(thumbnail, first), strict=True):
            needed = _TAG_BYTES + (len(small.source) if small else 0)
            if needed <= room:
                room -= needed
                shown.append((row, small))
        num_images = len(rows.of_user(user_id))
        yield _User(user_id, num_images, shown, num_images - len(shown))


# The picture ---------------------------------------------------------------------------------------------------------


def contact_sheet(output_dir: Path, rows: Rows, columns: int, scale: int) -> Image.Image:
    """Return a picture of the first `columns` images of every user, a row of it per user, with the user's id before it.

    An image that cannot be read, or is not of the size that its row says, is crossed out. Raises ValueError where the
    picture would be too large to look at.
    """
    users = {f"user {user_id}": as_rows(rows.of_user(user_id)[:columns]) for user_id in rows.user_ids}
    font = ImageFont.load_default()
    margin = _GAP + max(int(font.getlength(name)) + _GAP for name in users)
    width = margin + max(sum(row.width * scale + _GAP for row in line) for line in users.values())
    heights = [max(row.height for row in line) * scale + _GAP for line in users.values()]
    height = _GAP + sum(heights)
    if width * height > _SHEET_PIXELS:
        raise ValueError(
            f"--picture: {width} x {height} pixels would be too large to look at; give fewer --columns or a smaller --scale"
        )
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for (name, line), line_height in zip(users.items(), heights, strict=True):
        draw.text((_GAP, top), name, fill="black", font=font)
        left = margin
        for row in line:
            sheet.paste(_enlarged(output_dir, row, scale), (left, top))
            left += row.width * scale + _GAP
        top += line_height
    return sheet


def picture_bytes(sheet: Image.Image, suffix: str) -> bytes:
    """Return a picture as a file with this suffix has it; raises ValueError for one that its format cannot hold."""
    buffer = io.BytesIO()
    try:
        sheet.save(buffer, Image.registered_extensions()[suffix.lower()])
    except (ValueError, OSError) as error:
        size = f"{sheet.width} x {sheet.height} pixels"
        raise ValueError(f"--picture: {suffix} does not hold {size} ({error}); name it .png") from error
    return buffer.getvalue()


def _enlarged(output_dir: Path, row: Row, scale: int) -> Image.Image:
    size = (row.width * scale, row.height * scale)
    with (
        suppress(Exception),
        open_image(output_dir / row.file_name) as picture,
    ):  # Pillow has many words for a broken PNG
        if picture.size == (row.width, row.height):
            return picture.resize(size, Image.Resampling.NEAREST)
    return _crossed_out(*size)


def _crossed_out(width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), "lightgray")
    draw = ImageDraw.Draw(picture)
    draw.line((0, 0, width - 1, height - 1), "gray")
    draw.line((0, height - 1, width - 1, 0), "gray")
    return picture
