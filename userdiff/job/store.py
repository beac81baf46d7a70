"""What processes tell each other, through a c10d store and nothing else: no collective can time out on a long job.

The store carries the frozen plan, the counter from which each process takes its next batch, progress, failed images,
a sign of life from everyone, and the one reason to halt.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from torch.distributed import DistError, Store

from userdiff.job import launcher
from userdiff.job import store_client as contact
from userdiff.shutdown import Failed, Halted, Interrupt, Stopped

POLL_SECONDS = 0.05

T = TypeVar("T")


def connect(interrupt: Interrupt | None = None, patience: int | None = None) -> "Coordinator":
    """Join the job as the process that the launcher says this is, or as the only one."""
    return Coordinator(
        launcher.open_store,
        launcher.rank(),
        launcher.world_size(),
        launcher.machine(),
        launcher.num_machines(),
        interrupt=interrupt,
        patience=patience,
    )


class Coordinator:
    """One process's end of the store. Leaving its `with` block by an exception halts the others."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        process_index: int,
        num_processes: int,
        machine: int = 0,
        num_machines: int = 1,
        *,
        interrupt: Interrupt | None = None,
        patience: int | None = None,
    ) -> None:
        self.process_index = process_index
        self.num_processes = num_processes
        self.machine = machine
        self.num_machines = num_machines
        self.name = f"process {process_index} on {socket.gethostname()}"  # as messages say it
        self.interrupt = interrupt or Interrupt()
        self._unreported = [0, 0]  # images and bytes published, of which the store has not heard
        self._count_lock = threading.Lock()
        self._parent = os.getppid()
        self._watch = contact.Watch()
        self._watched = range(1, num_processes) if process_index == 0 else range(1)
        self._line = contact.Line(open_store, self._pulse, patience or contact.LOST_AFTER_PULSES)
        self._ask(lambda store: store.set(f"host/{process_index}", socket.gethostname()))

    @property
    def is_main_process(self) -> bool:
        """Whether this process plans, merges and speaks."""
        return self.process_index == 0

    def __enter__(self) -> "Coordinator":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with suppress(Halted):  # the store may be gone
            if error is not None:
                self.halt(error)
            self._ask(self._report_published)
            self._ask(lambda store: store.set(f"left/{self.process_index}", ""))
        self._line.close()

    # Ending

    def check(self) -> None:
        """Raise Stopped or Failed if the job is to end early, and let the others know. Cheap: ask often."""
        try:
            self.interrupt.check()
        except Halted as reason:
            self.halt(reason)
            raise

    def halt(self, error: BaseException, cause: str | None = None) -> None:
        """Tell every process to end, of this cause or of an error here; the first reason given is the one that counts."""
        reason = {
            "signal_number": error.signal_number if isinstance(error, Stopped) else None,
            "cause": cause or f"{self.name}: {error or type(error).__name__}",
            "exit_status": getattr(error, "exit_status", 1),
        }
        self._ask(lambda store: store.compare_set("halt", "", json.dumps(reason)))

    def wait_until_left(self, seconds: float) -> list[str]:
        """Wait until the other processes have left or died, but not longer than this; gives who has died."""
        others = {index for index in range(self.num_processes) if index != self.process_index}
        died: list[str] = []
        deadline = time.monotonic() + seconds
        while others and time.monotonic() < deadline:
            others -= {other for other in others if self._ask(partial(_has_left, other))}
            gone = [other for other in sorted(others) if self._watch.has_died(other, contact.GONE_AFTER_PULSES)]
            died += [self._ask(partial(_name, other)) for other in gone]
            others -= set(gone)
            time.sleep(POLL_SECONDS)
        return died

    # What all machines must see

    def show(self, path: str) -> None:
        """Name a file, and wait until a process of every other machine has seen it (main process)."""
        self._ask(lambda store: store.set("shown", path))
        seen = [f"seen/{machine}" for machine in range(1, self.num_machines)]
        self._wait_until(lambda store: bool(store.check(seen)))

    def wait_for_shown(self) -> str:
        """Wait for the name of the file that the main process shows."""
        self._wait_until(lambda store: bool(store.check(["shown"])))
        return self._ask(lambda store: store.get("shown")).decode()

    def say_seen(self) -> None:
        """Say that a process of this machine has seen it."""
        self._ask(lambda store: store.set(f"seen/{self.machine}", ""))

    def main_host(self) -> str:
        """Give the host name of the main process."""
        return self._ask(lambda store: _host(store, 0))

    # The plan and its batches

    def publish_plan(self, run: str, numerics: Mapping[str, Any], plan: bytes) -> None:
        """Hand the frozen plan to every process, with the identity hash and the numerics it is for (main process)."""
        message = json.dumps([run, numerics]).encode() + b"\n" + plan
        self._ask(lambda store: store.set("plan", message))  # type: ignore[arg-type] # bytes go too

    def receive_plan(self) -> tuple[str, dict[str, Any], bytes]:
        """Wait for the identity hash, the main process's numerics, and the frozen plan."""
        self._wait_until(lambda store: bool(store.check(["plan"])))
        header, _, plan = self._ask(lambda store: bytes(store.get("plan"))).partition(b"\n")
        run, numerics = json.loads(header)
        return run, numerics, plan

    def next_batch(self) -> int:
        """Claim the next batch: 0, 1, 2, ... each given to one process alone."""

        def claim(store: Store) -> int:
            self._report_published(store)
            return int(store.add("next_batch", 1)) - 1

        return self._ask(claim)

    def finish(self) -> None:
        """Say that this process has nothing left to compute or write."""
        self._ask(self._report_published)
        self._add("finished", 1)

    def wait_for_all(self, on_poll: Callable[[], None]) -> None:
        """Wait until every process has finished, asking `on_poll` in between."""

        def all_finished(store: Store) -> bool:
            return int(store.add("finished", 0)) >= self.num_processes

        self._wait_until(all_finished, on_poll)

    # Progress and failures

    def count_published(self, num_images: int, num_bytes: int) -> None:
        """Add to what this process has published, from any thread; the others learn of it with its next batch or pulse."""
        with self._count_lock:
            self._unreported[0] += num_images
            self._unreported[1] += num_bytes

    def _report_published(self, store: Store) -> None:
        with self._count_lock:
            num_images, num_bytes = self._unreported
            self._unreported = [0, 0]
        if num_images:
            store.add("published_bytes", num_bytes)
            store.add("published", num_images)

    def published(self) -> tuple[int, int]:
        """Give the number of images that all processes have published in this run, and of their bytes."""
        self._ask(self._report_published)
        return self._add("published", 0), self._add("published_bytes", 0)

    def report_failed(self, user_id: int, image_index: int) -> None:
        """Note an image that could not be made."""
        key = self._add("num_failed", 1) - 1
        self._ask(lambda store: store.set(f"failed/{key}", json.dumps([user_id, image_index])))

    def num_failed(self) -> int:
        """Give the number of images that any process could not make, so far."""
        return self._add("num_failed", 0)

    def failed(self) -> list[tuple[int, int]]:
        """Collect the images that any process could not make, sorted. Complete once `wait_for_all` has returned."""
        keys = [f"failed/{key}" for key in range(self.num_failed())]
        items = [json.loads(self._ask(lambda store, key=key: store.get(key))) for key in keys]  # type: ignore[misc]
        return sorted((user_id, image_index) for user_id, image_index in items)

    def is_first(self, what: str) -> bool:
        """Whether no process has asked this of the same before."""
        return self._add(f"asked/{what}", 1) == 1

    def say_once(self, say: Callable[[], None]) -> None:
        """Have the main process say something before any process leaves; one of the others says it if the main is gone.

        It is gone if it gives no sign of life while it has not spoken; before its first one it may be loading torch.
        """
        while not self.is_main_process and not self._watch.has_died(0, contact.GONE_AFTER_PULSES):
            if self._ask(lambda store: store.check(["said"])):
                return
            time.sleep(POLL_SECONDS)
        if self.is_main_process or self.is_first("speak"):
            say()
            self._ask(lambda store: store.set("said", ""))

    # The store

    def _ask(self, operation: Callable[[Store], T]) -> T:
        try:
            return self._line.ask(operation)
        except DistError as error:
            raise self._contact_lost(error) from error

    def _add(self, key: str, number: int) -> int:
        return self._ask(lambda store: int(store.add(key, number)))

    def _wait_until(self, condition: Callable[[Store], bool], on_poll: Callable[[], None] = lambda: None) -> None:
        while not self._ask(condition):
            self.check()
            on_poll()
            time.sleep(POLL_SECONDS)

    def _contact_lost(self, error: DistError) -> Halted:
        """Tell why the store is gone: it lives and dies with the launcher, ours or that of the first machine."""
        deadline = time.monotonic() + 1  # its connections close a moment before its children become orphans
        while time.monotonic() < deadline:
            if launcher.is_gone(self._parent):
                return Stopped(signal.SIGTERM, is_alone=True)
            time.sleep(POLL_SECONDS)
        return Failed(
            f"lost contact with the launcher on {launcher.address()} ({str(error).splitlines()[0]})", is_alone=True
        )

    def _pulse(self, store: Store) -> None:
        """Give a sign of life, look for one from the others and, until there is a reason to end, look out for one."""
        try:
            store.add(f"beat/{self.process_index}", 1)
            self._report_published(store)
            for other in self._watched:
                self._watch.look_for(store, other)
            if self.interrupt.reason is None:
                self._look_out(store)
        except DistError as error:
            if self.interrupt.reason is None:
                self.interrupt.set(self._contact_lost(error))

    def _look_out(self, store: Store) -> None:
        if launcher.is_gone(self._parent):
            self.interrupt.set(Stopped(signal.SIGTERM, is_alone=True))
        for other in self._watched:
            if self._watch.has_died(other, contact.LOST_AFTER_PULSES) and not _has_left(other, store):
                seconds = contact.LOST_AFTER_PULSES * contact.PULSE_SECONDS
                cause = f"{_name(other, store)} has given no sign of life for {seconds:.0f} s"
                reason = {"signal_number": None, "cause": cause, "exit_status": 1}
                store.compare_set("halt", "", json.dumps(reason))
        if store.check(["halt"]):
            self.interrupt.set(_halted(json.loads(store.get("halt"))))


def _has_left(process_index: int, store: Store) -> bool:
    return bool(store.check([f"left/{process_index}"]))


def _halted(reason: dict[str, Any]) -> Halted:
    if reason["signal_number"] is not None:
        return Stopped(reason["signal_number"])
    return Failed(reason["cause"], reason["exit_status"])


def _name(process_index: int, store: Store) -> str:
    return f"process {process_index} on {_host(store, process_index)}"


def _host(store: Store, process_index: int) -> str:
    key = f"host/{process_index}"
    return store.get(key).decode() if store.check([key]) else "an unknown machine"
