"""Whether all machines share the output folder: found out before anything is written, not assumed."""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from userdiff.config import UsageError, errors_of
from userdiff.job.store import Coordinator
from userdiff.shutdown import Halted

LOOK_SECONDS = 0.2
NUM_LOOKS = 450  # 90 s: network file systems keep what they know of a folder for up to a minute
_MARK = re.compile(r"\.userdiff\.shared-[0-9a-f]{16}")


@contextmanager
def shown(output_dir: Path, coordinator: Coordinator) -> Iterator[None]:
    """Hold a file in the folder that the other machines must see, once one process of each does (main process).

    Its name is a new one, of which nobody can remember that it is not there. It stays until the job ends, for processes
    that come late. Only for the one who holds the folder's lock: files that killed jobs left go with it.
    """
    try:
        if coordinator.num_machines > 1:
            mark = output_dir / f".userdiff.shared-{secrets.token_hex(8)}"
            with errors_of("--output_dir"):
                mark.touch()
            coordinator.show(str(mark.absolute()))
        yield
    finally:
        for path in output_dir.glob(".userdiff.shared-*"):
            if _MARK.fullmatch(path.name):
                path.unlink(missing_ok=True)


def look(output_dir: Path, coordinator: Coordinator) -> None:
    """Return once this process sees the file that the main process shows; on its machine, at once. Writes nothing.

    Raises UsageError where it does not appear, and ends the job on every machine with that one line.
    """
    if coordinator.machine == 0:
        return
    mark = Path(coordinator.wait_for_shown())
    for _ in range(NUM_LOOKS):
        if os.path.exists(output_dir / mark.name):  # noqa: PTH110 - Path.exists raises where it may not look
            coordinator.say_seen()
            return
        coordinator.check()
        time.sleep(LOOK_SECONDS)
    error = UsageError(
        f"--output_dir: {socket.gethostname()} does not see what {coordinator.main_host()} wrote to {mark.parent}; "
        "needed: a folder that all machines share"
    )
    coordinator.halt(error, cause=str(error))
    raise error


def look_meanwhile(output_dir: Path, coordinator: Coordinator) -> None:
    """Look in a thread too, while this process loads its models: a slow machine holds up no other."""

    def look_quietly() -> None:
        with suppress(Halted, UsageError):  # all have been told
            look(output_dir, coordinator)

    Thread(target=look_quietly, name="look", daemon=True).start()
