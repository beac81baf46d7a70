"""What the processes of a job tell each other, through a c10d store and nothing else: no collective can time out.

The store carries the plan of each wave, the counter from which each process takes its next batch, progress, failed
images, a sign of life from every process, and the one reason to end early. Of a group of processes it holds:

| key | value | set by |
|---|---|---|
| `kind` | what tells a group that began with this process from another, see `group` | main |
| `claim/N`, `num_claims/N` | who is process N, and how many have been so far | process N |
| `name/N`, `beat/N` | what messages call it; counts its pulses | process N |
| `left/N` | why it left, "" if in order; `here` where another took its place | process N |
| `works_in/N` | the wave it works in, 0 for none | process N |
| `waves`, `plan/K`, `next_batch/K` | how many waves there are; of each its plan, and the batches claimed | main; any |
| `published`, `published_bytes`, `num_KIND`, `KIND/I` | progress, and images to tell of | any |
| `run`, `shown`, `seen/MACHINE` | what all need to know of the run and its folder | main; a machine |
| `ended` | that there will be no further wave: `complete` or `incomplete` | main |
| `halt` | the one reason to end early | any |
"""

import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

from torch.distributed import DistError, Store

from userdiff.config import UsageError
from userdiff.job import group, launcher, store_client
from userdiff.job.group import Place
from userdiff.job.store_client import SignsOfLife, StoreClient
from userdiff.seeds import Item
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped

MAX_NOTED = {"failed": math.inf, "flat": 1000}
"""How many images of a kind are noted by name. A model gone wrong may make nothing but images of one colour."""
POLL_SECONDS = 0.05
LEAVE_SECONDS = 5.0  # for processes that have nothing left to do
MAIN_SECONDS = 10.0  # that others leave the main process to print what is wrong with the arguments or models

