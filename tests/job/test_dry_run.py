"""`--dry_run`: everything is checked and the plan is said, and nothing on disk changes."""

import os
import re
import subprocess

import pytest

from tests.checkpoints import model_flags
from tests.job.test_output_folder import picture
from tests.jobs import play_processes, run_job, tree


@pytest.fixture
def job(checkpoint, tmp_path):
    flags = [*model_flags(checkpoint), "--num_inference_steps", 1, "--batch_size", 4, "--device", "cpu"]
    return [*flags, "--num_images_per_user", 3, "--output_dir", tmp_path / "out"]


def disk(folder):
    """Everything below a folder: contents and times."""
    paths = sorted(folder.rglob("*"))
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in [folder, *paths]}


def test_a_new_dataset_is_planned_and_its_folder_not_made(job, tmp_path, capsys):
    before = disk(tmp_path)
    assert run_job(*job, "--dry_run") == 0
    assert disk(tmp_path) == before
    said = capsys.readouterr().out
    assert "Plan: 15 images (5 users x 3), 0 already there, 15 to make in 4 batches of 4 by 1 process" in said
    assert "Padding: 1 of the 16 rows of these batches" in said
    assert re.search(r"^Disk: at most [\d.]+kB to write, [\d.]+[GT]B free$", said, re.MULTILINE)
    assert said.splitlines()[-1] == f"Dry run: nothing was made, and {tmp_path / 'out'} is as it was"


def test_what_is_done_counts_and_what_is_lost_is_named(job, tmp_path, capsys):
    assert run_job(*job) == 0
    (tmp_path / "out" / "user_02" / "generated_001.png").unlink()
    before = disk(tmp_path)
    capsys.readouterr()
    assert run_job(*job, "--num_images_per_user", 4, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "Plan: 20 images (5 users x 4), 14 already there, 6 to make" in said
    assert "missing or damaged and made again: user_02/generated_001.png" in said
    assert disk(tmp_path) == before
    assert run_job(*job, "--num_images_per_user", 4) == 0
    assert len(tree(tmp_path / "out")) == 20 + 1


def test_overwrite_says_what_it_would_remove(job, tmp_path, capsys):
    assert run_job(*job) == 0
    before = disk(tmp_path)
    capsys.readouterr()
    assert run_job(*job, "--overwrite", "--seed", 7, "--dry_run") == 0
    said = capsys.readouterr().out
    assert f"To be removed: 15 images of earlier runs, from {tmp_path / 'out'}" in said
    assert "0 already there, 15 to make" in said
    assert disk(tmp_path) == before


@pytest.mark.parametrize(
    ("extra", "needle"),
    [
        (["--seed", 7], "holds images made otherwise (seed was 42, is 7)"),
        (["--user_ids", 9], "--user_ids: 9 is out of range"),
    ],
    ids=["another seed", "no such user"],
)
def test_what_a_job_refuses_is_refused(job, tmp_path, capsys, extra, needle):
    assert run_job(*job) == 0
    before = disk(tmp_path)
    assert run_job(*job, *extra, "--dry_run") == 2
    assert needle in capsys.readouterr().err
    assert disk(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_takes_nothing_is_found_before_it_is_needed(job, tmp_path, capsys):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=True)
    try:
        assert run_job(*job, "--dry_run") == 2
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert capsys.readouterr().err == f"batch_generate.py: error: --output_dir: {tmp_path} cannot be written to\n"


@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_images_of_others_are_refused(job, tmp_path, extra, capsys):
    (tmp_path / "out").mkdir()
    picture(tmp_path / "out" / "user_01" / "generated_000.png")
    before = disk(tmp_path)
    assert run_job(*job, *extra, "--dry_run") == 2
    assert "user_01/generated_000.png" in capsys.readouterr().err
    assert disk(tmp_path) == before


def test_many_processes_say_it_once(job, tmp_path, capsys):
    before = disk(tmp_path)
    assert play_processes(3, *job, "--dry_run") == [0, 0, 0]
    assert disk(tmp_path) == before
    said = capsys.readouterr().out
    assert said.count("Plan: ") == said.count("Dry run: ") == 1
    assert "by 3 processes" in said
