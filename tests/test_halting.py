import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from userdiff.shutdown import Failed, Interrupt, Stopped, deadly_wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with Interrupt().listen() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as raised:
            interrupt.check()
        assert raised.value.exit_status == 128 + number
    assert signal.getsignal(number) is before


def test_the_first_signal_counts():
    with Interrupt().listen() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert str(interrupt.reason) == "stopped by SIGINT"


def compute(interrupt, steps):
    with interrupt.abandonable():
        steps.append("computing")
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10**6):
            pass
        steps.append("computed")


def wait(interrupt, seconds):
    with interrupt.abandonable():
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pass


def test_work_that_can_be_thrown_away_is_left_at_once_and_the_rest_is_not():
    steps = []
    with Interrupt().listen() as interrupt:
        with pytest.raises(Stopped):
            compute(interrupt, steps)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not tear what follows
        steps.append("written")
        with pytest.raises(Stopped), interrupt.abandonable():
            steps.append("computing again")
    assert steps == ["computing", "written"]


def test_a_signal_at_any_instant_of_entering_or_leaving_such_work_is_the_reason_or_nothing():
    """Every bytecode around a block takes its turn; whatever happens, nothing but the reason comes out."""
    outcomes = []
    for instant in itertools.count():
        interrupt = Interrupt()
        left = iter(range(instant, -1, -1))

        def trace(frame, event, _, left=left, interrupt=interrupt):
            if frame.f_globals["__name__"] not in {"userdiff.shutdown", "contextlib"}:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and next(left, None) == 0:
                interrupt._on_signal(signal.SIGTERM, frame)
            return trace

        def work(interrupt=interrupt):
            with interrupt.abandonable():
                pass

        sys.settrace(trace)
        try:
            work()
            outcomes.append("done")
        except Stopped:
            outcomes.append("stopped")
        finally:
            sys.settrace(None)
        if next(left, None) is not None:
            break  # there were fewer instants than that
    assert {"done", "stopped"} == set(outcomes)


def test_a_reason_from_another_thread_reaches_the_main_one_in_the_midst_of_its_work():
    with Interrupt().listen() as interrupt:
        threading.Timer(0.2, interrupt.set, args=(Failed("process 3: the disk is full"),)).start()
        with pytest.raises(Failed, match="process 3: the disk is full"):
            wait(interrupt, seconds=60)


def test_a_reason_that_comes_late_kills_nobody():
    with Interrupt().listen() as interrupt:
        pass
    interrupt.set(Failed("too late"))
    time.sleep(0.1)


def test_ctrl_c_is_deadly_only_for_a_while():
    before = signal.getsignal(signal.SIGINT)
    with deadly_wait(lambda: False):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


IN_A_WAIT_THAT_HEARS_NO_SIGNAL = """
import ctypes, signal, sys
from userdiff.shutdown import deadly_wait
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with deadly_wait(lambda: True):
    mutex = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_an_orphan_does_not_wait_for_others_to_join():
    process = subprocess.run([sys.executable, "-c", IN_A_WAIT_THAT_HEARS_NO_SIGNAL], timeout=20, check=False)
    assert process.returncode == -signal.SIGTERM


def be_signalled():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(10**6):
        pass


def test_a_reason_to_end_wins_over_what_a_library_makes_of_it():
    def load(interrupt):
        with interrupt.abandonable():
            try:
                be_signalled()
            except Exception as error:
                raise ValueError(f"the file is damaged: {error}") from error

    with Interrupt().listen() as interrupt, pytest.raises(Stopped):
        load(interrupt)


def test_what_a_compiler_adds_to_an_error_is_not_shown():
    def compile_model(interrupt):
        with interrupt.abandonable():
            try:
                be_signalled()
            except Exception as error:
                error.args = (f"{error}\n\nfrom user code:\n   File ...",)
                raise

    with Interrupt().listen() as interrupt, pytest.raises(Stopped) as raised:
        compile_model(interrupt)
    assert str(raised.value) == "stopped by SIGTERM"
