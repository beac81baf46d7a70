"""The wheel: what somebody gets who installs the package and never sees the repository."""

import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from tests.jobs import ROOT, finish, start

PACKAGE_FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "userdiff").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the package in it and nothing else, as site-packages would have it."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {name for name in files if ".dist-info/" not in name} == PACKAGE_FILES
    assert {"userdiff/py.typed", "userdiff/demo/checkpoint/unet/config.json"} <= PACKAGE_FILES


def test_its_metadata_is_complete(installed):
    (info,) = installed.glob("*.dist-info")
    metadata = PathDistribution(info).metadata
    for field in ("Name", "Version", "Summary", "License-Expression", "License-File", "Requires-Python", "Keywords"):
        assert metadata[field], field
    assert {"bench", "dev", "test", "train"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata.get_payload().startswith("# userdiff")
    assert "userdiff = userdiff.cli:main" in (info / "entry_points.txt").read_text()


def test_it_runs_from_any_folder_under_the_launcher(installed, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [ROOT / "accelerate_configs" / "cpu.yaml", "--num_cpu_threads_per_process", "1", "-m", "userdiff"]
    command += ["generate", "--device", "cpu", "--num_images_per_user", "1", "--num_inference_steps", "1"]
    job = start([*command, "--user_ids", "3", "--batch_size", "1"], cwd=tmp_path, PYTHONPATH=str(installed))
    status, stdout, stderr = finish(job)
    assert status == 0, stderr
    assert "Done: 1 of 1 image" in stdout
    made = tmp_path / "generated_images"
    assert sorted(path.name for path in made.iterdir()) == ["manifest.csv", "preview.html", "run.json", "user_03"]
    where = [sys.executable, "-c", "import userdiff; print(userdiff.__file__)"]
    status, stdout, _ = finish(start(where, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert Path(stdout.strip()).is_relative_to(installed)  # and not the repository


@pytest.mark.parametrize("command", ["generate", "status", "verify", "merge", "preview", "inspect"])
def test_every_command_has_help(command, installed, tmp_path):
    run = [sys.executable, "-m", "userdiff", command, "--help"]
    status, stdout, stderr = finish(start(run, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert status == 0, stderr
    assert stdout.startswith(f"usage: userdiff {command}")
