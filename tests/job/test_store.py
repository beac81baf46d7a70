import os
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch.distributed import DistError, HashStore

from tests.jobs import wait_for
from userdiff.config import UsageError
from userdiff.job import launcher, store, store_client
from userdiff.job.group import JobIsOverError
from userdiff.job.store import Coordinator
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped


@pytest.fixture
def processes():
    """Make any number of processes of one job, closed at the end."""
    made: list[Coordinator] = []

    def make(number, shared=None, machines=(0,) * 9):
        """All on one machine, where nobody says otherwise."""
        shared = shared or HashStore()
        new = [
            Coordinator(lambda: shared, process_index, number, machines[process_index])
            for process_index in range(number)
        ]
        made.extend(new)
        return new

    yield make
    for coordinator in made:
        if not coordinator._client._broken:  # by the test itself
            coordinator.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def quick_pulse(monkeypatch):
    monkeypatch.setattr(store_client, "PULSE_SECONDS", 0.05)


@pytest.fixture
def impatient(monkeypatch):
    """A process is given up after half a second, and a store's thread that hangs at once."""
    monkeypatch.setattr(store_client, "LOST_AFTER_PULSES", 10)
    monkeypatch.setattr(store_client, "CLOSE_SECONDS", 0.1)


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


def test_who_is_lost_before_it_notes_which_image_failed_is_not_waited_for(processes):
    main, other = processes(2)
    other.report("failed", (2, 5))
    other._add("num_failed", 1)  # and then it is killed
    assert main.num_reported("failed") == 2
    assert main.reported("failed") == [(2, 5)]


def test_counting_asks_nothing_of_the_store_and_loses_nothing(processes):
    """It was two questions an image, for which the writers waited; now a process reports what it has made in between."""
    main, other = processes(2)
    ask, asked = other._client.ask, []
    other._client.ask = lambda operation: asked.append(operation) or ask(operation)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: [other.count_published(1, 7) for _ in range(500)], range(4)))
    assert not asked
    other.end_wave()
    assert main.published() == (2000, 14000)
    other.count_published(1, 1)
    wait_for(lambda: main.published() == (2001, 14001))  # with a pulse


# Ending


def test_the_first_reason_to_halt_is_the_one_that_counts(processes):
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


def test_a_process_that_leaves_by_an_exception_halts_the_others_and_counts_what_it_made(processes):
    main, other = processes(2)
    other.count_published(3, num_bytes=50)
    with pytest.raises(ZeroDivisionError), other:
        raise ZeroDivisionError("by zero")
    assert int(main._add("published", 0)) == 3
    assert str(heard(main)).endswith("by zero")


def test_a_signal_to_one_stops_all(processes):
    told = Shutdown()
    main, worker = processes(2)
    worker.shutdown = told
    with worker:
        main.check()
        told.set(Stopped(signal.SIGTERM))
        with pytest.raises(Stopped):
            worker.check()
        reason = heard(main)
    assert reason.signal_number == signal.SIGTERM
    assert reason.exit_status == 143
    assert str(reason) == "stopped by SIGTERM"


def test_waiting_ends_when_all_have_ended_the_wave_or_one_fails(processes):
    main, *others = processes(4)
    polls = []
    main.begin_wave(b"plan")
    for delay, other in enumerate(others):
        assert next(other.waves()) == b"plan"
        threading.Timer(0.1 * delay, other.end_wave).start()
    main.wait_for_others(on_poll=lambda: polls.append(None))
    assert polls
    main, other = processes(2)
    main.begin_wave(b"plan")
    next(other.waves())
    threading.Timer(0.2, other.halt, args=(Failed("gone"),)).start()
    with pytest.raises(Failed, match="gone"):
        main.wait_for_others(on_poll=lambda: None)


