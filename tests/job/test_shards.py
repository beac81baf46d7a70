"""Shards of a dataset, made by independent jobs and joined: the same bytes as one job makes."""

import gc
import random

import pytest

from tests.checkpoints import model_flags
from tests.definitions import files_in, name_of, read_csv, shard_of
from tests.job.test_crash import Death
from tests.job.test_output_folder import edited
from tests.jobs import images_in, last_run, play_processes, run_job, tree
from userdiff.cli import main
from userdiff.config import parse_args
from userdiff.job import launcher
from userdiff.tools.merge import merge_into
from userdiff.tools.status import read_status
from userdiff.tools.verify import verify

REQUESTS = {
    "ragged": ["--num_images_per_user", 11],
    "of some users": ["--user_ids", 5, 2, "--num_images_per_user", 3],
    "of one image": ["--user_ids", 3, "--num_images_per_user", 1],
}


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 1, "--batch_size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def wholes(flags, tmp_path_factory):
    """What one job makes of each request."""
    folder = tmp_path_factory.mktemp("wholes")
    for name, request in REQUESTS.items():
        assert run_job(*flags, *request, "--output_dir", folder / name) == 0
    return {name: tree(folder / name) for name in REQUESTS}


@pytest.fixture(scope="module")
def death():
    return Death()


def in_shard(folder, number, num_shards):
    """Whether a dataset holds images of this shard alone."""
    items = [(int(row["user_id"]), int(row["image_index"])) for row in read_csv(folder / "manifest.csv")]
    return all(shard_of(*item, 4, num_shards) == number for item in items)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_shards_killed_and_resumed_and_joined_in_any_order_are_one_job(
    num_shards, request_name, flags, wholes, death, tmp_path, capsys
):
    order = random.Random(num_shards)
    folders = [tmp_path / f"shard_{number}" for number in range(1, num_shards + 1)]
    sizes = []
    for number, folder in enumerate(folders, 1):
        job = [*flags, *REQUESTS[request_name], "--shard", f"{number}/{num_shards}", "--output_dir", folder]
        with death(folder, order.randrange(4, 40)):
            run_job(*job)
        gc.collect()  # the lock of a process that is gone goes with it
        assert play_processes(2, *job) == [0, 0]
        assert in_shard(folder, number, num_shards)
        status = read_status(folder)
        assert (status.state, status.beyond) == ("complete", 0)
        assert status.shard == (f"{number}/{num_shards}" if num_shards > 1 else None)
        assert verify(folder, deep=True) == []
        assert {path.parent for path in images_in(folder)} == set(folder.glob("user_*"))  # loaders refuse empty ones
        sizes.append(len(images_in(folder)))
    assert sum(sizes) == len(wholes[request_name]) - 1
    assert max(sizes) - min(sizes) <= 2
    capsys.readouterr()
    for into in ("dataset", "again"):
        order.shuffle(folders)
        assert main(["merge", *map(str, folders), "--into", str(tmp_path / into)]) == 0
        assert tree(tmp_path / into) == wholes[request_name]
        assert read_status(tmp_path / into).state == "complete"
    assert "not there" not in capsys.readouterr().out


