import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import DistError, HashStore

from tests.jobs import wait_for
from userdiff.config import UsageError
from userdiff.job import launcher, store, store_client
from userdiff.job.store import Coordinator
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped


@pytest.fixture
def processes():
    """Make any number of processes of one job, closed at the end."""
    made: list[Coordinator] = []

    def make(number, shared=None):
        shared = shared or HashStore()
        new = [Coordinator(lambda: shared, process_index, number) for process_index in range(number)]
        made.extend(new)
        return new

    yield make
    for coordinator in made:
        coordinator.__exit__(None, None, None)


@pytest.fixture
def quick_pulse(monkeypatch):
    monkeypatch.setattr(store_client, "PULSE_SECONDS", 0.05)


@pytest.fixture
def impatient(quick_pulse, monkeypatch):
    """A process is given up after half a second."""
    monkeypatch.setattr(store_client, "LOST_AFTER_PULSES", 10)


def heard(coordinator, seconds=10):
    """What a process hears of the end of its job, sooner or later."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            coordinator.check()
        except Halted as reason:
            return reason
        time.sleep(0.01)
    raise AssertionError("heard nothing")


def test_every_batch_is_claimed_once(processes):
    def claim(coordinator):
        mine = [coordinator.next_batch() for _ in range(200)]
        assert mine == sorted(mine)
        return mine

    with ThreadPoolExecutor(8) as threads:
        claimed = [number for mine in threads.map(claim, processes(8)) for number in mine]
    assert sorted(claimed) == list(range(1600))


def test_the_plan_reaches_everyone_as_it_was(processes):
    main, *others = processes(3)
    plan = bytes(range(256)) * 3 + b"\n\n"
    threading.Timer(0.2, main.set, args=("plan", plan)).start()
    assert [other.wait_for("plan") for other in others] == [plan] * 2


def test_progress_and_failures_add_up(processes):
    main, other = processes(2)
    main.count_published(1, num_bytes=700)
    other.count_published(1, num_bytes=20)
    other.count_published(2, num_bytes=30)
    other.next_batch()
    assert main.published() == other.published() == (4, 750)
    main.report("failed", (2, 5))
    other.report("failed", (1, 9))
    other.report("flat", (1, 1))
    assert main.reported("failed") == other.reported("failed") == [(1, 9), (2, 5)]
    assert main.reported("flat") == [(1, 1)]


def test_counting_asks_nothing_of_the_store_and_loses_nothing(processes, quick_pulse):
    """It was two questions an image, for which the writers waited; now a process reports what it has made in between."""
    main, other = processes(2)
    ask, asked = other._client.ask, []
    other._client.ask = lambda operation: asked.append(operation) or ask(operation)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: [other.count_published(1, 7) for _ in range(500)], range(4)))
    assert not asked
    other.finish()
    assert main.published() == (2000, 14000)
    other.count_published(1, 1)
    wait_for(lambda: main.published() == (2001, 14001))  # with a pulse


# Ending


def test_the_first_reason_to_halt_is_the_one_that_counts(processes, quick_pulse):
    main, one, two = processes(3)
    one.halt(OSError("the disk is full"))
    two.halt(ValueError("something that followed from it"))
    for coordinator in (main, one, two):
        reason = heard(coordinator)
        assert isinstance(reason, Failed)
        assert str(reason).startswith("process 1 on ")
        assert str(reason).endswith(": the disk is full")
    main, other = processes(2)
    main.halt(Failed("--output_dir: is a file", exit_status=2))
    assert heard(other).exit_status == 2  # else the launcher's report names whichever process happened to leave first


def test_a_process_that_leaves_by_an_exception_halts_the_others_and_counts_what_it_made(processes, quick_pulse):
    main, other = processes(2)
    other.count_published(3, num_bytes=50)
    with pytest.raises(ZeroDivisionError), other:
        raise ZeroDivisionError("by zero")
    assert int(main._add("published", 0)) == 3
    assert str(heard(main)).endswith("by zero")


def test_a_signal_to_one_stops_all(processes, quick_pulse):
    told, main = Shutdown(), None
    shared = HashStore()
    with Coordinator(lambda: shared, 1, 2, shutdown=told) as worker:
        (main, _) = processes(2, shared)
        main.check()
        told.set(Stopped(signal.SIGTERM))
        with pytest.raises(Stopped):
            worker.check()
        reason = heard(main)
    assert reason.signal_number == signal.SIGTERM
    assert reason.exit_status == 143
    assert str(reason) == "stopped by SIGTERM"


def test_waiting_ends_when_all_have_finished_or_one_fails(processes, quick_pulse):
    main, *others = processes(4)
    polls = []
    main.finish()
    for delay, other in enumerate(others):
        threading.Timer(0.1 * delay, other.finish).start()
    main.wait_for_all(on_poll=lambda: polls.append(None))
    assert polls
    main, other = processes(2)
    threading.Timer(0.2, other.halt, args=(Failed("gone"),)).start()
    main.finish()
    with pytest.raises(Failed, match="gone"):
        main.wait_for_all(on_poll=lambda: None)


def test_the_main_process_waits_for_the_others_to_leave_but_not_for_ever_nor_for_the_dead(processes, quick_pulse):
    main, other = processes(2)
    assert main.wait_until_left(0.3) == []
    other.__exit__(None, None, None)
    assert main.wait_until_left(600) == []
    main, dead = processes(2)
    time.sleep(0.2)
    dead._client.close()  # as SIGKILL would have it: without a word
    assert main.wait_until_left(600) == [f"process 1 on {socket.gethostname()}"]


# Signs of life


def test_a_process_without_a_sign_of_life_is_named_and_one_that_left_in_order_is_not_missed(processes, impatient):
    main, left, worker, dead = processes(4)
    left.finish()
    left.__exit__(None, None, None)
    dead._client.close()  # as SIGKILL would have it: without a word
    for coordinator in (main, worker):
        reason = heard(coordinator)
        assert isinstance(reason, Failed)
        assert str(reason).startswith("process 3 on ")
        assert str(reason).endswith("has given no sign of life for 0 s")


@pytest.mark.parametrize(("waiting", "missed"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("has_joined", [True, False])
def test_whoever_waits_says_once_for_whom(quick_pulse, waiting, missed, has_joined):
    shared, said = HashStore(), []
    if has_joined:
        dead = Coordinator(lambda: shared, missed, 2)
        dead._client.close()  # as SIGKILL would have it: without a word
    with Coordinator(lambda: shared, waiting, 2, say=said.append) as coordinator, ThreadPoolExecutor(1) as threads:
        threads.submit(coordinator.wait_for, "plan")
        wait_for(lambda: said, 20)
        time.sleep(0.3)
        coordinator.set("plan", "1")
    name = f"process {missed} on {socket.gethostname()}" if has_joined else f"process {missed}"
    what = (
        "gives no sign of life; given up after 3 s" if has_joined else "has not joined the job yet; given up after 30 s"
    )
    assert said == [f"waiting for {name}, which {what}"]


def test_a_store_that_does_not_answer_is_spoken_of_by_one_process_of_each_machine(impatient, monkeypatch):
    said, opened = [], threading.Event()
    for local_process_index in (0, 1):
        monkeypatch.setattr(launcher, "local_process_index", lambda index=local_process_index: index)
        with pytest.raises(Failed, match="lost contact"):
            Coordinator(lambda: opened.wait() and HashStore(), 1, 2, say=said.append)
    opened.set()
    assert said == [f"waiting for the launcher on {launcher.address()}, which does not answer; given up after 0 s"]


def test_workers_miss_a_main_process_that_died(processes, impatient):
    main, worker = processes(2)
    main._client.close()
    with pytest.raises(Failed, match=r"process 0 on .* no sign of life"):
        worker.wait_for("plan")


class SilentStore:
    """A store whose machine vanished: it takes what it is asked and never answers."""

    def __init__(self):
        self.store, self.is_silent = HashStore(), False

    def __getattr__(self, name):
        def operation(*args):
            while self.is_silent:
                time.sleep(0.01)
            return getattr(self.store, name)(*args)

        return operation


def test_leaving_waits_for_the_thread_that_talks_to_the_store(processes):
    """At the end of the interpreter, one still in torch's store would abort the process."""
    (coordinator,) = processes(1)
    threading.Thread(target=coordinator._ask, args=(lambda store: time.sleep(0.5),), daemon=True).start()
    time.sleep(0.1)
    coordinator._client.close()
    assert not coordinator._client._thread.is_alive()


