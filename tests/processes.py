"""The processes of a job, found by parentage, and what of their errors is not their launcher's."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import NamedTuple

POLL_SECONDS = 0.005

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:(?:\[rank\d+\]: )?[ \t].*\n)*.*")
_CRASH = re.compile(r".*(?:Fatal Python error|terminate called).*")
_LAUNCHER = re.compile(r'File "[^"]*/(?:torch/distributed/(?:elastic|launcher|run)|accelerate/commands)\b')


class Stat(NamedTuple):
    """Of a process: a number may be given to another one later, with another time."""

    state: str
    parent: int
    started: int


def read_stat(pid: int) -> Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # gone
        return None
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def process_table() -> dict[int, Stat]:
    """Every process of this machine, by its number."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return {pid: stat for pid in pids if (stat := read_stat(pid))}


def descendants(pid: int, table: dict[int, Stat]) -> Iterator[int]:
    for child in sorted(child for child, stat in table.items() if stat.parent == pid):
        yield child
        yield from descendants(child, table)


def still_alive(family: Mapping[int, Stat]) -> list[int]:
    """Those that run: a zombie has gone, whoever is to collect it."""
    now = {pid: read_stat(pid) for pid in family}
    return [pid for pid, stat in now.items() if stat and stat.started == family[pid].started and stat.state not in "ZX"]


def describe(pid: int) -> str:
    stat = read_stat(pid)
    words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") if stat else ""
    return f"process {pid}, state {stat.state}: {words}" if stat else f"process {pid}, gone just now"


def send(pids: Sequence[int], signal_number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal_number)


class Job:
    """A started job; what it says is read all along, since a full pipe would hold it up."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.stdout = self.stderr = ""
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self.stdout, self.stderr = self.process.communicate()  # until all who can write to it have gone

    def is_running(self) -> bool:
        return self.process.poll() is None

    def family(self) -> dict[int, Stat]:
        """Every process of it, while the first one lives: workers have sessions of their own."""
        table = process_table()
        first = self.process.pid
        return {pid: table[pid] for pid in (first, *descendants(first, table)) if self.is_running() and pid in table}

    def wait(self, seconds: float, family: Mapping[int, Stat] = MappingProxyType({})) -> bool:
        """Wait until every process of it has gone; whether they have."""
        deadline = time.monotonic() + seconds
        while self._reader.is_alive() or still_alive(family):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def end(self, family: dict[int, Stat]) -> None:
        """Leave nothing of it running."""
        send(still_alive(family | self.family()), signal.SIGKILL)
        self.wait(5)


def our_tracebacks(stderr: str) -> list[str]:
    """The tracebacks of the job; its launcher has one of its own for every failure."""
    blocks = [match[0] for pattern in (_TRACEBACK, _CRASH) for match in pattern.finditer(stderr)]
    return [block for block in blocks if not _LAUNCHER.search(block)]
