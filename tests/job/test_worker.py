"""The bounded pool of writers."""

import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from tests.checkpoints import model_flags
from userdiff.config import parse_args
from userdiff.dataset import locks
from userdiff.job import worker
from userdiff.job.plan import make_plan
from userdiff.job.worker import WriterPool
from userdiff.shutdown import Shutdown, Stopped

PATIENCE = 10  # seconds until a test gives up on another thread; none waits that long when all is well


@pytest.mark.parametrize(("num_threads", "max_pending"), [(1, 1), (4, 2), (2, 4), (8, 8)])
def test_many_submitters_get_every_task_done_once(num_threads, max_pending):
    done = []

    def submit_all(first):
        for number in range(first, first + 50):
            pool.submit(lambda number=number: done.append(number))

    with WriterPool(num_threads, max_pending) as pool, ThreadPoolExecutor(4) as submitters:
        list(submitters.map(submit_all, range(0, 200, 50)))
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_tasks_run_on_as_many_threads_as_were_asked_for_and_leaving_waits_for_all(num_threads):
    gate, started, threads = threading.Event(), threading.Semaphore(0), []

    def task():
        started.release()
        assert gate.wait(PATIENCE)
        threads.append(threading.get_ident())

    with WriterPool(num_threads, max_pending=6) as pool:
        for _ in range(6):
            pool.submit(task)
        assert all(started.acquire(timeout=PATIENCE) for _ in range(num_threads))  # while none of them can end
        threading.Timer(0.05, gate.set).start()  # while the pool is being left
    assert len(threads) == 6
    assert len(set(threads)) == num_threads


@pytest.mark.parametrize(("num_threads", "max_pending"), [(2, 3), (4, 1)])
def test_submitting_blocks_while_enough_is_pending(num_threads, max_pending):
    gate, one_more_is_in = threading.Event(), threading.Event()

    def submit_one_more():
        pool.submit(lambda: None)
        one_more_is_in.set()

    with WriterPool(num_threads, max_pending) as pool:
        for _ in range(max_pending):
            pool.submit(lambda: gate.wait(PATIENCE))
        submitter = threading.Thread(target=submit_one_more)
        submitter.start()
        assert not one_more_is_in.wait(0.1)
        gate.set()
        assert one_more_is_in.wait(PATIENCE)
        submitter.join(PATIENCE)


def test_a_task_for_which_no_thread_can_be_started_is_not_waited_for(monkeypatch):
    def use():
        with suppress(RuntimeError), WriterPool(1, 2) as pool:
            monkeypatch.setattr(pool._executor, "_adjust_thread_count", refuse)
            pool.submit(lambda: None)

    def refuse():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker, "DRAIN_SECONDS", float("inf"))
    user = threading.Thread(target=use, daemon=True)
    user.start()
    user.join(PATIENCE)
    assert not user.is_alive()


def failing(error, cause=None):
    def task():
        raise error from cause

    return task


def run_pool(body, num_threads, max_pending):
    with WriterPool(num_threads, max_pending) as pool:
        body(pool)


def test_the_first_failure_is_raised_at_the_end_with_its_cause():
    gate, error, cause = threading.Event(), OSError("disk full"), ValueError("quota")

    def body(pool):
        pool.submit(lambda: gate.wait(PATIENCE))
        pool.submit(failing(error, cause))
        pool.submit(failing(OSError("second")))
        gate.set()

    with pytest.raises(OSError, match="disk full") as raised:
        run_pool(body, num_threads=1, max_pending=3)
    assert raised.value is error
    assert raised.value.__cause__ is cause


@pytest.mark.parametrize("fails_late", [False, True])
def test_after_a_failure_submitting_raises_it_and_runs_nothing_more(fails_late):
    """The first of these submits waits, and hears of the failure while it does."""
    gate, error, heard, ran = threading.Event(), OSError("disk full"), [], []

    def fail():
        assert gate.wait(PATIENCE)
        raise error

    def submit_more(pool):
        for _ in range(5):
            with pytest.raises(OSError, match="disk full") as raised:
                pool.submit(lambda: ran.append(1))
            heard.append(raised.value)

    def body(pool):
        pool.submit(fail)
        if not fails_late:
            gate.set()
        submitter = threading.Thread(target=submit_more, args=(pool,), daemon=True)
        submitter.start()
        gate.set()
        submitter.join(PATIENCE)

    with pytest.raises(OSError, match="disk full"):
        run_pool(body, num_threads=1, max_pending=1)
    assert heard == 5 * [error]
    assert ran == []


