"""What the launcher tells its processes."""

import pytest
from torch.distributed import TCPStore

from userdiff.job import launcher


@pytest.fixture
def launched(monkeypatch):
    """Have this process be the first of two whose launcher keeps a store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_one_process_alone_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert (launcher.process_index(), launcher.num_processes()) == (0, 1)
    assert (launcher.machine_index(), launcher.num_machines()) == (0, 1)
    launcher.open_store().set("plan", "1")
    assert not launcher.open_store().check(["plan"])


def test_processes_meet_in_the_launchers_store_apart_from_the_group_and_from_a_group_before(launched, monkeypatch):
    """Gloo would take the addresses of processes that are gone for those of its peers, and wait for them."""

    def group():
        return launcher.process_group(launcher.CONNECT_TIMEOUT)["store"]

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    group().set("plan", "2")
    assert not launcher.open_store().check(["plan"])
    launcher.open_store().set("plan", "1")
    assert launcher.open_store().get("plan") == b"1"
    assert group().get("plan") == b"2"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not launcher.open_store().check(["plan"])
    assert not group().check(["plan"])
