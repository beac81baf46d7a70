"""Check that all machines share the output folder, before anything is written."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from userdiff.config import UsageError, errors_of
from userdiff.dataset.layout import shared_mark_path, shared_mark_paths
from userdiff.job.store import Coordinator
from userdiff.shutdown import Halted

LOOK_SECONDS = 0.2
NUM_LOOKS = 450  # 90 s: network file systems cache the content of a folder for up to a minute
SEEN_SECONDS = 100.0


@contextmanager
def shown(output_dir: Path, coordinator: Coordinator) -> Iterator[None]:
    """Put a file into the folder, and go on once a process of every other machine has seen it (main process).

    A machine that does not see it has ended the job by SEEN_SECONDS; one that has not come by then is not waited for. Its name is new, so that no machine has cached it as missing. It stays until the job ends, for processes that come
    late. Call it only while holding the folder's lock: files that killed jobs left are removed with it.
    """
    try:
        if coordinator.num_machines > 1:
            mark = shared_mark_path(output_dir)
            with errors_of("--output_dir"):
                mark.touch()
            coordinator.set("shown", json.dumps([socket.gethostname(), str(mark.absolute())]))
            deadline = time.monotonic() + SEEN_SECONDS
            seen = [f"seen/{machine}" for machine in range(1, coordinator.num_machines)]
            coordinator.wait_until(lambda: all(map(coordinator.has, seen)) or time.monotonic() > deadline)
        yield
    finally:
        for path in shared_mark_paths(output_dir):
            with suppress(OSError):  # a folder of that name, or a disk that is gone
                path.unlink()


def look(output_dir: Path, coordinator: Coordinator) -> None:
    """Return once this process sees the file that the main process shows; on that one's machine, at once.

    Writes nothing. Where the file does not appear, raises UsageError and ends the job on every machine with that line.
    """
    if coordinator.machine_index == 0:
        return
    main_host, path = json.loads(coordinator.wait_for("shown"))
    mark = Path(path)
    for _ in range(NUM_LOOKS):
        is_seen = os.path.exists(output_dir / mark.name)  # noqa: PTH110 - Path.exists raises where it may not look
        if is_seen or coordinator.has_ended():
            coordinator.set(f"seen/{coordinator.machine_index}")
            return
        coordinator.check()
        time.sleep(LOOK_SECONDS)
    error = UsageError(
        f"--output_dir: {socket.gethostname()} does not see what {main_host} wrote to {mark.parent}; "
        "needed: a folder that all machines share"
    )
    coordinator.halt(error, cause=str(error))
    raise error


def look_meanwhile(output_dir: Path, coordinator: Coordinator) -> None:
    """Look in a thread too, while this process loads its models, so that a slow machine does not hold up the others."""

    def look_quietly() -> None:
        with suppress(Halted, UsageError):  # every process has been told
            look(output_dir, coordinator)

    Thread(target=look_quietly, name="look", daemon=True).start()
