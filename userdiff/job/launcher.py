"""What the launcher tells its processes through their environment, and the store it keeps for them."""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

CONNECT_TIMEOUT = timedelta(seconds=60)


def process_index() -> int:
    """Return this process's place among all processes of the job."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """Return the number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machine_index() -> int:
    """Return this machine's place among those of the job. Two launches may have one host name."""
    return int(os.environ.get("GROUP_RANK", "0"))


def num_machines() -> int:
    """Return the number of launches that make up the job, one a machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def num_local_processes() -> int:
    """Return the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wants_gpus() -> bool:
    """Return whether accelerate's configuration is one for GPUs: `use_cpu: false`, or half precision.

    To several processes accelerate does not tell `use_cpu`, whatever it is.
    """
    is_half = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") in ("bf16", "fp16")
    return is_half or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "false"


def restart_count() -> int:
    """Return how often the launcher has restarted this group of processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def address() -> str:
    """Return where the launcher keeps the store."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def open_store() -> Store:
    """Open the job's store: in memory for one process, else on the launcher's own address and port.

    The launcher's store outlives a group of processes that it restarts, so the restart count is part of every key.
    """
    if num_processes() == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
    return PrefixStore(f"userdiff/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{restart_count()}", store)


def process_group(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments of `torch.distributed.init_process_group` that join the launcher's processes over gloo.

    They meet in `open_store`: in torch's own store, a restarted group can read the addresses of the one before, and hang.
    """
    store = PrefixStore("process_group", open_store())
    store.set_timeout(timeout)
    group = {"backend": "gloo", "timeout": timeout, "store": store}
    return {**group, "rank": process_index(), "world_size": num_processes()}