def test_a_store_that_never_opens_or_never_answers_is_given_up(impatient):
    silent = SilentStore()
    coordinator = Coordinator(lambda: silent, 1, 2)
    coordinator.next_batch()
    silent.is_silent = True
    with pytest.raises(Failed, match="lost contact with the launcher"):
        coordinator.next_batch()
    with pytest.raises(Failed):  # once for all: nobody waits again
        coordinator.published()
    silent.is_silent = False
    opened = threading.Event()
    with pytest.raises(Failed, match="lost contact"):
        Coordinator(lambda: opened.wait() and HashStore(), 1, 2)
    opened.set()


def test_a_store_that_went_with_this_processs_own_launcher_is_a_stop(monkeypatch, quick_pulse):
    def gone():
        raise DistError("Connection reset by peer")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", iter([17, *[1] * 100]).__next__)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        Coordinator(gone, 1, 2)


def test_bad_input_is_left_to_the_main_process_to_find_and_then_told(processes, quick_pulse, monkeypatch):
    """All processes find the same fault: the one line is the main's own. Only a fault of another alone is quoted."""
    main, other = processes(2)
    threading.Timer(0.3, main.halt, args=(UsageError("--unet_path: is damaged"),)).start()
    with pytest.raises(UsageError), other:
        raise UsageError("--unet_path: is damaged")
    assert str(heard(main)).startswith("process 0 on ")
    monkeypatch.setattr(store, "MAIN_SECONDS", 0.2)
    main, other = processes(2)
    with pytest.raises(UsageError), other:
        raise UsageError("--unet_path: is not there")
    reason = heard(main)
    assert str(reason).startswith("process 1 on ")
    assert str(reason).endswith(": --unet_path: is not there")
    assert reason.exit_status == 2
