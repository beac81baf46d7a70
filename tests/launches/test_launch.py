"""Real processes under `accelerate launch`, as the README says."""

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from tests.checkpoints import model_flags
from tests.jobs import ROOT, finish, free_port, images_in, last_run, launch, run_job, start, tree, wait_for
from userdiff.diffusion.conditioning import UserConditionEncoder


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 2, "--num_images_per_user", 7, "--batch_size", 4]


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    """The same job as one plain process."""
    output_dir = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "batch_generate.py", *map(str, flags), "--output_dir", output_dir]
    status, stdout, _ = finish(start(command, OMP_NUM_THREADS="1"))
    assert status == 0
    assert "by 1 process on cpu" in stdout
    return tree(output_dir)


@pytest.mark.parametrize(
    ("config", "num_processes"), [("cpu", 3), ("single_gpu", 1), ("multi_gpu", 2), ("multi_node", 2)]
)
def test_real_launches_make_the_same_bytes(config, num_processes, flags, reference, tmp_path):
    """With every configuration: what can be tried of those for GPUs without one."""
    network = [] if config == "cpu" else ["--num_machines", "1", "--main_process_port", str(free_port())]
    job = [*flags, "--mixed_precision", "no", "--output_dir", tmp_path]
    status, stdout, stderr = finish(launch(num_processes, *job, launcher_flags=network, config=f"{config}.yaml"))
    assert status == 0, stderr
    assert stdout.count("Plan: 35 images") == 1
    assert f"by {num_processes} process" in stdout
    assert stdout.count("Done: 35 of 35 images") == 1
    assert stderr.count("100%|") == 1  # one bar for the whole job
    assert tree(tmp_path) == reference
    assert last_run(tmp_path)["num_processes"] == num_processes
    assert last_run(tmp_path)["numerics"]["threads_per_process"] == 1


def test_the_tasks_of_an_array_make_shards_that_the_command_joins(flags, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    for task in range(2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        job = [*flags, "--shard", "auto", "--output_dir", tmp_path / f"shard_{task}"]
        status, stdout, stderr = finish(launch(2, *job))
        assert status == 0, stderr
        assert f"Shard: {task + 1}/2 (SLURM_ARRAY_TASK_ID {task} of 2 from 0)" in stdout
    command = [sys.executable, "-m", "userdiff", "merge", tmp_path / "shard_1", tmp_path / "shard_0"]
    status, stdout, stderr = finish(start([*command, "--into", tmp_path / "dataset"]))
    assert (status, "35 images" in stdout) == (0, True), stderr
    assert tree(tmp_path / "dataset") == reference


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--seed", "minus one"], "--seed: 'minus one' is not a whole number"),  # found before torch is loaded
        (["--shard", "auto"], "--shard: auto, but no array started this job"),
        (["--unet_path", "nowhere"], "--unet_path: nowhere does not exist"),  # found by every process
        (["--output_dir", "/proc/out"], "--output_dir: "),  # found by the main process alone
    ],
)
def test_bad_input_is_said_once_under_a_launcher(extra, expected, flags, tmp_path):
    status, stdout, stderr = finish(launch(2, *flags, "--output_dir", tmp_path / "out", *extra))
    assert status == 1  # the launcher's own, whatever ours was
    assert stderr.count("error: --") == 1
    assert f"batch_generate.py: error: {expected}" in stderr
    assert "exitcode  : 2" in stderr  # ours, in the launcher's report
    assert "Traceback" not in stderr.split("ChildFailedError")[0].split("torch/distributed/elastic")[0]
    assert stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_terminated_launch_goes_on_where_it_stopped(flags, tmp_path):
    job = [*flags, "--num_images_per_user", 30, "--device", "cpu", "--output_dir"]
    out = tmp_path / "out"
    first = launch(2, *job, out)
    wait_for(lambda: len(images_in(out)) >= 8)
    first.send_signal(signal.SIGTERM)
    _, _, stderr = finish(first)
    made = {path: path.stat().st_mtime_ns for path in images_in(out)}
    assert 8 <= len(made) < 150
    assert last_run(out)["state"] == f"stopped by signal {signal.SIGTERM.value}"
    assert last_run(out)["published"] == len(made)
    last_word = f"batch_generate.py: stopped by SIGTERM; {len(made)} of 150 images are in {out}, the same "
    assert stderr.count(f"{last_word}command goes on from there\n") == 1
    assert run_job(*job, out) == run_job(*job, tmp_path / "plain") == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert tree(out) == tree(tmp_path / "plain")