_SLOW_PULSES = 60  # that a process may take for its last batch before the main process says that it waits for it
_HAS_NOT_JOINED = "has not joined the job yet"

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
    """One process's end of the store. Leaving its `with` block by an exception halts the others.

    The job does without a process that is lost: one that gives no sign of life, or that a signal has ended together with its
    machine. Without the main process, it ends.

    Where the launcher starts processes again, a process may hold the place of one that is gone.
    """

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
        self._watched = (
            range(1, num_processes) if process_index == 0 else range(1)
        )  # all watch the main process, it watches all
        self._wave = 0  # the one that this process works in; 0 before the first
        self._needs_nobody = False  # for the main process: whoever goes now is not missed
        self._gone: set[int] = set()  # for the main process: who is gone now, and not waited for
        self._lost: dict[
            int, str
        ] = {}  # for the main process: who was ever gone, and in which way; its part is not trusted
        self._told: set[int] = set()  # those of them who `newly_lost` has returned
        self.num_losses = 0  # for the main process: how often it has found a process gone
        self._launch = ""
        self._has_heard = False  # whether the reason to end came from another process
        self._say = say
        self._said: set[str] = set()
        self._place: Place | None = None
        self._client = StoreClient(open_store, self._pulse, self._on_silence)
        try:
            self._place = group.join(self._ask_launcher, process_index, num_processes, self._patience_to_join())
            self._launch = self._ask_launcher(lambda store: group.value_of(store, "launch"))
            self._add(f"beat/{process_index}", 1)
            self._set_wave(0)
            self.set(f"name/{process_index}", self.name)
        except BaseException:
            self._client.close()
            raise

    @property
    def is_main_process(self) -> bool:
        """True for the process that plans, merges and prints."""
        return self.process_index == 0

    @property
    def part_number(self) -> int:
        """The number of this process's part of the manifest: its own, whoever was here before."""
        return self.process_index + self.num_before * self.num_processes

    @property
    def num_before(self) -> int:
        """How many processes had this one's place before it, and are gone."""
        return self._place.num_before if self._place else 0

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
            self.set(f"left/{self.process_index}", str(error or ""))
            if self.is_main_process and not launcher.has_own_store():
                self.wait_until_left(LEAVE_SECONDS)  # the store goes with this process
        self._client.close()

    # What one process tells the others

    def set(self, key: str, value: str | bytes = "") -> None:
        """Set a value, which any process may wait for."""
        self._ask(lambda store: store.set(key, value))  # type: ignore[arg-type] # bytes go too

    def has(self, key: str) -> bool:
        """Return whether some process has set a value."""
        return self._ask(lambda store: store.check([key]))

    def wait_until(self, condition: Callable[[], bool], on_poll: Callable[[], None] = lambda: None) -> None:
        """Wait until something is so, calling `on_poll` until then; what it raises, or a reason to end, ends the wait."""
        while not condition():
            self.check()
            self._say_who_is_missed()
            on_poll()
            time.sleep(POLL_SECONDS)

    def wait_for(self, key: str, on_poll: Callable[[], None] = lambda: None) -> bytes:
        """Return a value once a process has set it, calling `on_poll` until then."""
        self.wait_until(partial(self.has, key), on_poll)
        return self._ask(partial(_get, key))

    def is_first(self, what: str) -> bool:
        """Return whether no process has asked this of the same thing before."""
        return self._add(f"asked/{what}", 1) == 1

    def launch_id(self) -> str | None:
        """Return what is the same for all groups of processes of this launch alone; None where there is no launcher."""
        return self._launch or None

    # Waves: the main process publishes a plan, all claim its batches, and what is missing then is the next one

    def begin_wave(self, plan: bytes) -> None:
        """Publish the plan of the next wave, and take part in it (main process)."""
        number = self._wave + 1
        self.set(f"plan/{number}", plan)
        self._set_wave(number)
        self._add("waves", 1)

    def waves(self) -> Iterator[bytes]:
        """Yield the plan of the wave that is under way, then of every later one, and take part in it."""
        while True:
            self.wait_until(lambda: self.has_ended() or self._add("waves", 0) > self._wave)
            if self.has_ended():
                return
            number = self._add("waves", 0)
            plan = self.wait_for(f"plan/{number}")
            self._set_wave(number)
            yield plan
            self.end_wave()

    def next_batch(self) -> int:
        """Claim the next batch of the wave: 0, 1, 2, ..., each given to one process alone."""

        def claim(store: Store) -> int:
            self._report_published(store)
            return int(store.add(f"next_batch/{self._wave}", 1)) - 1

        return self._ask(claim)

    def end_wave(self) -> None:
        """Note that this process has nothing left to compute or write in this wave."""
        self._ask(self._report_published)
        self.set(f"works_in/{self.process_index}", "0")

    def wait_for_others(self, on_poll: Callable[[], None]) -> None:
        """Wait until no other process works in this wave but those that are gone, calling `on_poll` until then.

        Call it when this process has claimed beyond the last batch: whoever has yet to come will then find none.
        """
        slow_at = time.monotonic() + _SLOW_PULSES * store_client.PULSE_SECONDS
        for other in self._watched:

            def look(other: int = other) -> None:
                on_poll()
                if time.monotonic() > slow_at and (key := f"process {other} is slow") not in self._said:
                    self._said.add(key)
                    self._say(f"waiting for {self._ask(partial(_name, other))}, which is still at its last batch")

            self.wait_until(partial(self._is_free, other), look)
        for other in self._watched:  # restarted by its launcher before it was missed
            if other not in self._lost and self._add(f"num_claims/{other}", 0) > 1:
                self._lost[other] = f"{self._ask(partial(_name, other))}, started again by its launcher"
                self.num_losses += 1

    def _is_free(self, other: int) -> bool:
        return other in self._gone or not self._works(other)

    def end_waves(self, *, is_complete: bool) -> None:
        """Let the other processes go: there will be no further wave (main process)."""
        self._needs_nobody = True
        self.set("ended", group.COMPLETE if is_complete else group.INCOMPLETE)

    def has_ended(self) -> bool:
        """Return whether there will be no further wave."""
        return self.has("ended")

    def lost(self) -> dict[int, str]:
        """Return the processes that the job has done without for a while, or from then on: index -> which, and how."""
        return dict(self._lost)

    def newly_lost(self) -> list[str]:
        """Return those of them that this has not returned before."""
        lost = self.lost()
        new = [which for index, which in lost.items() if index not in self._told]
        self._told |= set(lost)
        return new

    def has_lost_part(self, part_number: int) -> bool:
        """Return whether a part of the manifest is that of a process that was lost."""
        return part_number % self.num_processes in self._lost

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
        keys = [f"{kind}/{number + 1}" for number in range(int(min(self.num_reported(kind), MAX_NOTED[kind])))]
        # Who counts an image may be lost before it has noted which.
        items = [json.loads(self._ask(partial(_get, key))) for key in keys if self.has(key)]
        return sorted({(user_id, image_index) for user_id, image_index in items})

    # Ending early

    def check(self) -> None:
        """Raise Stopped or Failed if the job is to end early, and tell the others. Cheap: call it often."""
        try:
            self.shutdown.check()
        except Halted as reason:
            if not self._has_heard:
                self.halt(reason)
            raise

    def halt(self, error: BaseException, cause: str | None = None) -> Halted | None:
        """End every process because of this error, in the words of `cause` if given; returns the reason that counts, the first.

        A signal that ends the processes of another machine than the main process's ends these alone.
        """
        if isinstance(error, Halted):
            self.shutdown.set(error)
        if self._has_heard:
            return self.shutdown.reason
        if isinstance(error, Stopped) and self.machine_index > 0:
            error.others_go_on = True
            return error
        cause = cause or f"{self.name}: {str(error) or type(error).__name__}"
        exit_status = getattr(error, "exit_status", 1)
        signal_number = error.signal_number if isinstance(error, Stopped) else None
        reason = self._ask(lambda store: group.set_reason(store, cause, exit_status, signal_number))
        self.shutdown.set(reason)
        return reason

    def wait_until_left(self, seconds: float) -> list[str]:
        """Wait until the other processes have left or died, but not longer than this; returns the names of the dead.

        Those that were lost before are not among these.
        """
        others = {index for index in range(self.num_processes) if index != self.process_index}
        dead: list[str] = []

        def have_left() -> bool:
            for other in sorted(others):
                if self._has_left(other):
                    others.remove(other)
                elif self._signs.is_silent(other, store_client.GONE_AFTER_PULSES):
                    others.remove(other)
                    if self._signs.has_joined(other) and other not in self._lost:
                        dead.append(self._ask(partial(_name, other)))
            return not others

        _wait(have_left, seconds)
        return dead

    def _has_left(self, other: int) -> bool:
        return self._ask(lambda store: group.has_left(store, other))

    # Waiting

    def _say_who_is_missed(self) -> None:
        """Print, once for each, which missing processes this one waits for."""
        for other in self._watched:
            has_joined = self._signs.has_joined(other)
            what = "gives no sign of life" if has_joined else _HAS_NOT_JOINED
            key = f"process {other} {what}"
            if not self._signs.is_silent(other, store_client.SPOKEN_AFTER_PULSES) or key in self._said:
                continue
            if self._wave and self.is_main_process and not self._works(other):
                continue  # nobody waits for it
            self._said.add(key)
            if self.is_first(key) and not self._has_left(other):
                given_up = f"; given up after {_seconds(store_client.LOST_AFTER_PULSES)}" if has_joined else ""
                self._say(f"waiting for {self._ask(partial(_name, other))}, which {what}{given_up}")

    def _patience_to_join(self) -> Callable[[], None]:
        """Return what to call at each look for the main process: prints for whom it waits, and gives up in the end."""
        num_looks, patience = 0, _seconds(store_client.JOIN_PULSES)

        def on_poll() -> None:
            nonlocal num_looks
            num_looks += 1
            self.shutdown.check()
            num_pulses, rest = divmod(num_looks, group.LOOKS_A_PULSE)
            if rest == 0 and num_pulses == store_client.SPOKEN_AFTER_PULSES and launcher.local_process_index() == 0:
                self._say(f"waiting for process 0, which {_HAS_NOT_JOINED}; given up after {patience}")
            if num_pulses >= store_client.JOIN_PULSES:
                raise Failed(f"process 0 has not joined the job within {patience}", is_alone=True)

        return on_poll

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

    def _ask_launcher(self, operation: Callable[[Store], T]) -> T:
        """Ask the part of the store that all groups of this launch share."""
        try:
            return self._client.ask(operation)
        except DistError as error:
            raise self._store_lost(error) from error

    def _ask(self, operation: Callable[[Store], T]) -> T:
        return self._ask_launcher(lambda store: operation(self._of_group(store)))

    def _of_group(self, store: Store) -> Store:
        assert self._place is not None  # nothing else is asked before
        return group.prefixed(self._place.group, store)

    def _add(self, key: str, number: int) -> int:
        return self._ask(lambda store: int(store.add(key, number)))

    def _works(self, other: int) -> bool:
        """Return whether another process works in this one's wave."""
        return self._ask(partial(_works_in, other)) == self._wave

    def _set_wave(self, number: int) -> None:
        self._wave = number
        self.set(f"works_in/{self.process_index}", str(number))

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
        if self._place is None:
            return
        try:
            store = self._of_group(store)
            store.add(f"beat/{self.process_index}", 1)
            self._report_published(store)
            for other in self._watched:
                self._signs.look_for(store, other)
            if self.is_main_process:
                self._look_for_lost(store)
            if self.shutdown.reason is None:
                self._look_for_reason(store)
        except DistError as error:
            if self.shutdown.reason is None:
                self.shutdown.set(self._store_lost(error))

    def _look_for_lost(self, store: Store) -> None:
        """Note who is gone before the job needs nobody any longer (main process)."""
        gone = {}
        for other in self._watched:
            if self._needs_nobody or not self._signs.has_joined(other):
                continue
            if self._signs.is_silent(other, store_client.GONE_AFTER_PULSES) and group.has_left(store, other):
                if reason := store.get(f"left/{other}").decode():
                    gone[other] = f"{_name(other, store)}, {reason}"
            elif self._signs.is_silent(other, store_client.LOST_AFTER_PULSES):
                gone[other] = f"{_name(other, store)}, no sign of life"
        self.num_losses += len(gone.keys() - self._gone)
        self._lost |= gone
        self._gone = set(gone)

    def _look_for_reason(self, store: Store) -> None:
        patience = store_client.LOST_AFTER_PULSES
        if not self.is_main_process and self._signs.is_silent(0, patience) and not group.has_left(store, 0):
            group.set_reason(store, f"{_name(0, store)} has given no sign of life for {_seconds(patience)}")
        if store.check(["halt"]):
            self._has_heard = True
            self.shutdown.set(group.reason(store.get("halt")))


def _seconds(pulses: int) -> str:
    return f"{pulses * store_client.PULSE_SECONDS:.0f} s"


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, but not longer than this; returns whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return holds


def _get(key: str, store: Store) -> bytes:
    return bytes(store.get(key))


def _works_in(process_index: int, store: Store) -> int:
    """Return in which wave a process works; 0 for none."""
    key = f"works_in/{process_index}"
    return int(store.get(key)) if store.check([key]) else 0


def _name(process_index: int, store: Store) -> str:
    key = f"name/{process_index}"
    return store.get(key).decode() if store.check([key]) else f"process {process_index}"
