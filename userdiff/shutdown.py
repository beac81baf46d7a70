"""Ending before all is done: for which reasons, and how a process learns in time that it is to end.

A signal sets a flag, which is checked between DDIM steps and between files. A step of a large model, or loading one, may
take longer than the ten seconds that a cluster leaves a process. So a thread hears of the signal too, and ends the process
when GRACE_SECONDS are over. Nothing is lost by that, since every file is published in one step.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

GRACE_SECONDS = 8.0
LAST_SECONDS = 1.5  # then, for last words: a disk that does not answer may keep them back

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.25  # how often the thread looks for a signal, or for a launcher that has died
_ACCELERATE = re.compile(r"(^|/)accelerate(-launch)?$|^accelerate\.commands\.|/accelerate/commands/\w+\.py$")

T = TypeVar("T")


class Halted(Exception):
    """The job ends early; what is done is kept."""

    def __init__(self, cause: str, exit_status: int = 1, *, is_alone: bool = False) -> None:
        super().__init__(cause)
        # The same in every process: a launcher reports the status of whichever leaves first.
        self.exit_status = exit_status
        self.is_alone = is_alone  # this process can no longer reach the others
        self.others_go_on = False  # this machine leaves the job, and the others go on
        self.progress = ""  # how much is done, where the main process could still tell


class Stopped(Halted):
    """A signal stopped the job."""

    def __init__(self, signal_number: int, *, is_alone: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}", 128 + signal_number, is_alone=is_alone)
        self.signal_number = signal_number


class Failed(Halted):
    """An error ended the job, in this process or in another."""


class Shutdown:
    """The reason for this process to end early, once there is one: a signal, or what a thread heard of the others."""

    def __init__(self) -> None:
        self.reason: Halted | None = None
        self._deadline = float("inf")
        self._parent = os.getppid()  # 0 for the first process of a container
        self._has_launcher = _is_launched_by(self._parent)
        self._last_words: list[Callable[[Halted], None]] = []
        self._end = threading.Lock()  # held by the thread that ends the process, or by whoever tells it not to

    def check(self) -> None:
        """Raise the reason to end, if there is one. Cheap: call it often."""
        if self.reason is not None:
            raise self.reason

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, such as files, with a check before each one."""
        for item in items:
            self.check()
            yield item

    def set(self, reason: Halted) -> None:
        """Set the reason to end, from any thread; the first one counts."""
        if self.reason is None:
            self.reason = reason
            self._deadline = time.monotonic() + GRACE_SECONDS

    def seconds_left(self) -> float:
        """Return how long the process may still take to end in order."""
        return max(self._deadline - time.monotonic(), 0)

    def is_orphan(self) -> bool:
        """Return whether the launcher that started this process has died: nobody else would tell it to end."""
        return self._has_launcher and os.getppid() != self._parent

    @contextmanager
    def last_words(self, say: Callable[[Halted], None]) -> Iterator[None]:
        """Have `say` called if the process is ended within this block; the innermost block's is called first."""
        self._last_words.append(say)
        try:
            yield
        finally:
            self._last_words.remove(say)

    @contextmanager
    def listen(self) -> Iterator["Shutdown"]:
        """Take a signal to end and the launcher's death as reasons to end. For the main thread, once.

        A SIGHUP that is ignored, as nohup has it, stays so: the job outlives its terminal.
        """
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        is_over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(reader, is_over), name="shutdown", daemon=True)
        watch.start()
        numbers = [number for number in _SIGNALS if not _is_ignored_hangup(number)]
        before = {number: signal.signal(number, lambda number, _: self.set(Stopped(number))) for number in numbers}
        # A handler written in Python runs only when the operation in progress returns. The interpreter writes the number
        # of a signal to this file at once, so the thread learns of it meanwhile.
        fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield self
        finally:
            with self._end:  # never released once the thread ends the process
                is_over.set()
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            watch.join()
            os.close(reader)
            os.close(writer)

    def _watch(self, reader: int, is_over: threading.Event) -> None:
        while not is_over.wait(_POLL_SECONDS):
            with suppress(BlockingIOError):
                for number in os.read(reader, 64):
                    if number in _SIGNALS:
                        self.set(Stopped(number))
            if self.reason is None and self.is_orphan():
                self.set(Stopped(signal.SIGTERM, is_alone=True))
            with self._end:
                if self.reason is not None and not self.seconds_left() and not is_over.is_set():
                    self._leave(self.reason)

    def _leave(self, reason: Halted) -> None:
        deadline = time.monotonic() + LAST_SECONDS
        for say in (*reversed(self._last_words), lambda _: _flush()):
            speaker = threading.Thread(target=_try, args=(say, reason), daemon=True)
            speaker.start()
            speaker.join(max(deadline - time.monotonic(), 0.1))
        os._exit(reason.exit_status)


def _try(say: Callable[[Halted], None], reason: Halted) -> None:
    with suppress(Exception):
        say(reason)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _is_ignored_hangup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _is_launched_by(parent: int) -> bool:
    """Return whether the parent process is a launcher, without which this process has no reason to go on.

    torchrun says so itself. Accelerate starts a single process without a word: there, the parent's command line tells.
    Any other parent, such as a shell, may end before its children do.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return Path(words[0]).name.startswith("python") and any(_ACCELERATE.search(word) for word in words[1:])
