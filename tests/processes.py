"""The processes of a job, found by parentage, and what of their errors is not their launcher's."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

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


def family_of(job: subprocess.Popen) -> dict[int, Stat]:
    """A job's processes, while its first one has not been waited for: workers have sessions of their own."""
    table = process_table()
    return {pid: table[pid] for pid in (job.pid, *descendants(job.pid, table))}


def still_alive(family: dict[int, Stat]) -> list[int]:
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


def our_tracebacks(stderr: str) -> list[str]:
    """The tracebacks of the job; its launcher has one of its own for every failure."""
    blocks = [match[0] for pattern in (_TRACEBACK, _CRASH) for match in pattern.finditer(stderr)]
    return [block for block in blocks if not _LAUNCHER.search(block)]
