"""What the launcher tells its processes through their environment, and the store it keeps for them."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from uuid import uuid4

from userdiff.config import JobConfig, UsageError, errors_of
from userdiff.shard import WHOLE, Shard

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_TIMEOUT = timedelta(seconds=60)
_NO_TIMEOUT = timedelta(days=365)  # for an answer: who asks has a bound of his own
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PLACE = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "RANK")  # of one process among all of one launch
_TO_RUN_ALONE = "needed: accelerate launch; or env -u TORCHELASTIC_RUN_ID -u WORLD_SIZE, to run alone"


class ForeignLaunchError(UsageError):
    """The variables in the environment are those of a launch that did not start this process."""


def is_launched() -> bool:
    """Return whether torchrun started this process, as accelerate does where there are several.

    It alone keeps a store in which they meet. A cluster sets the other variables too, or an earlier launch left them.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_own_store() -> bool:
    """Return whether the launcher keeps a store itself, which lasts as long as the launch."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "True") == "True"


def check_environment() -> None:
    """Raise UsageError for variables that say what is not so, and that torch or accelerate would believe."""
    if is_launched():
        _check_launch()
    for name in _SIZES:
        size = os.environ.get(name, "")
        if not is_launched() and size.isdecimal() and int(size) > 1:
            raise UsageError(
                f"{name}: {size} in the environment, but no launcher started this process, needed: accelerate launch; or "
                f"env -u {name}, to run alone"
            )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        raise UsageError(f"ACCELERATE_TORCH_DEVICE: {device} in the environment, needed: not set; --device says which")


def check_overwrite(config: JobConfig) -> None:
    """Raise UsageError for --overwrite where nothing tells a group that the launcher starts again from another launch."""
    if config.overwrite and is_launched() and not has_own_store():
        raise UsageError(
            "--overwrite: with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 nothing tells a restart from a new launch, and each would "
            "start again; needed: another folder, or remove what is there"
        )


def _check_launch() -> None:
    """Raise ForeignLaunchError where the launcher's variables are not whole, or where another program inherited them."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "").isdecimal():
            value = os.environ.get(name)
            raise ForeignLaunchError(
                f"{name}: {value!r} in the environment, beside TORCHELASTIC_RUN_ID, is no whole number, {_TO_RUN_ALONE}"
            )
    if process_index() >= num_processes():
        raise ForeignLaunchError(
            f"RANK: {process_index()} in the environment is none of WORLD_SIZE {num_processes()}, {_TO_RUN_ALONE}"
        )
    if not os.environ.get("MASTER_ADDR"):
        raise ForeignLaunchError(f"MASTER_ADDR: not in the environment, beside TORCHELASTIC_RUN_ID, {_TO_RUN_ALONE}")
    if pid := _program_that_was_launched():
        raise ForeignLaunchError(
            f"TORCHELASTIC_RUN_ID: in the environment for process {pid}, another program, which started this one, "
            f"{_TO_RUN_ALONE}"
        )


def refuse_place(holder: str) -> NoReturn:
    """Raise ForeignLaunchError: another process of the launch is what this process takes itself for."""
    raise ForeignLaunchError(
        f"RANK: {process_index()} of the launch on {address()} is {holder} already, and joins one job, {_TO_RUN_ALONE}"
    )


def _number(name: str, alone: int) -> Callable[[], int]:
    """Return a function that reads a number that the launcher has set; `alone` where there is no launcher, or no number."""

    def number() -> int:
        text = os.environ.get(name, "")
        return int(text) if is_launched() and text.isdecimal() else alone

    return number


process_index = _number("RANK", 0)
num_processes = _number("WORLD_SIZE", 1)
machine_index = _number("GROUP_RANK", 0)  # unlike a host name, it is unique: one machine may run two launches
num_machines = _number("GROUP_WORLD_SIZE", 1)
local_process_index = _number("LOCAL_RANK", 0)
num_local_processes = _number("LOCAL_WORLD_SIZE", 1)
restart_count = _number("TORCHELASTIC_RESTART_COUNT", 0)  # how often the launcher restarted the group after a failure


def wants_gpus() -> bool:
    """Return whether accelerate's configuration is one for GPUs: `use_cpu: false`, or half precision.

    Where it starts several processes, accelerate does not pass `use_cpu` on to them.
    """
    is_half = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") in ("bf16", "fp16")
    return is_half or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "false"


