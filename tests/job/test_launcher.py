"""What the launcher tells its processes."""

import pytest
from torch.distributed import TCPStore

from tests.checkpoints import model_flags
from tests.jobs import run_job
from userdiff.job import launcher


@pytest.fixture
def launched(monkeypatch):
    """Have this process be the first of two whose launcher keeps a store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in {**environment, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))
    return store


LEFT_OVER = [
    {},
    {"RANK": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
    {"WORLD_SIZE": "", "RANK": ""},
    {"WORLD_SIZE": "1", "PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"},
    {"WORLD_SIZE": "many"},
]


@pytest.mark.parametrize("environment", LEFT_OVER, ids=str)
def test_without_a_launcher_a_process_is_alone_whatever_is_left_over(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher.check_environment()
    numbers = (launcher.process_index, launcher.machine_index, launcher.local_process_index)
    assert [number() for number in numbers] == [0, 0, 0]
    assert (launcher.num_processes(), launcher.num_machines(), launcher.num_local_processes()) == (1, 1, 1)
    launcher.open_store().set("plan", "1")
    assert not launcher.open_store().check(["plan"])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "ACCELERATE_TORCH_DEVICE"])
def test_a_variable_that_would_be_believed_is_named_at_once(name, checkpoint, tmp_path, monkeypatch, capsys):
    """Torch waits thirty minutes for processes that nobody starts, and accelerate takes another device."""
    monkeypatch.setenv(name, "2")
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_generate.py: error: {name}: 2 ")
    assert not (tmp_path / "out").exists()


def test_a_launcher_is_believed(launched):
    launcher.check_environment()
    assert (launcher.process_index(), launcher.num_processes()) == (0, 2)


def test_a_compiler_that_nobody_knows_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "STALE")
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out", "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --dynamo_backend: ")
    assert "STALE" in line


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