def test_the_main_process_waits_for_the_others_to_leave_but_not_for_ever_nor_for_the_dead(processes):
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
    left.__exit__(None, None, None)
    dead._client.close()  # as SIGKILL would have it: without a word
    wait_for(main.lost)
    assert main.lost() == {3: f"process 3 on {socket.gethostname()}, no sign of life"}
    time.sleep(0.3)
    for coordinator in (main, worker):
        coordinator.check()
    main._client.close()
    reason = heard(worker)
    assert isinstance(reason, Failed)
    assert str(reason) == f"process 0 on {socket.gethostname()} has given no sign of life for 0 s"


@pytest.mark.parametrize(("waiting", "missed"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("has_joined", [True, False])
def test_whoever_waits_says_once_for_whom(waiting, missed, has_joined):
    shared, said, joined = HashStore(), [], []

    def wait_in_vain():
        with Coordinator(lambda: shared, waiting, 2, say=said.append) as coordinator:
            joined.append(coordinator)
            coordinator.wait_for("plan")

    with ThreadPoolExecutor(1) as threads:
        if has_joined and missed == 1:
            threads.submit(wait_in_vain)
        if has_joined:
            dead = Coordinator(lambda: shared, missed, 2)
        if not (has_joined and missed == 1):
            threads.submit(wait_in_vain)
        if has_joined:
            wait_for(lambda: joined)
            time.sleep(0.2)
            dead._client.close()  # as SIGKILL would have it: without a word
        wait_for(lambda: said, 20)
        time.sleep(0.3)
        if not has_joined and missed == 0:
            joined.append(Coordinator(lambda: shared, 0, 2))  # it comes in the end
        joined[-1].set("plan", "1")
    name = f"process {missed} on {socket.gethostname()}" if has_joined else f"process {missed}"
    what = "gives no sign of life; given up after 3 s"
    if not has_joined:
        what = "has not joined the job yet" + "; given up after 30 s" * (missed == 0)
    assert said == [f"waiting for {name}, which {what}"]


# Waves


def test_waves_follow_one_another_until_they_end(processes):
    main, other = processes(2)
    waves = other.waves()
    for number in range(3):
        main.begin_wave(f"plan {number}".encode())
        assert next(waves) == f"plan {number}".encode()
        assert sorted([main.next_batch(), other.next_batch()]) == [0, 1]
        main.end_wave()
    main.end_waves(is_complete=True)
    assert other.has_ended()
    assert list(waves) == []
    assert main.lost() == {}


def test_a_late_process_joins_the_wave_that_is_under_way(processes):
    main, *_ = processes(1)
    main.begin_wave(b"first")
    main.begin_wave(b"second")
    main.next_batch()
    late = Coordinator(lambda: main._client.ask(lambda store: store), 1, 2)
    with late:
        assert next(late.waves()) == b"second"
        assert late.next_batch() == 1


@pytest.mark.parametrize("before", ["nobody", "one that is gone"])
@pytest.mark.parametrize("restarts", [0, 1])
def test_whoever_comes_after_the_end_has_nothing_to_do(monkeypatch, processes, before, restarts):
    """Whether its launcher has just started it, or started it again: it would wait for a main process that never comes."""
    shared = HashStore()
    main, *others = processes(1 if before == "nobody" else 2, shared)
    main.num_processes = 2
    main.begin_wave(b"plan")
    main.end_waves(is_complete=True)
    for coordinator in (main, *others):
        coordinator._client.close()
    monkeypatch.setattr(launcher, "restart_count", lambda: restarts)
    with pytest.raises(JobIsOverError) as over:
        Coordinator(lambda: shared, 1, 2)
    assert over.value.exit_status == 0


def test_whoever_comes_while_the_main_process_ends_has_nothing_to_do(processes):
    shared = HashStore()
    main, *_ = processes(1, shared)
    main.begin_wave(b"plan")
    main.end_waves(is_complete=True)
    with Coordinator(lambda: shared, 1, 2) as late:
        assert late.has_ended()
        assert list(late.waves()) == []


def test_a_process_that_is_silent_in_a_wave_is_done_without_and_may_come_back(processes, impatient):
    main, other, third = processes(3)
    main.begin_wave(b"plan")
    waves = other.waves()
    next(waves)
    next(third.waves())
    third.end_wave()
    pulse, other._client._pulse = other._client._pulse, lambda store: None  # as SIGSTOP would have it
    main.wait_for_others(main.check)
    assert main.lost() == {1: f"process 1 on {socket.gethostname()}, no sign of life"}
    assert [main.has_lost_part(number) for number in range(6)] == [False, True, False] * 2
    main.begin_wave(b"rest")
    other._client._pulse = pulse
    assert next(waves) == b"rest"
    wait_for(lambda: not main._gone)
    threading.Timer(0.3, other.end_wave).start()
    assert main._works(1)
    main.wait_for_others(main.check)
    assert not main._works(1)
    assert list(main.lost()) == [1]  # it was, all the same


@pytest.mark.parametrize("machine", [0, 1])
def test_a_signal_ends_a_machine_alone_unless_it_is_the_main_ones(processes, machine):
    main, other = processes(2, machines=(0, machine))
    main.begin_wave(b"plan")
    next(other.waves())
    other.shutdown.set(Stopped(signal.SIGTERM))
    with pytest.raises(Stopped), other:
        other.check()
    assert other.shutdown.reason.others_go_on == bool(machine)
    if machine:
        main.wait_for_others(main.check)
        assert main.lost() == {1: f"process 1 on {socket.gethostname()}, stopped by SIGTERM"}
    else:
        assert heard(main).signal_number == signal.SIGTERM


def test_a_signal_to_the_main_machine_is_not_taken_for_one_of_another_machine(processes):
    main, other = processes(2, machines=(0, 1))
    main.halt(Stopped(signal.SIGTERM))
    assert not heard(other).others_go_on


def test_an_error_without_words_is_told_by_its_kind(processes):
    main, other = processes(2)
    other.halt(MemoryError())
    assert str(heard(main)) == f"process 1 on {socket.gethostname()}: MemoryError"


def test_losses_are_told_once_and_no_further_reason_for_an_end(processes, impatient):
    main, other, third = processes(3)
    main.begin_wave(b"plan")
    next(other.waves())
    other._client.close()
    main.wait_for_others(main.check)
    assert main.newly_lost() == [f"process 1 on {socket.gethostname()}, no sign of life"]
    assert main.newly_lost() == []
    third._client.close()
    assert main.wait_until_left(5) == [f"process 2 on {socket.gethostname()}"]


def test_a_process_that_lives_and_does_not_end_its_batch_is_named(processes, monkeypatch):
    said = []
    monkeypatch.setattr(store, "_SLOW_PULSES", 3)
    main, other = processes(2)
    main._say = said.append
    main.begin_wave(b"plan")
    next(other.waves())
    threading.Timer(1, other.end_wave).start()
    main.wait_for_others(main.check)
    assert said == [f"waiting for process 1 on {socket.gethostname()}, which is still at its last batch"]


def test_a_process_that_fails_of_its_own_ends_the_job_in_a_wave_too(processes):
    main, other = processes(2, machines=(0, 1))
    main.begin_wave(b"plan")
    next(other.waves())
    with pytest.raises(OSError, match="full"), other:
        raise OSError("the disk is full")
    with pytest.raises(Failed, match="the disk is full"):
        main.wait_for_others(main.check)


# Groups


@pytest.fixture
def as_process(monkeypatch):
    """Have this process take itself for another one, as `as_process("B")`."""
    return lambda name: monkeypatch.setattr(launcher, "this_process", lambda: name)


def test_a_restarted_process_takes_the_place_of_the_one_that_is_gone(processes, as_process):
    shared = HashStore()
    main, before = processes(2, shared)
    main.begin_wave(b"plan")
    next(before.waves())
    before.next_batch()
    before._client.close()  # as SIGKILL would have it: without a word
    as_process("B")
    with Coordinator(lambda: shared, 1, 2) as other:
        assert (before.part_number, other.part_number) == (1, 3)
        assert not main._works(1)
        assert next(other.waves()) == b"plan"
        assert other.next_batch() == 1
        assert main.lost() == {}
        other.end_wave()
        main.wait_for_others(main.check)
        # What the one before has noted may have gone with its machine.
        assert main.lost() == {1: f"process 1 on {socket.gethostname()}, started again by its launcher"}
        assert main.num_losses == 1
        assert [main.has_lost_part(number) for number in range(4)] == [False, True, False, True]


def test_a_process_that_has_left_is_there_again_when_another_has_its_place(processes, as_process):
    """Nothing is deleted: a store's `get` of a key that has just gone waits for ever."""
    shared = HashStore()
    main, before = processes(2, shared, machines=(0, 1))
    before.__exit__(None, Stopped(signal.SIGTERM), None)
    assert main._has_left(1)
    as_process("B")
    with Coordinator(lambda: shared, 1, 2):
        assert not main._has_left(1)
        assert shared.check(["1/left/1"])


def test_a_main_process_that_is_started_again_ends_the_group_before(processes, as_process):
    """Else its processes would hold the folder, and the new one give up, before they missed the old one."""
    shared = HashStore()
    before, other = processes(2, shared)
    before.begin_wave(b"old")
    before._client.close()
    as_process("B")
    with Coordinator(lambda: shared, 0, 2):
        assert "started the main process again" in str(heard(other, 2))


@pytest.mark.parametrize("process_index", [0, 1])
def test_a_place_that_is_taken_is_refused_at_once(processes, as_process, process_index):
    shared = HashStore()
    processes(2, shared)
    as_process("B")
    with pytest.raises(launcher.ForeignLaunchError, match=r"is process .* already, and joins one job"):
        Coordinator(lambda: shared, process_index, 2)


@pytest.mark.parametrize("end", ["killed", "stopped", "ended"])
@pytest.mark.parametrize("number", [2, 3])
def test_a_group_that_is_started_again_meets_apart_from_the_one_before(processes, as_process, end, number):
    """Whoever comes first, and though the launcher counts no restart where a machine has joined.

    The last of two finds its place taken by one that is gone, the last of three finds it free.
    """
    shared = HashStore()
    before = processes(2, shared)
    before[0].begin_wave(b"old")
    if end == "stopped":
        before[0].halt(Stopped(signal.SIGTERM))
    if end == "ended":  # and torchrun starts all processes again
        before[0].end_waves(is_complete=False)
    for coordinator in reversed(before):
        coordinator._client.close() if end == "killed" else coordinator.__exit__(None, None, None)
    as_process("B")
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(Coordinator, lambda: shared, number - 1, number)
        time.sleep(0.3)
        with Coordinator(lambda: shared, 0, number) as main, joining.result(20) as other:
            main.begin_wave(b"new")
            assert next(other.waves()) == b"new"
            assert other.part_number == number - 1
            main.check()


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


def test_leaving_waits_for_the_thread_that_talks_to_the_store(processes):
    """At the end of the interpreter, one still in torch's store would abort the process."""
    (coordinator,) = processes(1)
    coordinator._client._requests.put((Future(), lambda store: time.sleep(0.5)))
    time.sleep(0.1)
    coordinator._client.close()
    assert not coordinator._client._thread.is_alive()


def test_a_store_that_never_opens_or_never_answers_is_given_up(impatient):
    answers = threading.Event()
    coordinator = Coordinator(HashStore, 0, 2)
    coordinator.next_batch()
    coordinator._client._requests.put((Future(), lambda store: answers.wait()))  # a machine that vanished never answers
    with pytest.raises(Failed, match="lost contact with the launcher"):
        coordinator.next_batch()
    with pytest.raises(Failed):  # once for all: nobody waits again
        coordinator.published()
    answers.set()
    opened = threading.Event()
    with pytest.raises(Failed, match="lost contact"):
        Coordinator(lambda: opened.wait() and HashStore(), 1, 2)
    opened.set()


def test_a_store_that_went_with_this_processs_own_launcher_is_a_stop(monkeypatch):
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
