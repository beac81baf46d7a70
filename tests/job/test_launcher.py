"""What the launcher tells its processes."""

import os
import shlex
import sys

import pytest
from torch.distributed import TCPStore

from tests.checkpoints import model_flags
from tests.jobs import finish, images_in, run_job, start
from userdiff.job import launcher
from userdiff.job.store import connect
from userdiff.shutdown import Shutdown

TO_RUN_ALONE = "needed: accelerate launch; or env -u TORCHELASTIC_RUN_ID -u WORLD_SIZE, to run alone"
IMPATIENT = """
import sys
from userdiff.job import store_client
store_client.JOIN_PULSES = 15
from userdiff.job import output_folder
output_folder.SEEN_SECONDS = 10
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


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
    launcher.open_store().set("latest", "1")
    assert not launcher.open_store().check(["latest"])


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


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"BACKEND": "STALE"}, "--dynamo_backend: 'STALE' is not a valid DynamoBackend"),
        ({"BACKEND": "TENSORRT"}, "--dynamo_backend: Invalid backend: 'tensorrt', "),
        ({"BACKEND": "INDUCTOR", "MODE": "stale"}, "--dynamo_backend: Unrecognized mode=stale, "),
    ],
)  # fmt: skip
def test_a_compiler_that_nobody_knows_is_named(environment, said, checkpoint, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out", "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_generate.py: error: {said}")
    assert "ACCELERATE_DYNAMO_BACKEND=" in line
    assert not (tmp_path / "out").exists()


def test_a_switch_that_is_none_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "batch_generate.py: error: ACCELERATE_USE_CPU: invalid truth value perhaps"


def test_processes_meet_in_the_launchers_store_and_a_launch_keeps_its_id(launched):
    launcher.open_store().set("latest", "1")
    assert launcher.open_store().get("latest") == b"1"
    launch = launcher.open_store().get("launch")
    assert launcher.open_store().get("launch") == launch


@pytest.mark.parametrize("argument", ["--local-rank=0", "--local_rank=0"])
def test_what_torchs_older_launcher_adds_to_the_arguments_is_left_out(launched, argument, checkpoint, tmp_path, capsys):
    job = [argument, *model_flags(checkpoint), "--output_dir", tmp_path / "out", "--user_ids", "99"]
    assert run_job(*job) == 2
    assert capsys.readouterr().err.startswith("batch_generate.py: error: --user_ids: 99 is out of range")


def test_without_a_launcher_it_is_no_flag(capsys):
    assert run_job("--local_rank=0") == 2
    assert capsys.readouterr().err.startswith("batch_generate.py: error: --local_rank: no such flag")


def test_bf16_that_a_configuration_brings_into_a_folder_costs_no_dataset(checkpoint, tmp_path, monkeypatch, capsys):
    job = [*model_flags(checkpoint), "--num_inference_steps", 1, "--output_dir", tmp_path / "out"]
    assert run_job(*job) == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_job(*job) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "bf16 is the launcher's, by its configuration or ACCELERATE_MIXED_PRECISION; --mixed_precision no keeps" in line
    )
    assert run_job(*job, "--mixed_precision", "no") == 0


# Variables that are not for this process


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, "RANK: None in the environment, beside TORCHELASTIC_RUN_ID, is no whole number, "),
        ("RANK", "first", "RANK: 'first' in the environment, beside TORCHELASTIC_RUN_ID, is no whole number, "),
        ("RANK", "2", "RANK: 2 in the environment is none of WORLD_SIZE 2, "),
        ("WORLD_SIZE", "", "WORLD_SIZE: '' in the environment, beside TORCHELASTIC_RUN_ID, is no whole number, "),
        ("MASTER_PORT", "-1", "MASTER_PORT: '-1' in the environment, beside TORCHELASTIC_RUN_ID, is no whole number, "),
        ("MASTER_ADDR", None, "MASTER_ADDR: not in the environment, beside TORCHELASTIC_RUN_ID, "),
    ],
)
def test_half_a_launchers_variables_are_refused_by_name(
    launched, name, value, said, checkpoint, tmp_path, monkeypatch, capsys
):
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_generate.py: error: {said}")
    assert line.endswith(TO_RUN_ALONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["subprocess", "shell"])
def test_a_job_that_a_launched_program_starts_is_told_so_at_once(launched, way, checkpoint, tmp_path):
    """It would wait for processes that never come, in a store that is not its own."""
    job = [sys.executable, "batch_generate.py", *model_flags(checkpoint), "--output_dir", str(tmp_path / "out")]
    call = {"subprocess": f"subprocess.call({job})", "shell": f"os.system({shlex.join(job) + '; exit $?'!r}) // 256"}[
        way
    ]
    status, _, stderr = finish(
        start([sys.executable, "-c", f"import os, subprocess, sys; sys.exit({call})"]), timeout=60
    )
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith("batch_generate.py: error: TORCHELASTIC_RUN_ID: in the environment for process ")
    assert line.endswith(TO_RUN_ALONE)
    assert not (tmp_path / "out").exists()


def test_a_shell_that_was_launched_may_start_the_job(launched, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    job = [sys.executable, "batch_generate.py", *model_flags(checkpoint), "--output_dir", str(tmp_path / "out")]
    status, _, stderr = finish(start(["bash", "-c", f"{shlex.join([*job, '--num_images_per_user', '1'])}; exit $?"]))
    assert status == 0, stderr


def test_jobs_may_follow_one_another_in_one_launch(launched, checkpoint, tmp_path, monkeypatch):
    """The second one must not read the first one's plan."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    job = [sys.executable, "batch_generate.py", *model_flags(checkpoint), "--num_images_per_user", 1, "--output_dir"]
    for number in (1, 2):
        shell = f"{shlex.join(map(str, [*job, tmp_path / str(number)]))}; exit $?"
        status, _, stderr = finish(start(["bash", "-c", shell]))
        assert status == 0, stderr
        assert len(images_in(tmp_path / str(number))) == 5


