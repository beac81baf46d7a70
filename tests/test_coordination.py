import os
import signal
import threading

import pytest
from torch.distributed import HashStore

from userdiff.coordination import Coordinator, PeerFailed, Stopped, pending_signal


def processes(number, **options):
    store = HashStore()
    return [Coordinator(store, process_index, number, **options) for process_index in range(number)]


def test_every_batch_is_claimed_once():
    claimed: list[int] = []

    def claim(coordinator):
        mine = [coordinator.next_batch() for _ in range(200)]
        assert mine == sorted(mine)
        claimed.extend(mine)

    threads = [threading.Thread(target=claim, args=(coordinator,)) for coordinator in processes(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1600))


def test_the_plan_reaches_everyone_as_it_was():
    main, *others = processes(3)
    plan = bytes(range(256)) * 3 + b"\n\n"
    threading.Timer(0.2, main.publish_plan, args=("0af3", plan)).start()
    assert [other.receive_plan() for other in others] == [("0af3", plan)] * 2


def test_progress_and_failures_add_up():
    main, other = processes(2)
    main.count_published()
    other.count_published(3)
    assert main.count_published(0) == other.count_published(0) == 4
    main.report_failed(2, 5)
    other.report_failed(1, 9)
    assert main.failed() == [(1, 9), (2, 5)]


def test_the_first_reason_to_halt_is_the_one_that_counts():
    main, one, two = processes(3)
    one.halt("process 1: the disk is full")
    two.halt("process 2: something that followed from it")
    for coordinator in (main, one, two):
        with pytest.raises(PeerFailed, match=r"^process 1: the disk is full$"):
            coordinator.check()


def test_every_process_leaves_with_the_status_of_the_one_that_failed():
    """Else the launcher's report names whichever process happened to leave first."""
    main, other = processes(2)
    main.halt("process 0: --output_dir: is a file", exit_status=2)
    with pytest.raises(PeerFailed) as raised:
        other.check()
    assert raised.value.exit_status == 2


def test_a_signal_to_one_stops_all():
    store = HashStore()
    told = Coordinator(store, 1, 2, pending_signal=lambda: signal.SIGTERM)
    main = Coordinator(store, 0, 2)
    main.check()
    with pytest.raises(Stopped):
        told.check()
    with pytest.raises(Stopped) as raised:
        main.check()
    assert raised.value.signal_number == signal.SIGTERM
    assert str(raised.value) == "stopped by SIGTERM"


def test_waiting_ends_when_a_peer_fails():
    main, other = processes(2)
    threading.Timer(0.2, other.halt, args=("process 1: gone",)).start()
    main.finish()
    with pytest.raises(PeerFailed, match="process 1: gone"):
        main.wait_for_all(on_poll=lambda: None)


def test_waiting_ends_when_all_have_finished():
    main, *others = processes(4)
    polls = []
    main.finish()
    for delay, other in enumerate(others):
        threading.Timer(0.1 * delay, other.finish).start()
    main.wait_for_all(on_poll=lambda: polls.append(None))
    assert polls


def test_the_main_process_speaks_for_all():
    main, other = processes(2)
    said = []
    threading.Timer(0.2, main.say_once, args=(lambda: said.append("main"),)).start()
    other.say_once(lambda: said.append("other"))
    assert said == ["main"]


def test_another_process_speaks_when_the_main_cannot():
    _, other = processes(2)
    said = []
    other.say_once(lambda: said.append("other"), patience_seconds=0.1)
    assert said == ["other"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_and_handlers_put_back(number):
    before = signal.getsignal(number)
    with pending_signal() as pending:
        assert pending() is None
        os.kill(os.getpid(), number)
        assert pending() == number
    assert signal.getsignal(number) is before


def test_an_orphan_of_a_launcher_counts_as_told_to_terminate(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pending_signal() as pending:
        assert pending() is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert pending() == signal.SIGTERM