def test_a_shard_knows_its_share_in_all_that_is_said_of_it(flags, tmp_path, capsys):
    out = tmp_path / "out"
    job = [*flags, "--num_images_per_user", 11, "--shard", "2/7", "--output_dir", out]
    assert run_job(*job, "--dry_run") == 0
    assert "Plan: 7 images (shard 2/7 of 5 users x 11), 0 already there, 7 to make in " in capsys.readouterr().out
    assert run_job(*job) == 0
    said = capsys.readouterr().out
    assert f"Done: 7 of 7 images of shard 2/7 in {out}, 7 of them made now" in said
    assert "would do" not in said  # a batch size that is another for each shard would cut them differently
    assert last_run(out)["shard"] == "2/7"
    assert "users 1-5, 11 images each, of which shard 2/7" in (out / "preview.html").read_text()
    assert main(["status", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: complete, shard 2/7\n")
    lost = images_in(out)[0]
    lost.unlink()
    assert main(["status", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "6", "1", "0"]
    assert run_job(*job) == 0
    assert "6 already there, 1 to make" in capsys.readouterr().out


def test_shards_are_grown_and_joined(flags, wholes, tmp_path):
    folders = [tmp_path / f"shard_{number}" for number in (1, 2, 3)]
    for request in (REQUESTS["of some users"], REQUESTS["ragged"]):
        for number, folder in enumerate(folders, 1):
            assert run_job(*flags, *request, "--shard", f"{number}/3", "--output_dir", folder) == 0
    assert [len(images_in(folder)) for folder in folders] == [18, 18, 19]
    merge_into(folders, tmp_path / "dataset")
    assert tree(tmp_path / "dataset") == wholes["ragged"]


def test_a_shard_asked_for_without_shard_becomes_the_whole_dataset_and_may_be_a_shard_again(flags, wholes, tmp_path):
    job = [*flags, *REQUESTS["ragged"], "--output_dir", tmp_path]
    assert run_job(*job, "--shard", "2/3") == 0
    assert run_job(*job) == 0
    assert tree(tmp_path) == wholes["ragged"]
    assert run_job(*job, "--shard", "2/3") == 0
    status = read_status(tmp_path)
    assert (sum(status.wanted.values()), status.beyond) == (18, 37)
    assert run_job(*job, "--shard", "3/3") == 2


def test_what_a_joined_dataset_is_not_is_a_shard(flags, tmp_path, capsys):
    job = [*flags, "--num_images_per_user", 3]
    for number in (1, 2):
        assert run_job(*job, "--shard", f"{number}/2", "--output_dir", tmp_path / f"shard_{number}") == 0
    merge_into([tmp_path / "shard_1", tmp_path / "shard_2"], tmp_path / "dataset")
    before = files_in(tmp_path / "dataset")
    assert run_job(*job, "--shard", "1/2", "--output_dir", tmp_path / "dataset") == 2
    assert "was made without --shard" in capsys.readouterr().err
    assert files_in(tmp_path / "dataset") == before


def test_an_empty_shard_may_be_cut_anew(flags, tmp_path):
    job = [*flags, "--user_ids", 3, "--num_images_per_user", 1, "--output_dir", tmp_path]
    assert run_job(*job, "--shard", "1/7") == 0
    assert not images_in(tmp_path)
    assert run_job(*job, "--shard", "1/3") == 0
    assert len(images_in(tmp_path)) == 1


def test_an_edited_image_of_another_shard_is_not_this_ones_to_make_again(flags, tmp_path, capsys):
    job = [*flags, "--num_images_per_user", 3, "--output_dir", tmp_path]
    assert run_job(*job, "--shard", "1/2") == 0
    assert run_job(*job) == 0
    whole = tree(tmp_path)
    edited(tmp_path, name_of(1, 1))  # of shard 1
    assert run_job(*job, "--shard", "1/2") == 0
    assert tree(tmp_path) == whole
    edited(tmp_path, name_of(1, 0))  # of shard 2
    kept = (tmp_path / name_of(1, 0)).read_bytes()
    assert run_job(*job, "--shard", "1/2") == 0
    assert f"beyond this request and missing or damaged: {name_of(1, 0)}" in capsys.readouterr().out
    assert (tmp_path / name_of(1, 0)).read_bytes() == kept
    assert run_job(*job) == 0
    assert tree(tmp_path) == whole


# `--shard auto`

SLURM = {"SLURM_ARRAY_TASK_COUNT": 7, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_MAX": 6}
FROM_1 = {"SLURM_ARRAY_TASK_COUNT": 7, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_MAX": 7}
SOME = {"SLURM_ARRAY_TASK_COUNT": 2, "SLURM_ARRAY_TASK_MIN": 2, "SLURM_ARRAY_TASK_MAX": 5}


def auto(monkeypatch, environment, *flags):
    for name in (*SLURM, "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return ["--shard", "auto", *flags]


@pytest.mark.parametrize(
    ("environment", "more", "shard"),
    [
        ({"SLURM_ARRAY_TASK_ID": 0, **SLURM}, [], "1/7"),
        ({"SLURM_ARRAY_TASK_ID": 6, **SLURM}, [], "7/7"),
        ({"SLURM_ARRAY_TASK_ID": 1, **FROM_1}, [], "1/7"),
        ({"SLURM_ARRAY_TASK_ID": 7, **FROM_1}, [], "7/7"),
        ({"SLURM_ARRAY_TASK_ID": 2, "SLURM_ARRAY_TASK_COUNT": 7, "SLURM_ARRAY_TASK_MIN": 0}, [], "3/7"),
        ({"SLURM_ARRAY_TASK_ID": 5, **SLURM}, ["--num_shards", 7], "6/7"),
        ({"SLURM_ARRAY_TASK_ID": 5, **SOME}, ["--num_shards", 7], "6/7"),  # some of the tasks, queued again
        ({"JOB_COMPLETION_INDEX": 0}, ["--num_shards", 7], "1/7"),
        ({"JOB_COMPLETION_INDEX": 6}, ["--num_shards", 7], "7/7"),
        ({"SLURM_ARRAY_TASK_ID": "", "JOB_COMPLETION_INDEX": 1}, ["--num_shards", 2], "2/2"),
    ],
)
def test_auto_is_the_task_of_the_array_and_says_so(environment, more, shard, flags, tmp_path, monkeypatch, capsys):
    which = auto(monkeypatch, environment, *more)
    assert run_job(*flags, "--num_images_per_user", 3, *which, "--output_dir", tmp_path) == 0
    name = next(name for name, value in environment.items() if value != "")
    assert f"Shard: {shard} ({name} {environment[name]} of {shard[2:]} from " in capsys.readouterr().out
    assert last_run(tmp_path)["shard"] == shard


@pytest.mark.parametrize(
    ("environment", "more", "said"),
    [
        ({}, [], "--shard: auto, but no array started this job: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX"),
        ({}, ["--num_shards", 7], "--shard: auto, but no array started this job"),
        ({"SLURM_ARRAY_TASK_ID": "x", **SLURM}, [], "--shard: auto, but SLURM_ARRAY_TASK_ID is 'x', needed: a number"),
        ({"SLURM_ARRAY_TASK_ID": 3}, [], "--shard: auto, but SLURM_ARRAY_TASK_COUNT is '', needed: a number"),
        (
            {"SLURM_ARRAY_TASK_ID": 5, **SOME},
            [],
            "--shard: auto, but the Slurm array has 2 of the tasks 2 to 5; --num_shards N",
        ),
        ({"SLURM_ARRAY_TASK_ID": 9, **SLURM}, [], "--shard: auto, but the Slurm array has 7 of the tasks 0 to 6"),
        (
            {"SLURM_ARRAY_TASK_ID": 1, **FROM_1},
            ["--num_shards", 7],
            "--num_shards: 7, but SLURM_ARRAY_TASK_MAX is 7, tasks count from 0; needed: --array=0-6",
        ),
        (
            {"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_COUNT": 2**21, "SLURM_ARRAY_TASK_MIN": 1},
            [],
            "--shard: '1/2097152' is no shard",
        ),
        ({"JOB_COMPLETION_INDEX": 2}, [], "--num_shards: missing, JOB_COMPLETION_INDEX does not say of how many"),
        ({"JOB_COMPLETION_INDEX": 7}, ["--num_shards", 7], "--num_shards: 7, but JOB_COMPLETION_INDEX is 7"),
    ],
)
def test_an_array_that_does_not_say_which_shard_is_refused(
    environment, more, said, flags, tmp_path, monkeypatch, capsys
):
    which = auto(monkeypatch, environment, *more)
    assert run_job(*flags, *which, "--output_dir", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_generate.py: error: {said}")
    assert not (tmp_path / "out").exists()


def test_what_the_environment_says_is_nothing_to_a_shard_that_is_named(monkeypatch):
    auto(monkeypatch, {"SLURM_ARRAY_TASK_ID": "x"})
    assert str(launcher.shard_of(parse_args(["--shard", "2/7"]))[0]) == "2/7"
    assert str(launcher.shard_of(parse_args([]))[0]) == "1/1"
