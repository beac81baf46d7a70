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
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from torch.distributed import DistError, Store

from userdiff.config import UsageError
from userdiff.job import launcher, store_client
from userdiff.job.store_client import SignsOfLife, StoreClient
from userdiff.seeds import Item
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped

POLL_SECONDS = 0.05
MAIN_SECONDS = 10.0  # that others leave the main process to speak of what is wrong with the arguments or models

T = TypeVar("T")


def connect(shutdown: Shutdown) -> "Coordinator":
    """Join the job as the process that the launcher says this is, or as the only one."""
    return Coordinator(
        launcher.open_store,
        launcher.process_index(),
        launcher.num_processes(),
        launcher.machine_index(),
        launcher.num_machines(),
        shutdown=shutdown,
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
    ) -> None:
        self.process_index = process_index
        self.num_processes = num_processes
        self.machine_index = machine_index
        self.num_machines = num_machines
        self.name = f"process {process_index} on {socket.gethostname()}"  # as messages have it
        self.shutdown = shutdown or Shutdown()
        self._unreported = [0, 0]  # images and bytes published, of which the store has not heard
        self._count_lock = threading.Lock()
        self._signs = SignsOfLife()
        self._watched = range(1, num_processes) if process_index == 0 else range(1)
        self._client = StoreClient(open_store, self._pulse)
        self._ask(lambda store: store.set(f"host/{process_index}", socket.gethostname()))

    @property
    def is_main_process(self) -> bool:
        """True for the process that plans, merges and prints."""
        return self.process_index == 0

    def __enter__(self) -> "Coordinator":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with suppress(Halted):  # the store may be gone
            if isinstance(error, UsageError) and not self.is_main_process:
                self._wait_for_main()
            if error is not None:
                self.halt(error)
            self._ask(self._report_published)
            self._ask(lambda store: store.set(f"left/{self.process_index}", ""))
        self._client.close()

    # Ending early

    def check(self) -> None:
        """Raise Stopped or Failed if the job is to end early, and let the others know. Cheap: ask often."""
        try:
            self.shutdown.check()
        except Halted as reason:
            self.halt(reason)
            raise

    def halt(self, error: BaseException, cause: str | None = None) -> None:
        """Make every process end, for this cause or for an error here; the first reason is the one that counts."""
        if isinstance(error, Halted):
            self.shutdown.set(error)
        reason = {
            "signal_number": error.signal_number if isinstance(error, Stopped) else None,
            "cause": cause or f"{self.name}: {error or type(error).__name__}",
            "exit_status": getattr(error, "exit_status", 1),
        }
        first = self._ask(lambda store: store.compare_set("halt", "", json.dumps(reason)))
        self.shutdown.set(_halted(json.loads(first)))

    def _wait_for_main(self) -> None:
        """Leave the main process some time to find the same error, print it once for all, and end the job."""
        deadline = time.monotonic() + MAIN_SECONDS
        while time.monotonic() < deadline and self.shutdown.reason is None:
            time.sleep(POLL_SECONDS)

    def wait_until_left(self, seconds: float) -> list[str]:
        """Wait until the other processes have left or died, but not longer than this; returns the names of the dead."""
        others = {index for index in range(self.num_processes) if index != self.process_index}
        died: list[str] = []
        deadline = time.monotonic() + seconds
        while others and time.monotonic() < deadline:
            others -= {other for other in others if self._ask(partial(_has_left, other))}
            gone = [other for other in sorted(others) if self._signs.has_died(other, store_client.GONE_AFTER_PULSES)]
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

    def note_seen(self) -> None:
        """Note that a process of this machine has seen it."""
        self._ask(lambda store: store.set(f"seen/{self.machine_index}", ""))

    def main_host(self) -> str:
        """Return the host name of the main process."""
        return self._ask(lambda store: _host(store, 0))

    # The plan and its batches

    def publish_plan(self, run: str, numerics: Mapping[str, Any], plan: bytes) -> None:
        """Publish the frozen plan, with the identity hash and the numerics it is for (main process)."""
        message = json.dumps([run, numerics]).encode() + b"\n" + plan
        self._ask(lambda store: store.set("plan", message))  # type: ignore[arg-type] # bytes go too

    def receive_plan(self) -> tuple[str, dict[str, Any], bytes]:
        """Wait for what the main process publishes: (identity hash, its numerics, the frozen plan)."""
        self._wait_until(lambda store: bool(store.check(["plan"])))
        header, _, plan = self._ask(lambda store: bytes(store.get("plan"))).partition(b"\n")
        run, numerics = json.loads(header)
        return run, numerics, plan

    def next_batch(self) -> int:
        """Claim the next batch: 0, 1, 2, ..., each given to one process alone."""

        def claim(store: Store) -> int:
            self._report_published(store)
            return int(store.add("next_batch", 1)) - 1

        return self._ask(claim)

    def finish(self) -> None:
        """Note that this process has nothing left to compute or write."""
        self._ask(self._report_published)
        self._add("finished", 1)

    def wait_for_all(self, on_poll: Callable[[], None]) -> None:
        """Wait until every process has finished, calling `on_poll` in between."""

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
        """Return how many images all processes have published in this run, and their bytes."""
        self._ask(self._report_published)
        return self._add("published", 0), self._add("published_bytes", 0)

    def report(self, kind: str, item: Item, limit: float = math.inf) -> None:
        """Count an image of a kind, and note which one, if no more than `limit` have been.

        kind: `failed`, an image that could not be made, or `flat`, one of a single colour.
        """
        number = self._add(f"num_{kind}", 1) - 1
        if number < limit:
            self._ask(lambda store: store.set(f"{kind}/{number}", json.dumps(item)))

    def num_reported(self, kind: str) -> int:
        """Return how many images of a kind all processes have reported so far."""
        return self._add(f"num_{kind}", 0)

    def reported(self, kind: str, limit: float = math.inf) -> list[Item]:
        """Return the images of a kind that were noted, sorted. All are there once `wait_for_all` has returned."""
        keys = [f"{kind}/{number}" for number in range(int(min(self.num_reported(kind), limit)))]
        items = [json.loads(self._ask(lambda store, key=key: store.get(key))) for key in keys]  # type: ignore[misc]
        return sorted((user_id, image_index) for user_id, image_index in items)

    def is_first(self, what: str) -> bool:
        """Return whether no process has asked this of the same thing before."""
        return self._add(f"asked/{what}", 1) == 1

    # The store

    def _ask(self, operation: Callable[[Store], T]) -> T:
        try:
            return self._client.ask(operation)
        except DistError as error:
            raise self._store_lost(error) from error

    def _add(self, key: str, number: int) -> int:
        return self._ask(lambda store: int(store.add(key, number)))

    def _wait_until(self, condition: Callable[[Store], bool], on_poll: Callable[[], None] = lambda: None) -> None:
        while not self._ask(condition):
            self.check()
            on_poll()
            time.sleep(POLL_SECONDS)

    def _store_lost(self, error: DistError) -> Halted:
        """Return why the store is gone: it lives and dies with the launcher, ours or that of the first machine."""
        deadline = time.monotonic() + 1  # its connections close a moment before its children become orphans
        while time.monotonic() < deadline:
            if self.shutdown.is_orphan():
                return Stopped(signal.SIGTERM, is_alone=True)
            time.sleep(POLL_SECONDS)
        return Failed(
            f"lost contact with the launcher on {launcher.address()} ({str(error).splitlines()[0]})", is_alone=True
        )

    def _pulse(self, store: Store) -> None:
        """Give a sign of life, look for one from the others and, until there is a reason to end, look for one."""
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
            if self._signs.has_died(other, store_client.LOST_AFTER_PULSES) and not _has_left(other, store):
                seconds = store_client.LOST_AFTER_PULSES * store_client.PULSE_SECONDS
                cause = f"{_name(other, store)} has given no sign of life for {seconds:.0f} s"
                reason = {"signal_number": None, "cause": cause, "exit_status": 1}
                store.compare_set("halt", "", json.dumps(reason))
        if store.check(["halt"]):
            self.shutdown.set(_halted(json.loads(store.get("halt"))))


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
