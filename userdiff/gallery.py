"""`preview.html`: a page that shows a dataset at a glance; and the same as one picture."""

import html
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from userdiff.images import publish
from userdiff.manifest import Row

PREVIEW_NAME = "preview.html"
IMAGES_SHOWN = 20  # of each user: a page that opens at once, however large the dataset

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


def write_preview(output_dir: Path, rows: Sequence[Row]) -> None:
    """Write `preview.html`: the first images of every user, in the order of the manifest."""
    users = "\n".join(_user_section(user_id, list(group)) for user_id, group in groupby(rows, lambda row: row.user_id))
    title = html.escape(f"{output_dir.resolve().name}: {len(rows)} images")
    publish(output_dir / PREVIEW_NAME, _PAGE.format(title=title, users=users).encode())


def _user_section(user_id: int, rows: Sequence[Row]) -> str:
    shown = rows[:IMAGES_SHOWN]
    tags = "".join(
        f'<img src="{row.file_name}" title="{row.file_name}, seed {row.seed}" loading="lazy">' for row in shown
    )
    count = f"{len(rows)} images" if len(shown) == len(rows) else f"first {len(shown)} of {len(rows)} images"
    return f"<h2>user {user_id}, {count}</h2>\n<div>{tags}</div>"


def contact_sheet(pictures: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Lay pictures of one size out row by row on white, each enlarged `scale` times without smoothing."""
    width, height = pictures[0].width * scale + gap, pictures[0].height * scale + gap
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        enlarged = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (column * width + gap, row * height + gap))
    return sheet
