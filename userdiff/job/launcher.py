"""What the launcher tells its processes through their environment, and the store it keeps for them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from userdiff.config import JobConfig, UsageError, errors_of
from userdiff.shard import WHOLE, Shard

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_TIMEOUT = timedelta(seconds=60)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Return whether torchrun started this process, as accelerate does where there are several.

    It alone keeps a store in which they meet. A cluster sets the other variables too, or an earlier launch left them.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_environment() -> None:
    """Raise UsageError for variables that say what is not so, and that torch or accelerate would believe."""
    for name in _SIZES:
        size = os.environ.get(name, "")
        if not is_launched() and size.isdecimal() and int(size) > 1:
            raise UsageError(
                f"{name}: {size} in the environment, but no launcher started this process, needed: accelerate launch; or "
                f"env -u {name}, to run alone"
            )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        raise UsageError(f"ACCELERATE_TORCH_DEVICE: {device} in the environment, needed: not set; --device says which")


def _number(name: str, alone: int) -> Callable[[], int]:
    """Return a function that reads a number that the launcher has set; `alone` where there is no launcher."""
    return lambda: int(os.environ.get(name, alone)) if is_launched() else alone


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


def address() -> str:
    """Return where the launcher keeps the store."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def open_store() -> "Store":
    """Open the job's store: in memory for one process, else on the launcher's own address and port.

    The launcher's store outlives a group of processes that it restarts, so the restart count is part of every key.
    """
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if num_processes() == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
    return PrefixStore(f"userdiff/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{restart_count()}", store)


def process_group(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments with which `torch.distributed.init_process_group` joins the launcher's processes over gloo.

    They meet in `open_store`. In torch's own store, a restarted group could read the addresses of the one before, and hang.
    """
    from torch.distributed import PrefixStore

    store = PrefixStore("process_group", open_store())
    store.set_timeout(timeout)
    return {
        "backend": "gloo",
        "timeout": timeout,
        "store": store,
        "rank": process_index(),
        "world_size": num_processes(),
    }
