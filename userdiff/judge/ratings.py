"""What a judge says of every image of a dataset."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from userdiff.conditions import Condition, as_written, check_names
from userdiff.config import DEFAULT_BATCH_SIZE, errors_of
from userdiff.dataset.png import open_image
from userdiff.dataset.rows import Row
from userdiff.dataset.run_record import RunRecord
from userdiff.dataset.scan import Track, listed_rows, read_all, untracked
from userdiff.diffusion.conditioning import read_user_map
from userdiff.judge.scores import Judge, Scores, load_judge
from userdiff.seeds import slots

MAX_CLASSES = 2**31


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """The scores of a dataset's images."""

    names: tuple[str, ...]
    """Of the scores."""
    user_ids: NDArray[np.int64]
    """[images], ascending."""
    table: NDArray[np.float64]
    """[images, names], as files have them (`as_written`); NaN where the judge could not tell."""
    predicted: NDArray[np.int64] | None
    """[images] the most probable class; None where the judge names no classes."""
    unread: list[str]
    """Names of images that cannot be read, or are of another size than the first."""


def rate_with(
    output_dir: Path, source: str, classes_path: Path | None, conditions: Sequence[Condition], track: Track = untracked
) -> tuple[Ratings, Mapping[int, int], int]:
    """Load a judge and have it look at a dataset; returns also user id -> class, and how many images a user was to have.

    A user's class is the row of the embedding unless `classes_path`, a JSON file, says otherwise. Raises UsageError naming
    the flag of what is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = RunRecord.read(output_dir)
    batch_size = (record.numerics if record else {}).get("batch_size", DEFAULT_BATCH_SIZE[device.type])
    with errors_of("--judge_classes"):
        if classes_path:
            classes = read_user_map(classes_path, MAX_CLASSES, what="a class of the judge")
        elif record:
            classes = {int(user_id): row for user_id, row in record.identity["user_index"].items()}
        else:
            raise ValueError(f"missing; {output_dir} has no record that tells the row of a user")
    with errors_of("--judge"):
        judge = load_judge(source, device, classes)
        ratings = rate(output_dir, judge, device, batch_size, track)
    with errors_of("--accept"):
        check_names(conditions, ratings.names)
    return ratings, classes, record.last.num_images_per_user if record and record.last else len(ratings.table)


class _Picture(NamedTuple):
    row: Row
    pixels: NDArray[np.uint8] | None
    """[height, width, channels]"""


def rate(output_dir: Path, judge: Judge, device: torch.device, batch_size: int, track: Track = untracked) -> Ratings:
    """Have a judge look at all images of a manifest.

    Batches have `batch_size` rows, and each image the slot that it was generated in, so that the judge's last bits are
    those of a job. Raises ValueError where there are no images, and where the judge fails.
    """
    rows = listed_rows(output_dir)
    pictures = track(read_all(partial(_read, output_dir), rows), len(rows))
    unread: list[str] = []
    rated: list[tuple[list[Row], Scores]] = []
    for batch in _batches(pictures, batch_size, unread):
        present = {place: picture.row for place, picture in enumerate(batch) if picture}
        some_user = next(iter(present.values())).user_id  # stands for that of an empty slot
        scores = judge(_stack(batch, device), [picture.row.user_id if picture else some_user for picture in batch])
        places = list(present)
        predicted = None if scores.predicted is None else scores.predicted[places].cpu()
        found = Scores(names=scores.names, table=scores.table[places].cpu(), predicted=predicted)
        rated.append((list(present.values()), found))
    if not rated:
        raise ValueError(f"{output_dir}: none of {len(rows)} images can be read, the first is {unread[0]}")
    return _joined(rated, unread)


def _read(output_dir: Path, row: Row) -> _Picture:
    try:
        with open_image(output_dir / row.file_name) as image:
            pixels = np.asarray(image)
    except Exception:  # Pillow has many words for a broken image
        return _Picture(row, None)
    return _Picture(row, pixels[:, :, None] if pixels.ndim == 2 else pixels)


def _batches(pictures: Iterable[_Picture], batch_size: int, unread: list[str]) -> Iterator[list[_Picture | None]]:
    """Yield batches of `batch_size` slots, None where one is empty; names what cannot be among them in `unread`."""
    shape: tuple[int, ...] | None = None
    batch: list[_Picture | None] = [None] * batch_size
    for picture in pictures:
        if (
            picture.pixels is None
            or picture.pixels.dtype != np.uint8
            or picture.pixels.shape != (shape or picture.pixels.shape)
        ):
            unread.append(picture.row.file_name)
            continue
        shape = picture.pixels.shape
        slot = int(slots(np.array([picture.row.user_id]), np.array([picture.row.image_index]), batch_size)[0])
        if batch[slot] is not None:
            yield batch
            batch = [None] * batch_size
        batch[slot] = picture
    if any(batch):
        yield batch


def _stack(batch: Sequence[_Picture | None], device: torch.device) -> Tensor:
    """Return the pixels of a batch, [batch, height, width, channels] uint8; an empty slot is black."""
    pixels = [picture.pixels for picture in batch if picture is not None and picture.pixels is not None]
    black = np.zeros_like(pixels[0])
    found = [black if picture is None or picture.pixels is None else picture.pixels for picture in batch]
    return torch.from_numpy(np.stack(found)).to(device)


def _joined(rated: Sequence[tuple[Sequence[Row], Scores]], unread: list[str]) -> Ratings:
    names = rated[0][1].names
    if other := next((scores.names for _, scores in rated if scores.names != names), None):
        raise ValueError(f"the judge returns the scores {other} after {names}, needed: the same for every batch")
    rows = [row for some, _ in rated for row in some]
    order = np.lexsort(([row.image_index for row in rows], [row.user_id for row in rows]))
    table = torch.cat([scores.table for _, scores in rated]).numpy()
    predicted = [scores.predicted for _, scores in rated if scores.predicted is not None]
    return Ratings(
        names=names,
        user_ids=np.array([row.user_id for row in rows])[order],
        table=np.vectorize(lambda score: float(as_written(score)), otypes=[float])(table)[order],
        predicted=torch.cat(predicted).numpy()[order] if predicted else None,
        unread=unread,
    )
