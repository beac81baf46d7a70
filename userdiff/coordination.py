"""What processes tell each other, through a c10d store and nothing else: no collective can time out on a long job.

The store carries the frozen plan, the counter from which each process takes its next batch, progress, failed images,
and the one reason to halt. Every wait polls, so that signals are seen: `wait` and `get` on a TCPStore hold them back.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

POLL_SECONDS = 0.05
CONNECT_TIMEOUT = timedelta(seconds=60)


class Halted(Exception):
    """The job ends early."""


class Stopped(Halted):
    """A signal asked for it; what is done is kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class PeerFailed(Halted):
    """Another process failed; the text is its cause, and every process leaves with the exit status it named."""

    def __init__(self, cause: str, exit_status: int) -> None:
        super().__init__(cause)
        self.exit_status = exit_status


def connect(
    pending_signal: Callable[[], int | None] = lambda: None, timeout: timedelta = CONNECT_TIMEOUT
) -> "Coordinator":
    """Join the job as the process that the launcher says this is, or as the only one."""
    process_index, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Coordinator(open_store(num_processes, timeout), process_index, num_processes, pending_signal)


def open_store(num_processes: int, timeout: timedelta = CONNECT_TIMEOUT) -> Store:
    """Open the job's store: in memory for one process, else on the launcher's own address and port.

    The launcher's store outlives a group of processes that it restarts, so the restart count is part of every key.
    """
    if num_processes == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    run_id, restart = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"userdiff/{run_id}/{restart}", store)


@contextmanager
def pending_signal() -> Iterator[Callable[[], int | None]]:
    """Note SIGINT and SIGTERM instead of dying of them; the function given tells which has come, if any.

    A process whose launcher is gone counts as told to terminate: nobody else would.
    """
    came: list[int] = []
    parent = os.getppid()
    has_launcher = "LOCAL_RANK" in os.environ

    def note(signal_number: int, frame: FrameType | None) -> None:
        came.append(signal_number)

    def first_signal() -> int | None:
        if has_launcher and os.getppid() != parent:
            came.append(signal.SIGTERM)
        return came[0] if came else None

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield first_signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Coordinator:
    """One process's end of the store."""

    def __init__(
        self,
        store: Store,
        process_index: int,
        num_processes: int,
        pending_signal: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.process_index = process_index
        self.num_processes = num_processes
        self._store = store
        self._pending_signal = pending_signal

    @property
    def is_main_process(self) -> bool:
        """Whether this process plans, merges and speaks."""
        return self.process_index == 0

    def check(self) -> None:
        """Raise Stopped or PeerFailed if the job is to end early, and let the others know. Cheap: ask often."""
        signal_number = self._pending_signal()
        if signal_number is not None:
            self.halt(signal_number=signal_number)
        if self._store.check(["halt"]):
            reason = json.loads(self._store.get("halt"))
            if reason["signal_number"] is not None:
                raise Stopped(reason["signal_number"])
            raise PeerFailed(reason["cause"], reason["exit_status"])

    def halt(self, cause: str = "", signal_number: int | None = None, exit_status: int = 1) -> None:
        """Tell every process to end; the first reason given is the one that counts."""
        reason = json.dumps({"cause": cause, "signal_number": signal_number, "exit_status": exit_status})
        try:
            self._store.compare_set("halt", "", reason)
        except DistError as error:  # the launcher took its store along: as good as a stop
            raise Stopped(signal_number or signal.SIGTERM) from error

    def publish_plan(self, run: str, plan: bytes) -> None:
        """Hand the frozen plan to every process, with the identity hash it was made for (main process)."""
        self._store.set("plan", run.encode() + b"\n" + plan)  # type: ignore[arg-type] # torch stub: bytes go too

    def receive_plan(self) -> tuple[str, bytes]:
        """Wait for the identity hash and the frozen plan."""
        self._wait_until(lambda: bool(self._store.check(["plan"])))
        run, _, plan = bytes(self._store.get("plan")).partition(b"\n")
        return run.decode(), plan

    def next_batch(self) -> int:
        """Claim the next batch: 0, 1, 2, ... each given to one process alone."""
        return int(self._store.add("next_batch", 1)) - 1

    def count_published(self, number: int = 1) -> int:
        """Add to the images published by all processes in this run, and give their number; 0 just asks."""
        return int(self._store.add("published", number))

    def report_failed(self, user_id: int, image_index: int) -> None:
        """Note an image that could not be made."""
        key = int(self._store.add("num_failed", 1)) - 1
        self._store.set(f"failed/{key}", json.dumps([user_id, image_index]))

    def failed(self) -> list[tuple[int, int]]:
        """Collect the images that any process could not make, sorted. Complete once `wait_for_all` has returned."""
        keys = range(int(self._store.add("num_failed", 0)))
        items = [json.loads(self._store.get(f"failed/{key}")) for key in keys]
        return sorted((user_id, image_index) for user_id, image_index in items)

    def finish(self) -> None:
        """Say that this process has nothing left to compute or write."""
        self._store.add("finished", 1)

    def wait_for_all(self, on_poll: Callable[[], None]) -> None:
        """Wait until every process has finished, asking `on_poll` in between."""

        def all_finished() -> bool:
            on_poll()
            return int(self._store.add("finished", 0)) >= self.num_processes

        self._wait_until(all_finished)

    def say_once(self, say: Callable[[], None], patience_seconds: float = 30) -> None:
        """Have the main process say something before any process leaves; another one says it if the main cannot."""
        if self.is_main_process:
            say()
            self._store.set("said", "")
            return
        give_up = time.monotonic() + patience_seconds
        while not self._store.check(["said"]):
            if time.monotonic() > give_up:
                say()
                return
            time.sleep(POLL_SECONDS)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.check()
            time.sleep(POLL_SECONDS)
