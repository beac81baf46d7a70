"""One process's loop: claim a batch, compute it, and hand its images to a bounded pool that encodes and writes them."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, takewhile
from threading import BoundedSemaphore
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from userdiff.config import JobConfig
from userdiff.dataset import layout, locks
from userdiff.dataset.atomic import publish
from userdiff.dataset.manifest import PartWriter
from userdiff.dataset.png import encode_png, is_flat
from userdiff.dataset.recipe import Recipe
from userdiff.diffusion import generate, gpu_errors
from userdiff.diffusion.model import JobModel
from userdiff.job import console
from userdiff.job.plan import PADDING, Plan
from userdiff.job.store import Coordinator
from userdiff.seeds import Item
from userdiff.shutdown import Halted

WRITER_THREADS = 4
PENDING_BATCHES = 2  # to be encoded and written while the next one computes; more would only hold memory
DRAIN_SECONDS = 5.0  # for what is computed to be written, when a job ends early
_POLL_SECONDS = 0.1  # how often a wait for the writers looks whether the job is to end


def make_images(
    config: JobConfig,
    model: JobModel,
    plan: Plan,
    coordinator: Coordinator,
    *,
    compress_level: int,
    on_step: Callable[[], None],
) -> None:
    """Claim batches of a wave until none is left; compute each, encode its images and publish them.

    However this ends, what was computed is written and noted first. `on_step` is called before every UNet pass and
    while waiting for a GPU; what it raises ends the loop.
    """
    with locks.writing(config.output_dir):  # first: whoever has a batch keeps any later job from starting
        claimed = takewhile(lambda number: number < len(plan.batches), iter(coordinator.next_batch, None))
        first = next(claimed, None)
        # Who comes late, or wakes late, must leave no part behind: the main process may have merged already.
        if first is not None and not coordinator.has_ended():
            _make_claimed(config, model, plan, coordinator, chain([first], claimed), compress_level, on_step)


def _make_claimed(
    config: JobConfig,
    model: JobModel,
    plan: Plan,
    coordinator: Coordinator,
    claimed: Iterable[int],
    compress_level: int,
    on_step: Callable[[], None],
) -> None:
    recipe = Recipe.of(model.identity, model.run)
    part = PartWriter(layout.part_path(config.output_dir, coordinator.part_number))
    pool = WriterPool(WRITER_THREADS, PENDING_BATCHES * plan.batch_size, on_wait=coordinator.check)
    with part, pool as writers:

        def save(item: Item, pixels: NDArray[np.uint8]) -> None:
            png = encode_png(pixels, recipe.text_chunks(*item), compress_level)
            # The image first, then its row: whatever a row names is there.
            publish(config.output_dir / layout.file_name(*item), png)
            part.append(recipe.row(*item, size=(pixels.shape[1], pixels.shape[0]), png=png))
            coordinator.count_published(1, num_bytes=len(png))
            if is_flat(pixels):
                coordinator.report("flat", item)

        for num_before, (number, batch) in enumerate(_batches(config, model, plan, claimed, on_step)):
            if number == 0 and batch.contradicts_range and coordinator.is_first("range"):
                chosen, other = config.vae_output_range, {"unit": "signed", "signed": "unit"}[config.vae_output_range]
                console.warn(
                    f"the decoded images contradict --vae_output_range {chosen}; --vae_output_range {other} may be right"
                )
            if num_before == 0:
                _look_at_memory(model, plan, coordinator)
            for item, pixels in batch.images():
                if pixels is None:
                    coordinator.report("failed", item)
                else:
                    writers.submit(partial(save, item, pixels))


def _look_at_memory(model: JobModel, plan: Plan, coordinator: Coordinator) -> None:
    """Warn where a batch leaves too little of a GPU's memory; once a job, for the first GPU where that is so."""
    free, needed = gpu_errors.free_memory(model.device), gpu_errors.HEADROOM
    if free is not None and free < needed and coordinator.is_first("memory"):
        console.warn(
            f"batches of {plan.batch_size} leave {console.format_bytes(free)} of the GPU's memory free in "
            f"{coordinator.name}; with less than {console.format_bytes(needed)} last bits may depend on what else is there, a "
            "smaller --batch_size leaves more"
        )


def _batches(
    config: JobConfig, model: JobModel, plan: Plan, claimed: Iterable[int], on_step: Callable[[], None]
) -> Iterator[tuple[int, generate.Batch]]:
    """Compute the batches that are claimed, and yield (number, batch) as soon as the images of one are on the host.

    A GPU computes the next batch while one is yielded, so at most two are under way.
    """
    under_way: deque[tuple[int, generate.Batch]] = deque()
    try:
        for number in claimed:
            items = [None if row == PADDING else plan.item(row) for row in plan.batches[number]]
            under_way.append((number, generate.start(config, model, items, on_step)))
            if len(under_way) > 1:
                under_way[0][1].wait(on_step)
            while under_way and under_way[0][1].is_there():
                yield under_way.popleft()
        for number, batch in under_way:
            batch.wait(on_step)
            yield number, batch
    except Halted:
        yield from (numbered for numbered in under_way if numbered[1].is_there())
        raise


class WriterPool:
    """A bounded pool of writer threads; `submit` and leaving the `with` block raise the first error of a task.

    At most `max_pending` tasks wait or are under way; `submit` blocks while there are as many, so that memory stays flat
    when the disk is slower than the model. Leaving the block waits for all of them; leaving it by an exception waits
    DRAIN_SECONDS at most for those that have not begun. Either wait calls `on_wait`, and ends by what that raises.
    """

    def __init__(self, num_threads: int, max_pending: int, on_wait: Callable[[], None] = lambda: None) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="writer")
        self._max_pending = max_pending
        self._free = BoundedSemaphore(max_pending)
        self._on_wait = on_wait
        self._errors: list[BaseException] = []  # appended to by any thread; the first one counts

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task for a writer thread; once a task has failed, raises its error instead."""
        while not self._free.acquire(timeout=_POLL_SECONDS):
            self._on_wait()
        if self._errors:
            self._free.release()
            raise self._errors[0]
        try:
            future = self._executor.submit(task)
        except RuntimeError:  # the system starts no more threads
            self._free.release()
            raise
        future.add_done_callback(self._finished)

    def _wait_until_done(self, deadline: float, on_wait: Callable[[], None]) -> None:
        """Wait until no task waits or is under way, calling `on_wait` meanwhile, but not beyond the deadline."""
        num_taken = 0  # each task gives its place back when it is done
        try:
            while num_taken < self._max_pending and time.monotonic() < deadline:
                if self._free.acquire(timeout=_POLL_SECONDS):
                    num_taken += 1
                else:
                    on_wait()
        finally:
            for _ in range(num_taken):
                self._free.release()

    def _finished(self, future: "Future[object]") -> None:
        if not future.cancelled() and (error := future.exception()):
            self._errors.append(error)
        self._free.release()

    def __enter__(self) -> "WriterPool":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait_until_done(math.inf, self._on_wait)
        except BaseException as reason:
            error = reason
            raise
        finally:
            if error is not None:
                self._wait_until_done(time.monotonic() + DRAIN_SECONDS, lambda: None)
            self._executor.shutdown(wait=True, cancel_futures=error is not None)
        if self._errors and error is None:
            raise self._errors[0]