@pytest.mark.parametrize(
    ("config", "num_processes", "number"),
    [
        ("cpu", 2, signal.SIGKILL),
        ("single_gpu", 1, signal.SIGKILL),
        ("single_gpu", 1, signal.SIGTERM),  # this launcher passes none on
        ("single_gpu", 1, signal.SIGHUP),
    ],
)
def test_workers_whose_launcher_was_killed_go_too(flags, tmp_path, config, num_processes, number):
    job = [*flags, "--mixed_precision", "no", "--num_images_per_user", 2000, "--output_dir", tmp_path]
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # under nohup, tests have it ignored, and so would the launcher
    launcher = launch(num_processes, *job, config=f"{config}.yaml")
    signal.signal(signal.SIGHUP, before)
    wait_for(lambda: len(images_in(tmp_path)) >= 8)
    launcher.send_signal(number)
    _, _, stderr = finish(launcher, timeout=60)  # until the last worker has closed its end of the pipe
    assert "stopped by SIGTERM; " in stderr
    assert "frame #" not in stderr  # torch's stacks, of every message that could not be sent
    assert "Traceback" not in stderr
    assert last_run(tmp_path)["state"] == "stopped by signal 15"


def test_a_hangup_ends_all_processes_of_a_launch_and_says_so(flags, tmp_path):
    """As when a connection is lost."""
    job = launch(2, *flags, "--num_images_per_user", 2000, "--output_dir", tmp_path)
    wait_for(lambda: len(images_in(tmp_path)) >= 8)
    job.send_signal(signal.SIGHUP)
    _, _, stderr = finish(job, timeout=60)
    assert stderr.count("batch_generate.py: stopped by SIGHUP; ") == 1
    assert last_run(tmp_path)["state"] == "stopped by signal 1"


def test_a_job_outlives_the_shell_that_started_it_under_nohup(flags, tmp_path):
    command = shlex.join(map(str, [sys.executable, "batch_generate.py", *flags, "--output_dir", tmp_path]))
    finish(start(["bash", "-c", f"export LOCAL_RANK=0 ACCELERATE_MIXED_PRECISION=no; nohup {command} & sleep 2"]))
    wait_for(lambda: (tmp_path / "run.json").exists() and last_run(tmp_path)["state"] == "ended")
    assert len(images_in(tmp_path)) == 35


def test_the_original_command_line_works_with_the_scripts_name_changed(checkpoint, tmp_path):
    """Its encoder file lay in the UNet's folder; 31 users as then."""
    unet = tmp_path / "U"
    (tmp_path / "V").symlink_to(checkpoint / "vae")
    unet.mkdir()
    for file in (checkpoint / "unet").iterdir():
        (unet / file.name).symlink_to(file)
    encoder = UserConditionEncoder(31, 16)
    torch.save({f"module.{k}": v for k, v in encoder.state_dict().items()}, unet / "condition_encoder.pt")
    line = (
        "batch_generate.py --vae_path V --unet_path U --condition_encoder_path U/condition_encoder.pt --num_users 31 "
        "--user_ids 1 5 10 15 --num_images_per_user 5 --num_inference_steps 20 --output_dir O --device auto --seed 42"
    )
    script, *rest = line.split()
    status, _, stderr = finish(start([sys.executable, ROOT / script, *rest], cwd=tmp_path))
    assert status == 0, stderr
    assert len(list((tmp_path / "O").glob("user_*/generated_*.png"))) == 20
    assert {folder.name for folder in (tmp_path / "O").glob("user_*")} == {"user_01", "user_05", "user_10", "user_15"}


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_key_of_a_config_is_accelerates_and_commented(file: Path):
    keys = set(yaml.safe_load(file.read_text()))
    assert keys <= set(ClusterConfig.__dataclass_fields__)
    for line in file.read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"(\w+:|  dynamo_\w+:) +(\S+ +)?# \S.*", line), line


def test_a_gpu_config_says_where_there_is_no_gpu(flags, tmp_path):
    """To several processes the launcher does not tell what `use_cpu` says, whatever it is."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/gpu_compiled.yaml",
    ]
    command += ["--num_processes", 2, "batch_generate.py", *flags, "--dry_run", "--output_dir", tmp_path / "out"]
    status, _, stderr = finish(start(command, CUDA_VISIBLE_DEVICES=""))
    assert status == 0, stderr
    (warning,) = [line for line in stderr.splitlines() if line.startswith("Warning: torch finds no GPU")]
    assert "2 processes" in warning
    assert "--device cpu" in warning
