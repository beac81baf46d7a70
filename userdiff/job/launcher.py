"""What the launcher tells its processes, through their environment, and the store it keeps for them."""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

CONNECT_TIMEOUT = timedelta(seconds=60)


def rank() -> int:
    """Give this process's place among all processes of the job."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Give the number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machine() -> int:
    """Give this machine's place among those of the job. Two launches may have one host name."""
    return int(os.environ.get("GROUP_RANK", "0"))


def num_machines() -> int:
    """Give the number of launches that make up the job, one a machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def num_local_processes() -> int:
    """Give the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wants_gpus() -> bool:
    """Whether accelerate's configuration is one for GPUs: it says `use_cpu: false`, or half precision.

    To several processes accelerate does not tell the first, whatever it is.
    """
    is_half = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") in ("bf16", "fp16")
    return is_half or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "false"


def restart_count() -> int:
    """Give how often the launcher has restarted this group of processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def address() -> str:
    """Give where the launcher keeps the store."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def is_gone(parent_at_start: int) -> bool:
    """Whether the launcher that started this process has died: nobody else would tell it to end."""
    return "LOCAL_RANK" in os.environ and os.getppid() != parent_at_start


def open_store() -> Store:
    """Open the job's store: in memory for one process, else on the launcher's own address and port.

    The launcher's store outlives a group of processes that it restarts, so the restart count is part of every key.
    """
    if world_size() == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
    return PrefixStore(f"userdiff/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{restart_count()}", store)


def process_group(timeout: timedelta) -> dict[str, Any]:
    """Give what `torch.distributed.init_process_group` needs to join the launcher's processes over gloo.

    They meet in `open_store`: in torch's own store, a restarted group can read the addresses of the one before, and hang.
    """
    store = PrefixStore("process_group", open_store())
    store.set_timeout(timeout)
    return {"backend": "gloo", "timeout": timeout, "store": store, "rank": rank(), "world_size": world_size()}
