"""Datasets that an earlier version made stay good: they are found done, verify, grow, are completed and are joined.

The folders below `golden/` are of the commit in their name, and are never made anew (`golden/make.py` says how they were).
Nothing here compares the pixels of a new image with a stored one: another CPU rounds otherwise.
"""

import json
import shutil

import pytest

from tests.golden.make import JOBS, STOPPED, command
from tests.jobs import ROOT, play_processes, run_job, tree
from tests.oracle import assert_parity, oracle_image
from userdiff.cli import main

GOLDEN = ROOT / "tests" / "golden" / "548d3c2"
RUNS = {name: json.loads((GOLDEN / name / "run.json").read_text())["run"] for name in [*JOBS, "stopped", "killed"]}


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """A copy of the folders, where their jobs were run."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags_of(name, *more):
    """What follows the name of the script in a job's command line."""
    return [*command(name, JOBS.get(name, STOPPED))[2:], *map(str, more)]


def run_of(folder):
    return json.loads((folder / "run.json").read_text())["run"]


@pytest.mark.parametrize("name", JOBS)
def test_the_same_command_finds_everything_done(golden, name, capsys):
    before = tree(golden / name)
    assert main(["verify", name, "--deep"]) == 0
    assert run_job(*flags_of(name)) == 0
    assert f"{len(before) - 1} already there, 0 to make" in capsys.readouterr().out
    assert tree(golden / name) == before
    assert run_of(golden / name) == RUNS[name]
    assert main(["status", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: complete")
    assert main(["verify", name, "--deep"]) == main(["preview", name]) == main(["inspect", name]) == 0


@pytest.mark.parametrize("name", ["plain", "eta", "ranked"])
def test_a_dataset_grows(golden, name):
    before = tree(golden / name)
    assert run_job(*flags_of(name, "--num_images_per_user", 4)) == 0
    after = tree(golden / name)
    assert {file: after[file] for file in before if file != "manifest.csv"}.items() <= before.items()
    assert len(after) > len(before)
    assert main(["verify", name, "--deep"]) == 0
    assert run_of(golden / name) == RUNS[name]


@pytest.mark.parametrize(("name", "num_processes"), [("stopped", 3), ("killed", 1)])
def test_what_was_interrupted_is_completed(golden, name, num_processes):
    before = {file: digest for file, digest in tree(golden / name).items() if file != "manifest.csv"}
    assert len(before) < 12
    assert play_processes(num_processes, *flags_of(name)) == [0] * num_processes
    after = tree(golden / name)
    assert before.items() <= after.items()
    assert len(after) == 12 + 1
    assert not list((golden / name).glob("manifest.part-*"))
    assert main(["verify", name, "--deep"]) == 0
    made_now = [(1, 5), (2, 0)]
    assert_parity(golden / name, {item: oracle_image(golden / "checkpoint", *item, steps=60) for item in made_now})


def test_images_without_their_manifest_are_adopted(golden):
    before = tree(golden / "plain")
    (golden / "plain" / "manifest.csv").unlink()
    assert run_job(*flags_of("plain")) == 0
    assert tree(golden / "plain") == before


def test_what_was_lost_is_made_again_and_nothing_else(golden):
    before = tree(golden / "plain")
    (golden / "plain" / "user_03" / "generated_001.png").unlink()
    assert run_job(*flags_of("plain")) == 0
    after = tree(golden / "plain")
    changed = {file for file in before if after[file] != before[file]}
    assert changed <= {"user_03/generated_001.png", "manifest.csv"}
    assert_parity(golden / "plain", {(3, 1): oracle_image(golden / "checkpoint", 3, 1, steps=2)})


def test_datasets_of_two_versions_are_joined(golden):
    assert run_job(*flags_of("plain", "--output_dir", "now", "--user_ids", "2")) == 0
    assert run_of(golden / "now") == RUNS["plain"]
    assert main(["merge", "plain", "other_users", "--into", "joined"]) == 0
    joined = tree(golden / "joined")
    for name in ("plain", "other_users"):
        assert {file: joined[file] for file in tree(golden / name) if file != "manifest.csv"}.items() <= tree(
            golden / name
        ).items()
    shutil.rmtree(golden / "other_users")
    assert main(["merge", "plain", "now", "--into", "both"]) == 0
    assert {*tree(golden / "both")} == {*tree(golden / "plain"), *tree(golden / "now")}
    assert main(["verify", "joined", "--deep"]) == main(["verify", "both", "--deep"]) == 0


def test_another_job_is_refused_and_says_why(golden, capsys):
    assert run_job(*flags_of("eta", "--eta", 0.25)) == 2
    assert "(eta was 0.5, is 0.25)" in capsys.readouterr().err
    assert run_job(*flags_of("plain", "--mixed_precision", "bf16")) == 2
    assert "(mixed_precision was no, is bf16); --mixed_precision no keeps that; " in capsys.readouterr().err