def test_a_task_that_succeeds_at_the_same_moment_does_not_hide_a_failure(monkeypatch):
    """The end of a good task is held up until the failure of another is known, then goes on."""
    both_are_in, good_is_ending, failure_is_known = threading.Event(), threading.Event(), threading.Event()
    exception_of = Future.exception

    def slow_exception(future, timeout=None):
        error = exception_of(future, timeout)
        if error is None:
            good_is_ending.set()
            failure_is_known.wait(0.5)
        return error

    def fail():
        assert both_are_in.wait(PATIENCE)
        good_is_ending.wait(0.5)
        raise OSError("disk full")

    def body(pool):
        pool.submit(lambda: both_are_in.wait(PATIENCE))
        pool.submit(fail)
        both_are_in.set()
        with suppress(OSError):
            pool.submit(lambda: None)  # waits for a place, which the failed task gives back
        failure_is_known.set()

    monkeypatch.setattr(Future, "exception", slow_exception)
    with pytest.raises(OSError, match="disk full"):
        run_pool(body, num_threads=2, max_pending=2)


@pytest.mark.parametrize("task_fails", [False, True])
def test_an_error_of_the_body_is_not_masked_and_what_was_submitted_is_done_first(task_fails):
    gate, done, mistake = threading.Event(), [], KeyError("body")

    def task():
        assert gate.wait(PATIENCE)
        done.append("written")
        if task_fails:
            raise OSError("disk full")

    def body(pool):
        pool.submit(task)
        threading.Timer(0.05, gate.set).start()  # while the pool is being left
        raise mistake

    with pytest.raises(KeyError) as raised:
        run_pool(body, num_threads=1, max_pending=2)
    assert raised.value is mistake
    assert done == ["written"]


def test_images_still_pending_do_not_hold_up_a_stop(monkeypatch):
    monkeypatch.setattr(worker, "DRAIN_SECONDS", 0.3)
    written = []
    gate = threading.Event()
    with pytest.raises(Stopped), WriterPool(1, 8) as writers:  # noqa: PT012 - the pool is what is tested
        writers.submit(lambda: written.append("the one that is quick"))
        writers.submit(lambda: gate.wait(1) or written.append("the one under way"))
        for _ in range(5):
            writers.submit(lambda: written.append("one of those that wait"))
        raise Stopped(signal.SIGTERM)
    assert written == ["the one that is quick", "the one under way"]


@pytest.mark.parametrize("where", ["submitting", "leaving"])
def test_a_stop_is_heard_by_whoever_waits_for_a_slow_disk(monkeypatch, where):
    """A whole batch is handed over at once: of 64 images, a disk that takes a second for each had made none."""
    monkeypatch.setattr(worker, "DRAIN_SECONDS", 0.1)
    shutdown, gate, written = Shutdown(), threading.Event(), []

    def write():
        assert gate.wait(PATIENCE)
        written.append("an image")

    def stop():
        shutdown.set(Stopped(signal.SIGTERM))
        threading.Timer(0.5, gate.set).start()

    with pytest.raises(Stopped), WriterPool(2, 4, on_wait=shutdown.check) as pool:  # noqa: PT012 - the pool is what is tested
        for _ in range(4):
            pool.submit(write)
        threading.Timer(0.2, stop).start()
        if where == "submitting":
            pool.submit(write)
    assert len(written) == 2  # those under way


def test_the_folder_is_held_before_a_batch_is_claimed(tmp_path, checkpoint):
    """Else a process that is suspended in between would write into the next job's dataset."""
    config = parse_args([*model_flags(checkpoint), "--output_dir", str(tmp_path)])
    held = []

    def next_batch():
        with pytest.raises(ValueError, match="open for writing"):
            locks.wait_for_writers(tmp_path, seconds=0)
        held.append(True)
        return 99

    coordinator = SimpleNamespace(next_batch=next_batch, part_number=1, check=lambda: None)
    plan = make_plan([1], 3, 4)
    worker.make_images(config, None, plan, coordinator, compress_level=6, on_step=lambda: None)
    assert held == [True]
    assert not list(tmp_path.iterdir())
