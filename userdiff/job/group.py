"""How a process finds the others of its job in the launcher's store: in the group that a main process has begun.

A launcher may restart one machine's processes or those of all machines, and their environment does not tell which of them
belong together: torchrun counts no restart where a machine has joined, and machines count theirs apart. So a main process
begins a group under a new number, which ends the one before, and the others join the latest one whose main process gives
signs of life.
"""

import json
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from torch.distributed import PrefixStore, Store

from userdiff.job import launcher, store_client
from userdiff.shutdown import Failed, Halted, Stopped

T = TypeVar("T")

LOOKS_A_PULSE = 4
COMPLETE, INCOMPLETE = "complete", "incomplete"
"""What the main process says of the dataset when it lets the others go, under the key `ended`."""
HERE = "here"
"""Under the key `left/N`, of a process that took the place of one that had left."""


class JobIsOverError(Halted):
    """The job was complete before this process came."""

    def __init__(self) -> None:
        super().__init__("the job is over", 0)


class Place(NamedTuple):
    """What a process is in its group."""

    group: int
    """The number of the group in its launch: 1, 2, 3, ..."""
    num_before: int
    """How many processes had the same index in the group before this one, and are gone."""


class Ask(Protocol):
    """Asks the launcher's store: returns what the operation does."""

    def __call__(self, operation: Callable[[Store], T]) -> T: ...


def join(ask: Ask, process_index: int, num_processes: int, on_poll: Callable[[], None]) -> Place:
    """Begin a group (the main process), or take this process's place in the latest one.

    A process takes the place of one with its index that is gone. Raises ForeignLaunchError where that one is alive, and
    JobIsOverError where the latest group has made all.
    on_poll: is called while this waits for a main process, or looks for signs of life; what it raises ends that.
    """
    kind = f"{num_processes} processes, restart {launcher.restart_count()}"
    if process_index == 0:
        return _begin(ask, kind, on_poll)
    while True:
        group = _latest(ask)
        if group:
            is_alive = _is_alive(ask, group, 0, on_poll)
            if not is_alive and _end(ask, group) == COMPLETE:
                raise JobIsOverError
            # One that began together with this process, and has broken off before it came, tells it why.
            if is_alive or (_has_broken_off(ask, group) and _kind(ask, group) == kind):
                place = _take(ask, group, process_index, on_poll, may_replace=is_alive)
                if place is not None:
                    return place
        on_poll()
        time.sleep(store_client.PULSE_SECONDS / LOOKS_A_PULSE)


def prefixed(group: int, store: Store) -> Store:
    """Return the part of the launcher's store that the processes of a group share."""
    return PrefixStore(str(group), store)


def _begin(ask: Ask, kind: str, on_poll: Callable[[], None]) -> Place:
    latest = _latest(ask)
    if latest and _is_alive(ask, latest, 0, on_poll):
        launcher.refuse_place(_claim(ask, latest, 0, ""))
    if latest and not _end(ask, latest):
        # Whoever is left of it would hold the folder until it missed its main process.
        ask(lambda store: set_reason(prefixed(latest, store), "the launcher has started the main process again"))
    number = ask(lambda store: int(store.add("num_begun", 1)))
    ask(lambda store: prefixed(number, store).set("kind", kind))
    _claim(ask, number, 0, "")
    ask(lambda store: store.set("latest", str(number)))
    return Place(number, 0)


def _take(ask: Ask, group: int, process_index: int, on_poll: Callable[[], None], *, may_replace: bool) -> Place | None:
    """Take this process's place in a group; returns None where it is to wait for the next one."""
    me = launcher.this_process()
    holder = _claim(ask, group, process_index, "")
    if holder != me:
        if _is_alive(ask, group, process_index, on_poll):
            launcher.refuse_place(holder)
        if not may_replace or _claim(ask, group, process_index, holder) != me:
            return None
    num_claims = ask(lambda store: int(prefixed(group, store).add(f"num_claims/{process_index}", 1)))
    if num_claims > 1:
        ask(lambda store: prefixed(group, store).set(f"left/{process_index}", HERE))
    return Place(group, num_claims - 1)


def _claim(ask: Ask, group: int, process_index: int, holder: str) -> str:
    """Take a place from its holder, "" for nobody; returns who holds it now."""
    key, me = f"claim/{process_index}", launcher.this_process()
    return ask(lambda store: bytes(prefixed(group, store).compare_set(key, holder, me)).decode())


def _kind(ask: Ask, group: int) -> str:
    return ask(lambda store: prefixed(group, store).get("kind").decode())


def _end(ask: Ask, group: int) -> str:
    """Return what the main process of a group has said of the dataset when it let the others go; "" before that."""
    return ask(lambda store: value_of(prefixed(group, store), "ended"))


def _has_broken_off(ask: Ask, group: int) -> bool:
    """Return whether a group was ended early, or its main process has left it."""
    return ask(lambda store: any(prefixed(group, store).check([key]) for key in ("halt", "left/0")))


def _latest(ask: Ask) -> int:
    """Return the number of the latest group; 0 for none."""
    return ask(lambda store: int(store.get("latest")) if store.check(["latest"]) else 0)


def _is_alive(ask: Ask, group: int, process_index: int, on_poll: Callable[[], None]) -> bool:
    """Return whether a process of a group gives a sign of life within GONE_AFTER_PULSES."""

    def beat(store: Store) -> int:
        of_group = prefixed(group, store)
        return -1 if has_left(of_group, process_index) else int(of_group.add(f"beat/{process_index}", 0))

    first = ask(beat)
    for _ in range(store_client.GONE_AFTER_PULSES * LOOKS_A_PULSE):
        now = ask(beat)
        if now < 0:
            return False
        if now != first:
            return True
        on_poll()
        time.sleep(store_client.PULSE_SECONDS / LOOKS_A_PULSE)
    return False


# What a group's part of the store says -------------------------------------------------------------------------------


def value_of(store: Store, key: str) -> str:
    """Return the text under a key; "" where there is none."""
    return store.get(key).decode() if store.check([key]) else ""


def has_left(store: Store, process_index: int) -> bool:
    """Return whether a process has left the group, and no other has taken its place since."""
    key = f"left/{process_index}"
    return bool(store.check([key])) and store.get(key).decode() != HERE


def set_reason(store: Store, cause: str, exit_status: int = 1, signal_number: int | None = None) -> Halted:
    """Set the reason to end the group, where there is none yet; returns the one that counts."""
    return reason(store.compare_set("halt", "", json.dumps([cause, exit_status, signal_number])))


def reason(packed: bytes) -> Halted:
    """Unpack the reason to end a group, as it lies under the key `halt`."""
    cause, exit_status, signal_number = json.loads(packed)
    return Failed(cause, exit_status) if signal_number is None else Stopped(signal_number)
