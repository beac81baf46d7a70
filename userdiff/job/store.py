"""What the processes of a job tell each other, through a c10d store and nothing else: no collective can time out.

The store carries the frozen plan, the counter from which each process takes its next batch, progress, failed images,
a sign of life from every process, and the one reason to end early.
"""

import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from torch.distributed import DistError, Store

from userdiff.config import UsageError
from userdiff.job import launcher, store_client
from userdiff.job.store_client import SignsOfLife, StoreClient
from userdiff.seeds import Item
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped

MAX_NOTED = {"failed": math.inf, "flat": 1000}
"""How many images of a kind are noted by name. A model gone wrong may make nothing but images of one colour."""
POLL_SECONDS = 0.05
MAIN_SECONDS = 10.0  # that others leave the main process to print what is wrong with the arguments or models

T = TypeVar("T")


def connect(shutdown: Shutdown, say: Callable[[str], None] = lambda line: None) -> "Coordinator":
    """Join the job as the process that the launcher says this is, or as the only one.

    say: prints for whom or for what this process waits.
    """
    return Coordinator(
        launcher.open_store,
        launcher.process_index(),
        launcher.num_processes(),
        launcher.machine_index(),
        launcher.num_machines(),
        shutdown=shutdown,
        say=say,
    )


class Coordinator:
    """One process's end of the store. Leaving its `with` block by an exception halts the others."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        process_index: int,
        num_processes: int,
        machine_index: int = 0,
        num_machines: int = 1,
        *,
        shutdown: Shutdown | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.process_index = process_index
        self.num_processes = num_processes
        self.machine_index = machine_index
        self.num_machines = num_machines
        self.name = f"process {process_index} on {socket.gethostname()}"  # in messages
        self.shutdown = shutdown or Shutdown()
        self._unreported = [0, 0]  # images and bytes published, of which the store has not heard
        self._count_lock = threading.Lock()
        self._signs = SignsOfLife()
        self._watched = range(1, num_processes) if process_index == 0 else range(1)
        self._say = say
        self._said: set[str] = set()
        self._client = StoreClient(open_store, self._pulse, self._on_silence)
        try:
            me = launcher.this_process()
            launcher.check_claim(
                self._ask(lambda store: store.compare_set(f"claim/{process_index}", "", me)).decode(), me
            )
            self.set(f"name/{process_index}", self.name)
        except BaseException:
            self._client.close()
            raise

    @property
    def is_main_process(self) -> bool:
        """True for the process that plans, merges and prints."""
        return self.process_index == 0

    def __enter__(self) -> "Coordinator":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with suppress(Halted):  # the store may be gone
            if isinstance(error, UsageError) and not self.is_main_process:
                # The main process finds the same error: it has time to print it, once for all, and to end the job.
                _wait(lambda: self.shutdown.reason is not None, MAIN_SECONDS)
            if error is not None:
                self.halt(error)
            self._ask(self._report_published)
            self.set(f"left/{self.process_index}")
        self._client.close()

    # What one process tells the others

    def set(self, key: str, value: str | bytes = "") -> None:
        """Set a value, which any process may wait for."""
        self._ask(lambda store: store.set(key, value))  # type: ignore[arg-type] # bytes go too

    def wait_for(self, key: str, on_poll: Callable[[], None] = lambda: None) -> bytes:
        """Return a value once a process has set it, calling `on_poll` until then."""
        while not self._ask(lambda store: store.check([key])):
            self.check()
            self._say_who_is_missed()
            on_poll()
            time.sleep(POLL_SECONDS)
        return self._ask(lambda store: bytes(store.get(key)))

    def is_first(self, what: str) -> bool:
        """Return whether no process has asked this of the same thing before."""
        return self._add(f"asked/{what}", 1) == 1

    def launch_id(self) -> str | None:
        """Return what is the same for all groups of processes of this launch alone; None where there is no launcher."""
        return self._ask(lambda store: store.get("launch").decode() if store.check(["launch"]) else None)

    # Batches

    def next_batch(self) -> int:
        """Claim the next batch: 0, 1, 2, ..., each given to one process alone."""

        def claim(store: Store) -> int:
            self._report_published(store)
            return int(store.add("next_batch", 1)) - 1

        return self._ask(claim)

    def finish(self) -> None:
        """Note that this process has nothing left to compute or write."""
        self._ask(self._report_published)
        self.set(f"finished/{self.process_index}")

    def wait_for_all(self, on_poll: Callable[[], None]) -> None:
        """Wait until every process has finished, calling `on_poll` until then."""
        for process_index in range(self.num_processes):
            self.wait_for(f"finished/{process_index}", on_poll)

    # Progress and failures

    def count_published(self, num_images: int, num_bytes: int) -> None:
        """Count published images, from any thread; the others learn of them with this process's next batch or pulse."""
        with self._count_lock:
            self._unreported[0] += num_images
            self._unreported[1] += num_bytes

    def _report_published(self, store: Store) -> None:
        with self._count_lock:
            num_images, num_bytes = self._unreported
            self._unreported = [0, 0]
        if num_images:  # their bytes first: whoever reads how many images there are finds the bytes of them all
            store.add("published_bytes", num_bytes)
            store.add("published", num_images)

    def published(self) -> tuple[int, int]:
        """Return how many images all processes have published in this run, and their bytes."""
        self._ask(self._report_published)
        return self._add("published", 0), self._add("published_bytes", 0)

    def report(self, kind: str, item: Item) -> None:
        """Count an image of a kind, and note which one it is unless MAX_NOTED have been noted.

        kind: `failed`, an image that could not be made, or `flat`, one of a single colour.
        """
        number = self._add(f"num_{kind}", 1)
        if number <= MAX_NOTED[kind]:
            self.set(f"{kind}/{number}", json.dumps(item))

    def num_reported(self, kind: str) -> int:
        """Return how many images of a kind all processes have reported so far."""
        return self._add(f"num_{kind}", 0)

    def reported(self, kind: str) -> list[Item]:
        """Return the images of a kind that were noted so far, sorted."""
        numbers = range(1, int(min(self.num_reported(kind), MAX_NOTED[kind])) + 1)
        items = [json.loads(self.wait_for(f"{kind}/{number}")) for number in numbers]
        return sorted((user_id, image_index) for user_id, image_index in items)

    # Ending early

    def check(self) -> None:
        """Raise Stopped or Failed if the job is to end early, and tell the others. Cheap: call it often."""
        try:
            self.shutdown.check()
        except Halted as reason:
            self.halt(reason)
            raise

    def halt(self, error: BaseException, cause: str | None = None) -> None:
        """End every process because of this error, in the words of `cause` if given; the first reason counts."""
        if isinstance(error, Halted):
            self.shutdown.set(error)
        cause = cause or f"{self.name}: {error or type(error).__name__}"
        exit_status = getattr(error, "exit_status", 1)
        signal_number = error.signal_number if isinstance(error, Stopped) else None
        self.shutdown.set(self._ask(lambda store: _set_reason(store, cause, exit_status, signal_number)))

    def wait_until_left(self, seconds: float) -> list[str]:
        """Wait until the other processes have left or died, but not longer than this; returns the names of the dead."""
        others = {index for index in range(self.num_processes) if index != self.process_index}
        dead: list[str] = []

        def have_left() -> bool:
            for other in sorted(others):
                if self._ask(partial(_has_left, other)):
                    others.remove(other)
                elif self._signs.is_silent(other, store_client.GONE_AFTER_PULSES):
                    others.remove(other)
                    if self._signs.has_joined(other):
                        dead.append(self._ask(partial(_name, other)))
            return not others

        _wait(have_left, seconds)
        return dead

    # Waiting

    def _say_who_is_missed(self) -> None:
        """Print, once for each, which missing processes this one waits for."""
        for other in self._watched:
            what = "gives no sign of life" if self._signs.has_joined(other) else "has not joined the job yet"
            key = f"process {other} {what}"
            if self._signs.is_silent(other, store_client.SPOKEN_AFTER_PULSES) and key not in self._said:
                self._said.add(key)
                if self.is_first(key) and not self._ask(partial(_has_left, other)):
                    patience = _seconds(self._signs.patience(other))
                    self._say(
                        f"waiting for {self._ask(partial(_name, other))}, which {what}; given up after {patience}"
                    )

    def _on_silence(self) -> bool:
        """Print, once, that this process waits for the store; returns whether to wait on for as long as it takes."""
        stopped = launcher.stopped_launcher()
        what = f"{launcher.address()}, which does not answer; given up after {_seconds(store_client.LOST_AFTER_PULSES)}"
        if stopped is not None:
            what = (
                f"{launcher.address()}, as long as process {stopped} is stopped; fg, or kill -CONT {stopped}, goes on"
            )
        # A process of each machine, since none can ask the others who says it.
        if what not in self._said and launcher.local_process_index() == 0:
            self._said.add(what)
            self._say(f"waiting for the launcher on {what}")
        return stopped is not None

    # The store

    def _ask(self, operation: Callable[[Store], T]) -> T:
        try:
            return self._client.ask(operation)
        except DistError as error:
            raise self._store_lost(error) from error

    def _add(self, key: str, number: int) -> int:
        return self._ask(lambda store: int(store.add(key, number)))

    def _store_lost(self, error: DistError) -> Halted:
        """Return why the store is gone. It ends with the launcher, this machine's or that of the first machine."""
        # A launcher's connections close a moment before its children become orphans.
        if _wait(self.shutdown.is_orphan, seconds=1):
            return Stopped(signal.SIGTERM, is_alone=True)
        return Failed(
            f"lost contact with the launcher on {launcher.address()} ({str(error).splitlines()[0]})", is_alone=True
        )

    def _pulse(self, store: Store) -> None:
        """Give a sign of life, look for those of others, and look for a reason to end until there is one."""
        try:
            store.add(f"beat/{self.process_index}", 1)
            self._report_published(store)
            for other in self._watched:
                self._signs.look_for(store, other)
            if self.shutdown.reason is None:
                self._look_for_reason(store)
        except DistError as error:
            if self.shutdown.reason is None:
                self.shutdown.set(self._store_lost(error))

    def _look_for_reason(self, store: Store) -> None:
        for other in self._watched:
            patience = self._signs.patience(other)
            if self._signs.is_silent(other, patience) and not _has_left(other, store):
                has_joined = self._signs.has_joined(other)
                what = "has given no sign of life for" if has_joined else "has not joined the job within"
                _set_reason(store, f"{_name(other, store)} {what} {_seconds(patience)}")
        if store.check(["halt"]):
            self.shutdown.set(_reason(store.get("halt")))


def _seconds(pulses: int) -> str:
    return f"{pulses * store_client.PULSE_SECONDS:.0f} s"


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, but not longer than this; returns whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return holds


def _has_left(process_index: int, store: Store) -> bool:
    return bool(store.check([f"left/{process_index}"]))


def _name(process_index: int, store: Store) -> str:
    key = f"name/{process_index}"
    return store.get(key).decode() if store.check([key]) else f"process {process_index}"


def _set_reason(store: Store, cause: str, exit_status: int = 1, signal_number: int | None = None) -> Halted:
    """Set the reason to end the job, where there is none yet; returns the one that counts."""
    return _reason(store.compare_set("halt", "", json.dumps([cause, exit_status, signal_number])))


def _reason(packed: bytes) -> Halted:
    cause, exit_status, signal_number = json.loads(packed)
    return Failed(cause, exit_status) if signal_number is None else Stopped(signal_number)
