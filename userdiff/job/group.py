"""How a process finds the others of its job in the launcher's store: in the group that a main process has begun.

A launcher may restart one machine's processes or those of all machines, and their environment does not tell which of them
belong together: torchrun counts no restart where a machine has joined, and machines count theirs apart. So a main process
begins a group under a new number, and the others join the latest one whose main process gives signs of life.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from torch.distributed import PrefixStore, Store

from userdiff.job import launcher, store_client

T = TypeVar("T")

LOOKS_A_PULSE = 4


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

    A process takes the place of one with its index that is gone. Raises ForeignLaunchError where that one is alive.
    on_poll: is called while this waits for a main process, or looks for signs of life; what it raises ends that.
    """
    kind = f"{num_processes} processes, restart {launcher.restart_count()}"
    if process_index == 0:
        return _begin(ask, kind, on_poll)
    while True:
        group = _latest(ask)
        if group:
            is_alive = _is_alive(ask, group, 0, on_poll)
            # Its job may be over before this process comes.
            if is_alive or (_is_over(ask, group) and _kind(ask, group) == kind):
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
    ask(lambda store: prefixed(group, store).delete_key(f"left/{process_index}"))
    return Place(group, num_claims - 1)


def _claim(ask: Ask, group: int, process_index: int, holder: str) -> str:
    """Take a place from its holder, "" for nobody; returns who holds it now."""
    key, me = f"claim/{process_index}", launcher.this_process()
    return ask(lambda store: bytes(prefixed(group, store).compare_set(key, holder, me)).decode())


def _kind(ask: Ask, group: int) -> str:
    return ask(lambda store: prefixed(group, store).get("kind").decode())


def _is_over(ask: Ask, group: int) -> bool:
    """Return whether the main process of a group has left it in order, or let the others go."""
    return ask(lambda store: any(prefixed(group, store).check([key]) for key in ("ended", "halt", "left/0")))


def _latest(ask: Ask) -> int:
    """Return the number of the latest group; 0 for none."""
    return ask(lambda store: int(store.get("latest")) if store.check(["latest"]) else 0)


def _is_alive(ask: Ask, group: int, process_index: int, on_poll: Callable[[], None]) -> bool:
    """Return whether a process of a group gives a sign of life within GONE_AFTER_PULSES."""

    def beat(store: Store) -> int:
        of_group = prefixed(group, store)
        has_left = of_group.check([f"left/{process_index}"])
        return -1 if has_left else int(of_group.add(f"beat/{process_index}", 0))

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