def test_two_jobs_at_once_in_one_launch_are_told_so(launched, checkpoint, tmp_path, monkeypatch):
    job = [*model_flags(checkpoint), "--num_images_per_user", 1, "--output_dir", tmp_path / "out"]
    environment = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
    assert {**os.environ, **environment} == os.environ
    with connect(Shutdown()) as coordinator:
        status, _, stderr = finish(
            start(["bash", "-c", f"{shlex.join(map(str, [sys.executable, 'batch_generate.py', *job]))}; exit $?"])
        )
        coordinator.check()
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith(f"batch_generate.py: error: RANK: 0 of the launch on 127.0.0.1:{launched.port} is process ")
    assert line.endswith(TO_RUN_ALONE)
    assert not (tmp_path / "out").exists()


def test_nobody_waits_for_a_process_that_never_joins(launched, checkpoint, tmp_path):
    job = [*model_flags(checkpoint), "--num_images_per_user", 1, "--output_dir", tmp_path / "out"]
    status, stdout, stderr = finish(
        start([sys.executable, "batch_generate.py", *map(str, job)], GLOO_SOCKET_IFNAME="ib0")
    )
    assert status == 0, stderr
    assert "waiting" not in stdout
    assert len(images_in(tmp_path / "out")) == 5


@pytest.mark.parametrize("missed", [0, 1])
def test_who_is_waited_for_and_does_not_come_is_named_within_seconds(
    missed, launched, checkpoint, tmp_path, monkeypatch
):
    """The main process is given up in the end; another machine is waited for only until it should have seen the folder."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    for name in ("RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, str(1 - missed))
    job = [*model_flags(checkpoint), "--num_images_per_user", 1, "--output_dir", tmp_path / "out"]
    status, stdout, stderr = finish(start([sys.executable, "-c", IMPATIENT, *map(str, job)]), timeout=100)
    assert f"Note: waiting for process {missed}, which has not joined the job yet" in stdout
    if missed:
        assert status == 0
        assert len(images_in(tmp_path / "out")) == 5
    else:
        assert status == 1
        assert "batch_generate.py: error: process 0 has not joined the job within 15 s; " in stderr
        assert not (tmp_path / "out").exists()


def test_starting_again_at_every_restart_is_refused_where_the_launcher_keeps_no_store(
    launched, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out", "--overwrite") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --overwrite: with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ")
