"""What a judge says of every image of a dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from userdiff.conditions import Condition, as_written, conditions_on
from userdiff.config import errors_of
from userdiff.dataset.run_record import RunRecord
from userdiff.dataset.scan import Track, untracked
from userdiff.diffusion.conditioning import read_user_map
from userdiff.judge.pictures import batch_size_of, dataset_batches
from userdiff.judge.scores import Judge, Scores, is_function, load_judge
from userdiff.seeds import Item

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
    conditions: tuple[Condition, ...]
    """What an image has to meet to be accepted."""


def rate_with(
    output_dir: Path,
    source: str,
    classes_path: Path | None,
    conditions: tuple[Condition, ...] = (),
    track: Track = untracked,
) -> tuple[Ratings, Mapping[int, int], int]:
    """Load a judge and have it look at a dataset; returns also user id -> class, and how many images a user was to have.

    A user's class is the row of the embedding unless `classes_path`, a JSON file, says otherwise. Raises UsageError naming
    the flag of what is wrong.
    """
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} holds no dataset: there is no such folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = RunRecord.read(output_dir)
    with errors_of("--judge_classes"):
        if classes_path:
            classes = read_user_map(classes_path, MAX_CLASSES, what="a class of the judge")
        elif is_function(source):
            classes = {}
        elif record:
            classes = {int(user_id): row for user_id, row in record.identity["user_index"].items()}
        else:
            raise ValueError(f"missing; {output_dir} has no record that tells the row of a user")
    with errors_of("--judge"):
        judge = load_judge(source, device, classes)
        ratings = rate(output_dir, judge, device, conditions, track)
    return ratings, classes, record.last.num_images_per_user if record and record.last else len(ratings.table)


def rate(
    output_dir: Path,
    judge: Judge,
    device: torch.device,
    conditions: tuple[Condition, ...] = (),
    track: Track = untracked,
) -> Ratings:
    """Have a judge look at all images of a manifest; raises ValueError where there are none, and where the judge fails.

    Raises UsageError for conditions on other scores than the judge gives, after the first batch.
    """
    unread: list[str] = []
    rated: list[tuple[list[Item], Scores]] = []
    for batch in dataset_batches(output_dir, batch_size_of(output_dir, device), unread, track):
        present, scores = batch.present, judge(batch.to(device), batch.user_ids)
        if not rated:
            with errors_of("--accept"):
                conditions = conditions_on(scores.names, conditions)
        slots = list(present)
        predicted = None if scores.predicted is None else scores.predicted[slots].cpu()
        items = [(picture.user_id, picture.image_index) for picture in present.values()]
        rated.append((items, Scores(names=scores.names, table=scores.table[slots].cpu(), predicted=predicted)))
    return _joined(rated, unread, conditions)


def _joined(
    rated: Sequence[tuple[list[Item], Scores]], unread: list[str], conditions: tuple[Condition, ...]
) -> Ratings:
    names = rated[0][1].names
    if other := next((scores.names for _, scores in rated if scores.names != names), None):
        raise ValueError(f"the judge returns the scores {other} after {names}, needed: the same for every batch")
    user_ids, image_indices = np.array([item for items, _ in rated for item in items]).T
    order = np.lexsort((image_indices, user_ids))
    table = torch.cat([scores.table for _, scores in rated]).numpy()
    predicted = [scores.predicted for _, scores in rated if scores.predicted is not None]
    return Ratings(
        names=names,
        user_ids=user_ids[order],
        table=np.vectorize(lambda score: float(as_written(score)), otypes=[float])(table)[order],
        predicted=torch.cat(predicted).numpy()[order] if predicted else None,
        unread=unread,
        conditions=conditions,
    )
