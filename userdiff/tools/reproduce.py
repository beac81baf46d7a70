"""One image of a dataset, made again: what a notebook calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from userdiff.config import MAX_IMAGES_PER_USER, JobConfig
from userdiff.dataset.png import encode_png
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.run_record import RunRecord
from userdiff.diffusion import generate
from userdiff.diffusion.model import JobModel, check_config
from userdiff.identity import describe_differences
from userdiff.seeds import Item, slots
from userdiff.text import format_ids


def make_image(config: JobConfig, model: JobModel, user_id: int, image_index: int) -> bytes:
    """Make one image as the job would, and return the bytes of its PNG file, text chunks included.

    config, model: `parse_args` of the job's flags, and `load_model` of that. Batch size and compression are those of the
    flags, else those that the folder `--output_dir` began with; the rest of the batch is padding, so this takes as long as
    a whole batch. The bytes are the same where what `numerics` in `run.json` notes is the same: on a CPU, call
    `torch.set_num_threads` with its `threads_per_process` first.

    Raises ValueError for a user the model does not have, an image_index below 0 or above 2^32 - 1, a folder whose images
    were made with another model or other settings, a model that was loaded with other settings than `config`, and an image that is not finite; Failed where the batch does not fit
    into memory. Leaves the global generators and torch's settings as they were.
    """
    if user_id not in model.user_index:
        raise ValueError(f"user_id: {user_id!r} is unknown, this model has users {format_ids(model.user_index)}")
    if not 0 <= image_index < MAX_IMAGES_PER_USER:
        raise ValueError(f"image_index: {image_index!r} is out of range, needed: 0 to {MAX_IMAGES_PER_USER - 1}")
    check_config(model, config)
    item = (int(user_id), int(image_index))  # of a table they may be numpy's
    batch_size, compress_level = _of_folder(config, model)
    with _job_kernels(config.allow_tf32):
        batch = generate.start(config, model, _batch_of(item, batch_size))
        batch.wait()
    ((_, pixels),) = batch.images()
    if pixels is None:
        raise ValueError(f"image {image_index} of user {user_id} is not finite, the job saves none such")
    return encode_png(pixels, Recipe.of(model.identity, model.run).text_chunks(*item), compress_level)


def _of_folder(config: JobConfig, model: JobModel) -> tuple[int, int]:
    """Return the batch size and the level of compression: the flags', else the folder's, else those of a new one."""
    record = RunRecord.read(config.output_dir)
    if record and record.run != model.run:
        changed = describe_differences(record.identity, model.identity)
        raise ValueError(f"--output_dir: {config.output_dir} holds images made otherwise ({changed})")
    return config.batch_size_and_level(record.numerics if record else {}, model.device.type)


def _batch_of(item: Item, batch_size: int) -> list[Item | None]:
    """Return a batch with one image in its slot, among padding."""
    user_id, image_index = (np.array([number], dtype=np.int64) for number in item)
    batch: list[Item | None] = [None] * batch_size
    batch[int(slots(user_id, image_index, batch_size)[0])] = item
    return batch


@contextmanager
def _job_kernels(allow_tf32: bool) -> Iterator[None]:
    """Fix, within this block, what chooses between kernels, as a job does."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allow_tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=allow_tf32):
            yield
    finally:
        matmul.allow_tf32 = before
