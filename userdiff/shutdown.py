"""Why a job ends before it is done, and how the process that computes learns of it: signals, above all."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Halted(Exception):
    """The job ends early; what is done is kept."""

    exit_status = 1
    progress = ""
    """How much is done, where the main process could still tell."""
    is_alone = False
    """Whether this process can no longer reach the others."""


class Stopped(Halted):
    """A signal asked for it."""

    def __init__(self, signal_number: int, *, is_alone: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number
        self.is_alone = is_alone


class Failed(Halted):
    """Something went wrong, here or in another process; the text is its cause.

    Every process leaves with the same exit status, since a launcher reports that of whichever leaves first.
    """

    def __init__(self, cause: str, exit_status: int = 1, *, is_alone: bool = False) -> None:
        super().__init__(cause)
        self.exit_status = exit_status
        self.is_alone = is_alone


def refusal(error: OSError) -> str:
    """Say what a file system refused, and where."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


class _Abandoned(Exception):
    """Thrown into work that is given up, in the reason's place: compilers write into the errors that pass through them."""


class Interrupt:
    """The first reason for this process to end, whoever brings it: a signal, or a thread that heard of it."""

    def __init__(self) -> None:
        self.reason: Halted | None = None
        self.may_raise = False
        """Whether a signal may tear what the main thread is at."""
        self._listening = False
        self._lock = threading.Lock()  # no signal is sent once the handlers are gone

    def check(self) -> None:
        """Raise the reason, if there is one."""
        if self.reason is not None:
            raise self.reason

    def set(self, reason: Halted) -> None:
        """Bring a reason, from any thread; the first counts."""
        self.reason = self.reason or reason
        with self._lock:
            if self._listening:  # have `_on_signal` called there, whatever that thread waits in
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextmanager
    def listen(self) -> Iterator["Interrupt"]:
        """Take SIGINT and SIGTERM for reasons, instead of dying of them."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        self._listening = True
        try:
            yield self
        finally:
            with self._lock:
                self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def abandonable(self) -> "_Abandonable":
        """Raise the reason at any instant within this block, for work that can be thrown away.

        A single pass of a large model takes longer than a job may take to stop.
        """
        return _Abandonable(self)

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or Stopped(signal_number)
        is_at_the_edge = frame is not None and frame.f_globals is globals()  # where nothing would take it
        if self.may_raise and not is_at_the_edge:
            self.may_raise = False  # once: what follows is an orderly end
            raise _Abandoned


class _Abandonable:
    """The block of `Interrupt.abandonable`. No generator: a signal between its frame and ours would pass by both."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def __enter__(self) -> None:
        self._interrupt.may_raise = True
        if self._interrupt.reason is not None:
            self._interrupt.may_raise = False
            raise self._interrupt.reason

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._interrupt.may_raise = False
        if isinstance(error, Exception):
            self._interrupt.check()  # whatever a library made of it


@contextmanager
def deadly_wait(is_orphan: Callable[[], bool]) -> Iterator[None]:
    """Let Ctrl-C, or having become an orphan, end the process at once: a wait inside torch would hear of neither."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            if is_orphan():
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, name="orphan", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
