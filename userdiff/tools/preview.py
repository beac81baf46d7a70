"""`preview.html`: a page that shows a dataset at a glance; and the same as one picture."""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw

from userdiff.dataset import manifest
from userdiff.dataset.rows import Row, Table
from userdiff.dataset.run_record import RunRecord
from userdiff.tools.run_summary import count, facts, notices
from userdiff.tools.thumbnails import Thumbnail, make_thumbnail

PREVIEW_NAME = "preview.html"
IMAGES_SHOWN = 16  # of each user, its first
USERS_SHOWN = 64
PAGE_BYTES = 5_000_000  # at most: a page that opens at once, and can be sent by mail

_IMAGE_BYTES = 4_700_000  # of those for the images; the rest is far more than all else takes
_TAG_BYTES = 400  # of those of an image for what is said of it, about
_GAP = 4  # pixels between the images of a picture


# The page ------------------------------------------------------------------------------------------------------------


def preview_page(
    output_dir: Path, rows: Table, run_record: RunRecord | None = None, ended: datetime | None = None
) -> bytes:
    """Make the page of a dataset: the first images of its first users, and what its record tells of them.

    The page needs no other file, takes PAGE_BYTES at most, and says how much it does not show. It names no path but
    those of the images, relative to it. An image that cannot be read is shown as such; nothing a folder or a record
    holds makes this fail.

    ended: when the record's last run ended, where that is now and its entry does not say so yet.
    """
    template = files("userdiff.tools").joinpath("preview_template.html").read_text(encoding="utf-8")
    told = facts(run_record, ended) if run_record else ()
    values = {
        "policy": _policy(template),
        "name": _escape(output_dir.resolve().name or "dataset"),
        "summary": _escape(_summary(rows)),
        "notices": "\n".join(f'<p class="notice">{_escape(text)}</p>' for text in notices(rows, run_record, ended)),
        "facts": "\n".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(text)}</dd></div>" for name, text in told),
        "users": "\n".join(_user_sections(output_dir, rows)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template).encode()


def _policy(template: str) -> str:
    """Have the browser fetch nothing, and apply no style and run no script but the page's own."""
    sources = {}
    for tag in ("style", "script"):
        content = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        sources[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    return (
        f"default-src 'none'; img-src data:; style-src {sources['style']}; script-src {sources['script']}; "
        "base-uri 'none'; form-action 'none'"
    )


def _escape(text: str) -> str:
    """Write text as HTML; a folder's name need not be UTF-8."""
    return html.escape(text.encode(errors="replace").decode())


def _summary(rows: Table) -> str:
    sizes = sorted(rows.sizes())
    size = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys([*sizes[:1], *sizes[-1:]]))
    return f"{count(len(rows), 'image')} of {count(len(rows.user_ids), 'user')}" + (f", {size} pixels" if size else "")


def _user_sections(output_dir: Path, rows: Table) -> Iterator[str]:
    room = _IMAGE_BYTES
    users = {user_id: rows.of_user(user_id, IMAGES_SHOWN) for user_id in rows.user_ids[:USERS_SHOWN]}
    num_shown = sum(map(len, users.values()))
    max_bytes = (_IMAGE_BYTES // max(num_shown, 1) - _TAG_BYTES) * 3 // 4  # base64 makes four bytes of three

    def thumbnail(row: Row) -> Thumbnail | None:
        return make_thumbnail(output_dir / row.file_name, max_bytes)

    for user_id, shown in users.items():
        tags, number = [], len(rows.block(user_id))
        for row, small in zip(shown, manifest.read_all(thumbnail, shown), strict=True):
            tag = _image_tag(row, small)
            if len(tag.encode()) <= room:
                room -= len(tag.encode())
                tags.append(tag)
        if len(tags) < number:
            tags.append(f'<li class="more">and {number - len(tags)} more</li>')
        yield _user_section(user_id, number, tags)
    if len(rows.user_ids) > USERS_SHOWN:
        yield f'<p class="more">and {count(len(rows.user_ids) - USERS_SHOWN, "more user")}</p>'


def _user_section(user_id: int, num_images: int, tags: Sequence[str]) -> str:
    lines = [
        f'<section class="user" id="user-{user_id}" data-user="{user_id}" aria-labelledby="name-{user_id}">',
        f'<div><h2 id="name-{user_id}">User {user_id}</h2><p>{count(num_images, "image")}</p></div>',
        '<ul role="list">',
        *tags,
        "</ul>",
        "</section>",
    ]
    return "\n".join(lines)


def _image_tag(row: Row, thumbnail: Thumbnail | None) -> str:
    title = _escape(f"image {row.image_index}, seed {row.seed}, {row.file_name}")
    if thumbnail is None:
        return f'<li class="unreadable" title="{title}">image {row.image_index} cannot be read</li>'
    look = 'class="enlarged" ' if thumbnail.is_enlarged else ""
    return (
        f'<li><a href="{quote(row.file_name)}"><img {look}width="{thumbnail.width}" height="{thumbnail.height}" '
        f'alt="user {row.user_id}, image {row.image_index}" title="{title}" src="{thumbnail.source}"></a></li>'
    )


# The picture ---------------------------------------------------------------------------------------------------------


def contact_sheet(output_dir: Path, rows: Table, columns: int, scale: int) -> Image.Image:
    """Put the first `columns` images of every user side by side, a row of the picture per user.

    An image that cannot be read is crossed out.
    """
    users = [rows.of_user(user_id, columns) for user_id in rows.user_ids]
    pictures = [[_enlarged(output_dir, row, scale) for row in user] for user in users]
    width = _GAP + max(sum(picture.width + _GAP for picture in line) for line in pictures)
    height = _GAP + sum(max(picture.height for picture in line) + _GAP for line in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    top = _GAP
    for line in pictures:
        left = _GAP
        for picture in line:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
        top += max(picture.height for picture in line) + _GAP
    return sheet


def _enlarged(output_dir: Path, row: Row, scale: int) -> Image.Image:
    try:
        with Image.open(output_dir / row.file_name, formats=["PNG"]) as picture:
            return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    except Exception:  # Pillow has many words for a broken PNG
        return _crossed_out(row.width * scale, row.height * scale)


def _crossed_out(width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), "lightgray")
    draw = ImageDraw.Draw(picture)
    draw.line((0, 0, width - 1, height - 1), "gray")
    draw.line((0, height - 1, width - 1, 0), "gray")
    return picture