def shard_of(config: JobConfig) -> tuple[Shard, str]:
    """Return the shard that this job makes, and for `--shard auto` what in the environment says so.

    With --num_shards tasks count from 0, so that the same shards are made when some of the tasks are queued again. Raises
    UsageError outside an array, and where its tasks do not say how many shards there are.
    """
    if config.shard is None:
        return WHOLE, ""
    if config.shard != "auto":
        return Shard.parse(config.shard), ""
    num_shards = config.num_shards
    is_slurm = bool(os.environ.get("SLURM_ARRAY_TASK_ID"))
    name = "SLURM_ARRAY_TASK_ID" if is_slurm else "JOB_COMPLETION_INDEX"
    if not os.environ.get(name):
        raise UsageError(
            "--shard: auto, but no array started this job: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is in the "
            "environment; --shard I/N says it without"
        )
    index = _array_number(name)
    if num_shards is not None:
        last_name = "SLURM_ARRAY_TASK_MAX" if is_slurm and os.environ.get("SLURM_ARRAY_TASK_MAX") else name
        if max(index, _array_number(last_name)) >= num_shards:
            way = f"--array=0-{num_shards - 1}" if is_slurm else "the completions of the Job"
            raise UsageError(
                f"--num_shards: {num_shards}, but {last_name} is {_array_number(last_name)}, tasks count from 0; needed: {way}"
            )
        return Shard(index + 1, num_shards), f"{name} {index} of {num_shards} from 0"
    if not is_slurm:
        raise UsageError(f"--num_shards: missing, {name} does not say of how many; needed: the completions of the Job")
    number, first = _array_number("SLURM_ARRAY_TASK_COUNT"), _array_number("SLURM_ARRAY_TASK_MIN")
    last = _array_number("SLURM_ARRAY_TASK_MAX") if os.environ.get("SLURM_ARRAY_TASK_MAX") else first + number - 1
    if last - first + 1 != number or not first <= index <= last:
        raise UsageError(
            f"--shard: auto, but the Slurm array has {number} of the tasks {first} to {last}; --num_shards N says how many shards "
            "there are, and task 0 makes the first"
        )
    with errors_of("--shard"):
        return Shard(index - first + 1, number), f"{name} {index} of {number} from {first}"


def _array_number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal() or len(value) > 18:
        raise UsageError(f"--shard: auto, but {name} is {value!r}, needed: a number; --shard I/N says it without")
    return int(value)


# The store -----------------------------------------------------------------------------------------------------------


def address() -> str:
    """Return where the launcher keeps the store."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def this_process() -> str:
    """Return what tells this process from any other that meets the launcher's store."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def open_store() -> "Store":
    """Open the launch's store: the launcher's own, on its address and port; in memory where there is none.

    A launcher that keeps none of its own has the main process keep one, anew whenever it starts the processes again.
    A key `launch` has what is the same for all groups of processes that the launcher starts, and for no other launch.
    """
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if not is_launched():
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = not has_own_store() and process_index() == 0
    server = TCPStore(host, port, is_master=is_master, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
    server.set_timeout(_NO_TIMEOUT)
    store = PrefixStore(f"userdiff/{os.environ['TORCHELASTIC_RUN_ID']}", server)
    store.compare_set("launch", "", uuid4().hex)
    return store


# Processes, as far as Linux tells of them ------------------------------------------------------------------------------


def stopped_launcher() -> int | None:
    """Return the process above this one that is stopped, as by Ctrl-Z; None where there is none.

    The processes that a launcher starts are no part of its terminal's job: they go on while it is stopped, and only its
    store does not answer.
    """
    return next((pid for pid, state in _ancestors() if state in ("T", "t")), None)


def _program_that_was_launched() -> int | None:
    """Return the Python process that the launcher started, where it is another: it started this one by itself.

    A shell between the launcher and this process is a wrapper.
    """
    place = {f"{name}={os.environ.get(name)}".encode() for name in _PLACE}
    launched = None
    with suppress(OSError):
        for pid, _ in _ancestors():
            if not place <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                break
            launched = pid
        if launched and Path(f"/proc/{launched}/exe").readlink().name.startswith("python"):
            return launched
    return None


def _ancestors() -> Iterator[tuple[int, str]]:
    """Yield (process, state) of the parent, its parent, and so on."""
    pid = os.getppid()
    with suppress(OSError):
        while pid > 0:
            state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            yield pid, state
            pid = int(parent)
