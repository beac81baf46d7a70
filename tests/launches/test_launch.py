"""Real processes under `accelerate launch`, as the README says."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import model_flags
from tests.jobs import ROOT, finish, launch, start, tree


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


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_real_launches_make_the_same_bytes(num_processes, flags, reference, tmp_path):
    status, stdout, stderr = finish(launch(num_processes, *flags, "--output_dir", tmp_path))
    assert status == 0, stderr
    assert stdout.count("Plan: 35 images") == 1
    assert f"by {num_processes} process" in stdout
    assert stdout.count("Done: 35 of 35 images") == 1
    assert stderr.count("100%|") == 1  # one bar for the whole job
    assert tree(tmp_path) == reference
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["history"][0]["num_processes"] == num_processes
    assert record["numerics"]["threads_per_process"] == 1


def test_three_threads_on_both_sides_make_the_same_bytes(flags, tmp_path):
    threads = set()
    for num_processes in (1, 2):
        job = [*flags, "--num_images_per_user", 2, "--output_dir", tmp_path / str(num_processes)]
        status, _, stderr = finish(launch(num_processes, *job, threads=3))
        assert status == 0, stderr
        record = json.loads((tmp_path / str(num_processes) / "run.json").read_text())
        threads.add(record["numerics"]["threads_per_process"])
    assert len(threads) == 1  # 3, or as many as there are cores: MKL takes no more
    assert threads != {1}
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_two_machines_on_loopback_make_the_same_bytes(flags, reference, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    network = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    machines = [
        launch(2, *flags, "--output_dir", tmp_path, launcher_flags=[*network, "--machine_rank", str(machine_rank)])
        for machine_rank in (0, 1)
    ]
    for status, _, stderr in [finish(machine) for machine in machines]:
        assert status == 0, stderr
    assert tree(tmp_path) == reference
    assert json.loads((tmp_path / "run.json").read_text())["history"][0]["num_processes"] == 2


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--seed", "minus one"], "--seed: 'minus one' is not a whole number"),  # found before torch is loaded
        (["--unet_path", "nowhere"], "--unet_path: nowhere is not a folder"),  # found by every process
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
    job = [*flags, "--num_images_per_user", 30, "--output_dir", tmp_path / "out"]
    first = launch(2, *job)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out/user_*/*.png"))) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, _, stderr = finish(first)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["history"][0]["state"] == f"stopped by signal {signal.SIGTERM.value}"
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/user_*/*.png")}
    assert 8 <= len(made) < 150
    last_word = f"batch_generate.py: stopped by SIGTERM; {len(made)} of 150 images are in {tmp_path / 'out'}, the same "
    assert stderr.count(f"{last_word}command goes on from there\n") == 1
    assert record["history"][0]["published"] == len(made)

    status, stdout, stderr = finish(launch(3, *job))
    assert status == 0, stderr
    assert f"{len(made)} already there, {150 - len(made)} to make" in stdout
    assert {path: path.stat().st_mtime_ns for path in made} == made
    plain = [sys.executable, "batch_generate.py", *map(str, job[:-1]), str(tmp_path / "plain")]
    assert finish(start(plain, OMP_NUM_THREADS="1"))[0] == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


def test_workers_whose_launcher_was_killed_go_too(flags, tmp_path):
    launcher = launch(2, *flags, "--num_images_per_user", 2000, "--output_dir", tmp_path)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("user_*/*.png"))) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.kill()
    _, _, stderr = finish(launcher, timeout=60)  # until the last worker has closed its end of the pipe
    assert "stopped by SIGTERM; " in stderr
    assert "frame #" not in stderr  # torch's stacks, of every message that could not be sent
    assert "Traceback" not in stderr
    assert json.loads((tmp_path / "run.json").read_text())["history"][0]["state"] == "stopped by signal 15"


def test_a_plain_process_stops_at_a_signal_with_its_status(flags, tmp_path):
    job = [*flags, "--num_images_per_user", 500, "--output_dir", tmp_path]
    process = start([sys.executable, "batch_generate.py", *map(str, job)])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("user_*/*.png")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    status, _, stderr = finish(process)
    assert status == 128 + signal.SIGINT
    made = len(list(tmp_path.glob("user_*/*.png")))
    assert stderr.strip().splitlines()[-1] == (
        f"batch_generate.py: stopped by SIGINT; {made} of 2500 images are in {tmp_path}, the same command goes on from there"
    )
    assert not list(tmp_path.glob("user_*/.*"))  # nothing half-written
    assert not (tmp_path / ".userdiff.lock").exists()


def test_the_original_command_line_works_with_the_scripts_name_changed(checkpoint, tmp_path):
    """Its encoder file lay in the UNet's folder; 31 users as then."""
    import torch

    from userdiff.diffusion.conditioning import UserConditionEncoder

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


def test_help_is_there_without_torch():
    script = (
        "import sys, userdiff.cli as c\ntry: c.generate(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_key_of_a_config_is_accelerates_and_commented(file: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    keys = set(yaml.safe_load(file.read_text()))
    assert keys <= set(ClusterConfig.__dataclass_fields__)
    for line in file.read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"(\w+:|  dynamo_\w+:) +(\S+ +)?# \S.*", line), line


@pytest.mark.parametrize("name", ["multi_gpu", "multi_node", "single_gpu"])
def test_the_gpu_configs_start_what_they_say_on_a_machine_without_gpus(name, flags, tmp_path):
    """What can be tried without a GPU: the launcher takes the file, and the job falls back to the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    command += ["--num_processes", "1" if name == "single_gpu" else "2", "--num_machines", "1", "--cpu"]
    command += [
        "--main_process_port",
        str(port),
        "batch_generate.py",
        *map(str, flags[:-4]),
        "--num_images_per_user",
        "1",
    ]
    status, stdout, stderr = finish(start([*command, "--device", "cpu", "--output_dir", tmp_path]))
    assert status == 0, stderr
    assert "Done: 5 of 5 images" in stdout


def test_a_gpu_config_says_where_there_is_no_gpu(flags, tmp_path):
    """To several processes the launcher does not tell what `use_cpu` says, whatever it is."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/gpu_compiled.yaml",
    ]
    command += ["--num_processes", 2, "batch_generate.py", *flags[:-4], "--dry_run", "--output_dir", tmp_path / "out"]
    status, _, stderr = finish(start(command, CUDA_VISIBLE_DEVICES=""))
    assert status == 0, stderr
    (warning,) = [line for line in stderr.splitlines() if line.startswith("Warning: torch finds no GPU")]
    assert "2 processes" in warning
    assert "--device cpu" in warning
