"""`preview.html`: a page that shows a dataset at a glance; and the same as one picture."""

import html
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from userdiff.manifest import Row

PREVIEW_NAME = "preview.html"
IMAGES_SHOWN = 20  # of each user: a page that opens at once, however large the dataset

_GAP = 4  # pixels between the images of a picture

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222 }}
h2 {{ font-size: 1rem; margin: 1.2rem 0 .3rem }}
img {{ width: 96px; margin: 0 4px 4px 0; image-rendering: pixelated }}
</style>
<h1>{title}</h1>
{users}
</html>
"""


def preview_page(name: str, rows: Sequence[Row]) -> str:
    """Make the page of a dataset called `name`: the first images of every user, in the order of the manifest."""
    users = "\n".join(_user_section(user_id, list(group)) for user_id, group in groupby(rows, lambda row: row.user_id))
    return _PAGE.format(title=html.escape(f"{name}: {len(rows)} images"), users=users)


def _user_section(user_id: int, rows: Sequence[Row]) -> str:
    shown = rows[:IMAGES_SHOWN]
    tags = "".join(
        f'<img src="{row.file_name}" title="{row.file_name}, seed {row.seed}" loading="lazy">' for row in shown
    )
    count = f"{len(rows)} images" if len(shown) == len(rows) else f"first {len(shown)} of {len(rows)} images"
    return f"<h2>user {user_id}, {count}</h2>\n<div>{tags}</div>"


def contact_sheet(output_dir: Path, rows: Sequence[Row], columns: int, scale: int) -> Image.Image:
    """Put the first `columns` images of every user side by side, a row of the picture per user."""
    users = [list(group)[:columns] for _, group in groupby(rows, lambda row: row.user_id)]
    pictures = [[_enlarged(output_dir / row.file_name, scale) for row in user] for user in users]
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


def _enlarged(path: Path, scale: int) -> Image.Image:
    with Image.open(path) as picture:
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
