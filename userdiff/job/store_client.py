"""One process's connection to the store: a thread that talks to it, and how long others have given no sign of life."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import Any, TypeVar

from torch.distributed import DistError, Store

PULSE_SECONDS = 1.0
LOST_AFTER_PULSES = 60  # in our own pulses: they do not count the time in which this process was suspended itself
GONE_AFTER_PULSES = 3  # for a process that was told to leave
JOIN_PULSES = 600  # for a main process that has not come yet: it may start later, and load torch from a slow disk
SPOKEN_AFTER_PULSES = 6  # whom or what one waits for
CLOSE_SECONDS = 2.0

T = TypeVar("T")


class SignsOfLife:
    """How long other processes have given no sign of life, counted in looks."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  # process -> (its beats, looks in a row that found no new one)

    def look_for(self, store: Store, other: int) -> None:
        """Look for a new beat of another process."""
        beat = int(store.add(f"beat/{other}", 0))
        before, silent = self._seen.get(other, (beat, 0))
        self._seen[other] = beat, silent + 1 if beat == before else 0

    def has_joined(self, other: int) -> bool:
        """Return whether there ever was a beat of another process."""
        return self._seen.get(other, (0, 0))[0] > 0

    def is_silent(self, other: int, looks: int) -> bool:
        """Return whether so many looks in a row found nothing new of another process."""
        return self._seen.get(other, (0, 0))[1] >= looks


class StoreClient:
    """The one thread that talks to the store, so that no other thread waits for an answer without bound.

    A TCPStore whose machine vanished neither answers nor opens (tried), and a thread that waits in it sees no signal.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        pulse: Callable[[Store], None],
        on_silence: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start the thread.

        on_silence: is called where there has been no answer for SPOKEN_AFTER_PULSES. As long as it returns True, the
        store is not given up.
        """
        self._open_store = open_store
        self._pulse = pulse
        self._on_silence = on_silence
        self._broken: DistError | None = None
        self._requests: queue.SimpleQueue[tuple[Future[Any], Callable[[Store], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="store", daemon=True)
        self._thread.start()

    def ask(self, operation: Callable[[Store], T]) -> T:
        """Return `operation(store)`; raises DistError where the store is gone or does not answer."""
        answer: Future[T] = Future()
        self._requests.put((answer, operation))
        num_silent = 0
        while num_silent < LOST_AFTER_PULSES:
            if self._broken:  # once a store has not answered, nobody waits for it again
                raise self._broken
            with suppress(NotYet):
                return answer.result(timeout=PULSE_SECONDS)
            num_silent += 1
            if num_silent >= min(SPOKEN_AFTER_PULSES, LOST_AFTER_PULSES) and self._on_silence():
                num_silent = 0
        self._broken = DistError(f"no answer for {LOST_AFTER_PULSES * PULSE_SECONDS:.0f} s")
        raise self._broken

    def close(self) -> None:
        """End the thread; from here on, `ask` raises DistError.

        Waits for the thread, since one that is still inside torch's store when the interpreter ends aborts the process;
        but not for long, since a store that is gone may never answer.
        """
        self._broken = self._broken or DistError("closed")
        self._requests.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _serve(self) -> None:
        store, next_pulse = None, 0.0
        while True:
            if store is not None and time.monotonic() >= next_pulse:
                self._pulse(store)
                next_pulse = time.monotonic() + PULSE_SECONDS
            try:
                request = self._requests.get(timeout=PULSE_SECONDS)
            except queue.Empty:
                continue
            if request is None:
                return
            answer, operation = request
            try:
                store = store or self._open_store()
                answer.set_result(operation(store))
            except Exception as error:
                answer.set_exception(error)
