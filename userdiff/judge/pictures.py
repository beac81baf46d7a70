"""Images on their way to a network: read ahead by threads, and put into batches of one shape."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from userdiff.config import DEFAULT_BATCH_SIZE
from userdiff.dataset.png import open_image
from userdiff.dataset.rows import Row
from userdiff.dataset.run_record import RunRecord
from userdiff.dataset.scan import Track, listed_rows, read_all
from userdiff.seeds import slots

Shape = tuple[int, int, int]
"""Height, width and channels of an image."""
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> how Pillow calls such images


class Picture(NamedTuple):
    """An image that could be read, and whose it is."""

    name: str
    user_id: int
    image_index: int
    pixels: NDArray[np.uint8]
    """[height, width, channels]"""


class Batch(NamedTuple):
    """Images that a network looks at together."""

    slots: list[Picture | None]
    """[batch], None where a slot is empty: a black image of some user of the batch stands there."""

    @property
    def present(self) -> dict[int, Picture]:
        """The images: slot -> image."""
        return {slot: picture for slot, picture in enumerate(self.slots) if picture is not None}

    @property
    def user_ids(self) -> list[int]:
        """The user of each slot."""
        some = next(iter(self.present.values())).user_id
        return [picture.user_id if picture else some for picture in self.slots]

    def to(self, device: torch.device) -> Tensor:
        """Return the pixels on a device: [batch, height, width, channels] uint8."""
        black = np.zeros_like(next(iter(self.present.values())).pixels)
        return torch.from_numpy(np.stack([picture.pixels if picture else black for picture in self.slots])).to(device)


def batch_size_of(output_dir: Path, device: torch.device) -> int:
    """Return the batch size that a dataset began with; where no record tells, the default of this kind of device."""
    record = RunRecord.read(output_dir)
    batch_size: int = (record.numerics if record else {}).get("batch_size", DEFAULT_BATCH_SIZE[device.type])
    return batch_size


def dataset_batches(output_dir: Path, batch_size: int, unread: list[str], track: Track) -> Iterator[Batch]:
    """Yield all images of a dataset's manifest in batches, each in the slot that it was generated in.

    So a network's last bits are those of a job. Names of images that cannot be read, or are of another size than the first,
    are added to `unread`. Raises ValueError where there are no others.
    """
    rows = listed_rows(output_dir)
    read = track(read_all(partial(_read_row, output_dir), rows), len(rows))
    yield from _batches(read, batch_size, unread)
    if len(unread) == len(rows):
        raise ValueError(f"{output_dir}: none of {len(rows)} images can be read, the first is {unread[0]}")


def file_batches(
    files: Sequence[tuple[int, Path]], shape: Shape, batch_size: int, unread: list[str], track: Track
) -> Iterator[Batch]:
    """Yield images from anywhere, (user id, path), in batches, brought to one shape as Pillow resizes them (bicubic)."""
    read = track(read_all(partial(_read_file, shape=shape), enumerate(files)), len(files))
    yield from _batches(read, batch_size, unread)


def _read_row(output_dir: Path, row: Row) -> Picture | str:
    """Read an image of a dataset; returns its name where it cannot be read."""
    try:
        with open_image(output_dir / row.file_name) as image:
            pixels = np.asarray(image)
    except Exception:  # Pillow has many words for a broken image
        return row.file_name
    if pixels.dtype != np.uint8:
        return row.file_name
    return Picture(row.file_name, row.user_id, row.image_index, pixels[:, :, None] if pixels.ndim == 2 else pixels)


def _read_file(numbered: tuple[int, tuple[int, Path]], shape: Shape) -> Picture | str:
    number, (user_id, path) = numbered
    height, width, channels = shape
    try:
        with open_image(path, _FORMATS) as image:
            image = image.convert(_MODES[channels])  # noqa: PLW2901 - the same image
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BICUBIC)  # noqa: PLW2901
            pixels = np.asarray(image)
    except Exception:  # as above
        return str(path)
    return Picture(str(path), user_id, number, pixels.reshape(shape))


def _batches(pictures: Iterable[Picture | str], batch_size: int, unread: list[str]) -> Iterator[Batch]:
    shape: tuple[int, ...] | None = None
    batch = Batch([None] * batch_size)
    for picture in pictures:
        if isinstance(picture, str) or picture.pixels.shape != (shape or picture.pixels.shape):
            unread.append(picture if isinstance(picture, str) else picture.name)
            continue
        shape = picture.pixels.shape
        slot = int(slots(np.array([picture.user_id]), np.array([picture.image_index]), batch_size)[0])
        if batch.slots[slot] is not None:
            yield batch
            batch = Batch([None] * batch_size)
        batch.slots[slot] = picture
    if any(batch.slots):
        yield batch
