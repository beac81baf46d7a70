"""Progress on stderr: on a terminal a bar that moves, in a log file a line every so often."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from userdiff.text import printable

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 30.0
_SLOW_SECONDS = 8.0

T = TypeVar("T")


@contextmanager
def unheard(stream: TextIO) -> Iterator[None]:
    """Redirect the stream to nowhere if nobody reads it any longer: that does not end a job."""
    try:
        yield
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def said_if_slow(what: str, is_main_process: bool) -> Iterator[None]:
    """Print, once for all processes, what is being done where this block takes longer than _SLOW_SECONDS.

    Not on stderr: there, a refusal is the only line.
    """

    def say() -> None:
        if is_main_process:
            with unheard(sys.stdout):
                tqdm.write(printable(what), file=sys.stdout)

    timer = Timer(_SLOW_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def make_bar(total: int, done: int = 0, **options: Any) -> tqdm:
    """Return a bar that counts images; it shows nothing where nothing is left to do."""
    is_terminal = sys.stderr.isatty()
    # tqdm's own format would turn a rate below 1 into seconds an image.
    counts = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
    return tqdm(
        total=total,
        initial=done,
        unit=" images",
        bar_format=("{l_bar}{bar}| " if is_terminal else "{l_bar} ") + counts,
        mininterval=_TERMINAL_SECONDS if is_terminal else _LOG_SECONDS,
        miniters=0,  # so that an update without news still moves the clock
        smoothing=0,  # images come a batch at a time: a moving average of such bursts is far from the truth
        dynamic_ncols=is_terminal,
        file=sys.stderr if is_terminal else _Lines(sys.stderr),
        disable=total == done,
        **options,
    )


def show_reading(items: Iterable[T], total: int) -> Iterable[T]:
    """Yield the items, showing a bar of how many of `total` images have been read."""
    delay = 0 if sys.stderr.isatty() else _LOG_SECONDS  # a log has no use for what is over soon
    with make_bar(total, desc="Checking images", leave=False, delay=delay) as bar:
        for item in items:
            yield item
            bar.update()


class _Lines:
    """A stream for bars that go into a log: every state of a bar is a line of its own."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a line, if there is any text."""
        if line := text.strip():
            with unheard(self._stream):
                self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is written, for whoever follows the log."""
