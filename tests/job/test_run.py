"""Whole jobs in this process: what the bytes may depend on, and what they may not."""

import json
import platform
import re
import shutil
import socket
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tests import jobs
from tests.checkpoints import model_flags
from tests.definitions import chunks_of, csv_of, fields_of, files_in, name_of, read_csv
from tests.jobs import images_in, last_run, play_processes, run_job, tree
from tests.oracle import assert_parity, oracle_image
from userdiff import JobConfig
from userdiff.dataset.manifest import PartWriter
from userdiff.diffusion.model import JobModel, load_model
from userdiff.job import worker
from userdiff.job.run import run_process
from userdiff.shutdown import Failed


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    """5 users x 11 images in batches of 4, by one process: what every other way must equal."""
    output_dir = tmp_path_factory.mktemp("reference")
    assert run_job(*flags, "--num_images_per_user", 11, "--batch_size", 4, "--output_dir", output_dir) == 0
    return tree(output_dir)


@pytest.mark.parametrize("num_processes", [2, 3, 8, 17])
def test_any_number_of_processes_makes_the_same_bytes(num_processes, flags, reference, tmp_path):
    job = [*flags, "--num_images_per_user", 11, "--batch_size", 4, "--output_dir", tmp_path]
    assert play_processes(num_processes, *job) == [0] * num_processes
    assert tree(tmp_path) == reference
    assert not list(tmp_path.glob("manifest.part-*"))


@pytest.mark.parametrize(
    ("more", "num_processes", "num_threads"),
    [
        (["--batch_size", 1, "--user_ids", "2-4"], 5, 1),
        (["--batch_size", 3, "--user_ids", "2-4"], 5, 1),
        (["--batch_size", 7, "--user_ids", "2-4"], 5, 1),
        (["--batch_size", 5], 3, 3),
        (["--num_images_per_user", 1, "--user_ids", 3], 16, 1),
        (["--num_users", 31, "--on_incompatible_weights", "random", "--user_ids", "29-31"], 2, 1),
    ],
)
def test_odd_jobs_make_the_same_bytes_at_any_number_of_processes(more, num_processes, num_threads, flags, tmp_path):
    job = [*flags, "--num_images_per_user", 5, *more]
    torch.set_num_threads(num_threads)
    try:
        assert run_job(*job, "--output_dir", tmp_path / "one") == 0
        assert play_processes(num_processes, *job, "--output_dir", tmp_path / "many") == [0] * num_processes
    finally:
        torch.set_num_threads(1)
    assert tree(tmp_path / "one") == tree(tmp_path / "many")
    of_each = {row["conditioning"] for row in read_csv(tmp_path / "one" / "manifest.csv")}
    assert of_each == {"random" if "random" in more else "trained"}


@pytest.mark.parametrize(
    "steps",
    [
        [["--num_images_per_user", 11, "--user_ids", 4, 2, 5, 1, 3]],
        [["--user_ids", 4], ["--num_images_per_user", 3, "--user_ids", 2, 5], ["--num_images_per_user", 11]],
        [["--num_images_per_user", 11], ["--num_images_per_user", 2, "--user_ids", 1]],
    ],
    ids=["in another order", "grown", "asked for less"],
)
def test_whatever_led_to_a_dataset_it_is_the_same(steps, flags, reference, tmp_path):
    for number, step in enumerate(steps):
        keeps_the_folders = ["--batch_size", 4] if number == 0 else []
        job = [*flags, "--num_images_per_user", 1, *step, *keeps_the_folders, "--output_dir", tmp_path]
        assert run_job(*job) == 0
    assert tree(tmp_path) == reference


def test_the_same_command_again_makes_nothing_and_waits_for_who_comes_late(flags, tmp_path, capsys, monkeypatch):
    def run_late(config, model, coordinator):
        time.sleep(coordinator.process_index)
        return run_process(config, model, coordinator)

    job = [*flags, "--num_images_per_user", 2, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    before = {path: path.stat().st_mtime_ns for path in images_in(tmp_path)}
    monkeypatch.setattr(jobs, "run_process", run_late)
    assert play_processes(2, *job) == [0, 0]  # an empty plan
    assert {path: path.stat().st_mtime_ns for path in images_in(tmp_path)} == before
    assert "10 already there, 0 to make" in capsys.readouterr().out


def test_what_a_killed_job_left_and_a_user_damaged_is_made_good(flags, reference, tmp_path, capsys):
    job = [*flags, "--output_dir", tmp_path, "--batch_size", 4, "--num_images_per_user", 11]
    assert run_job(*job) == 0
    lines = (tmp_path / "manifest.csv").read_text().splitlines(keepends=True)
    (tmp_path / "manifest.part-00007.csv").write_text("".join(lines[:20]) + lines[20][:30])
    (tmp_path / "manifest.csv").unlink()
    (tmp_path / "user_01" / ".generated_003.png.tmp-0123abcd").write_bytes(b"half a PN")
    assert run_job(*job) == 0
    assert "55 already there, 0 to make" in capsys.readouterr().out
    assert tree(tmp_path) == reference
    assert not list(tmp_path.glob("manifest.part-*"))
    for number in (0, 3, 7):
        (tmp_path / "user_02" / f"generated_{number:03d}.png").unlink()
    (tmp_path / "user_03" / "generated_004.png").write_bytes(b"")
    shutil.rmtree(tmp_path / "user_04")
    assert play_processes(2, *job) == [0, 0]
    assert tree(tmp_path) == reference


def test_the_folder_holds_what_the_contract_says(flags, tmp_path):
    items = [(user_id, image_index) for user_id in (1, 4) for image_index in range(3)]
    job = [*flags, "--num_inference_steps", 20, "--num_images_per_user", 3, "--user_ids", 1, 4]
    assert run_job(*job, "--output_dir", tmp_path) == 0
    files = files_in(tmp_path)
    assert set(files) == {*(name_of(*item) for item in items), "manifest.csv", "run.json", "preview.html"}
    rows = [fields_of(*item, files[name_of(*item)], size=(16, 16)) for item in items]
    assert files["manifest.csv"].decode() == csv_of(*rows)
    run = json.loads(files["run.json"])["run"]
    for item in items:
        with Image.open(tmp_path / name_of(*item)) as image:
            assert image.text == chunks_of(*item, run=run)
    assert (last_run(tmp_path)["state"], last_run(tmp_path)["published"]) == ("ended", 6)


def test_train_user_ids_give_user_3_the_second_row(checkpoint, tmp_path, capsys):
    job = [*model_flags(checkpoint), "--num_inference_steps", 2, "--num_images_per_user", 1]
    assert run_job(*job, "--train_user_ids", 1, 3, 5, "--output_dir", tmp_path / "out") == 0
    assert "1:0 3:1 5:2" in capsys.readouterr().out
    expected = {(user, 0): oracle_image(checkpoint, user, 0, steps=2, user_index=i) for i, user in enumerate((1, 3, 5))}
    assert_parity(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["user_index"] == {"1": 0, "3": 1, "5": 2}
    with Image.open(tmp_path / "out" / "user_03" / "generated_000.png") as image:
        wrong = oracle_image(checkpoint, 3, 0, steps=2).astype(int)
        assert np.abs(np.asarray(image) - wrong).max() > 1  # the plain rule would have shown someone else


def test_an_eta_of_1_is_the_same_job_however_it_is_written(checkpoint):
    paths = {"vae_path": checkpoint, "unet_path": checkpoint, "condition_encoder_path": checkpoint, "num_users": 5}
    one, same = (load_model(JobConfig(**paths, eta=eta), torch.device("cpu"), "no") for eta in (1, 1.0))
    assert one.run == same.run


def test_the_folders_numerics_are_kept_beside_those_of_each_run(flags, tmp_path):
    job = [*flags, "--user_ids", 1, "--output_dir", tmp_path]
    for num_images, batch_size in ((2, ["--batch_size", 4]), (3, ["--batch_size", 8]), (4, [])):
        assert run_job(*job, "--num_images_per_user", num_images, *batch_size) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["numerics"]["batch_size"] == 4
    assert [run["numerics"]["batch_size"] for run in record["history"]] == [4, 8, 4]


def test_processes_with_other_numerics_than_the_main_one_warn_once_a_kind(flags, tmp_path, capsys, monkeypatch):
    class OtherCard(JobModel):
        device_name = "another card"

    def run_on_two_kinds(config, model, coordinator):
        for process_index in range(4):  # who comes too late is not asked
            coordinator.wait_for(f"name/{process_index}")
        is_other = coordinator.process_index in (1, 3)
        return run_process(config, OtherCard(**vars(model)) if is_other else model, coordinator)

    monkeypatch.setattr(jobs, "run_process", run_on_two_kinds)
    job = [*flags, "--num_images_per_user", 2, "--batch_size", 2]
    assert play_processes(4, *job, "--output_dir", tmp_path / "mixed") == [0] * 4
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "the main process" in line]
    who = rf"process [13] on {re.escape(socket.gethostname())}"
    said = (
        rf"Warning: device is another card in {who}, {platform.machine()} in the main process; last bits may depend .*"
    )
    assert re.fullmatch(said, warning)
    monkeypatch.undo()
    assert play_processes(4, *job, "--output_dir", tmp_path / "alike") == [0] * 4
    assert "the main process" not in capsys.readouterr().err


def test_an_image_that_is_not_finite_is_not_saved_and_tried_again(flags, tmp_path, capsys, monkeypatch):
    decode, calls = AutoencoderKL.decode, []

    def decode_badly(self, latents, **options):
        images = decode(self, latents, **options)[0]
        if len(images) == 1:  # where it is tried whether it can decode at all
            return (images,)
        calls.append(None)
        images[1 if len(calls) == 1 else 0, 0, 3, 3] = float("nan" if len(calls) == 1 else "-inf")
        return (images,)

    job = [*flags, "--num_images_per_user", 4, "--user_ids", 1, 2, "--batch_size", 4, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(AutoencoderKL, "decode", decode_badly)
    assert run_job(*job) == 1
    failed = last_run(tmp_path / "out")["failed"]
    assert len(failed) == len(calls)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Failed"))
    names = ", ".join(f"user_{user_id:02d}/generated_{image_index:03d}.png" for user_id, image_index in failed)
    assert said == f"Failed: {len(failed)} images are not finite; the same command tries again: {names}"
    assert len(read_csv(tmp_path / "out" / "manifest.csv")) == 8 - len(failed)
    for user_id, image_index in failed:
        assert not (tmp_path / "out" / f"user_{user_id:02d}" / f"generated_{image_index:03d}.png").exists()
    monkeypatch.undo()
    assert run_job(*job) == 0
    assert run_job(*job[:-1], tmp_path / "undisturbed") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_an_image_that_vanishes_while_the_job_runs_is_not_called_done(flags, tmp_path, capsys, monkeypatch):

    append = PartWriter.append

    def append_and_lose(self, row):
        append(self, row)
        if (row.user_id, row.image_index) == (2, 1):
            (tmp_path / row.file_name).unlink()

    monkeypatch.setattr(PartWriter, "append", append_and_lose)
    assert run_job(*flags, "--num_images_per_user", 2, "--user_ids", 1, 2, "--output_dir", tmp_path) == 1
    out = capsys.readouterr().out
    assert "Done: 3 of 4 images" in out
    assert (
        "Failed: 1 image is not written, or gone or changed since; the same command makes up for it: user_02/generated_001.png"
    ) in out


def test_the_launchers_precision_makes_the_images_of_the_flag(flags, tmp_path, monkeypatch):
    job = [*flags, "--num_images_per_user", 3, "--user_ids", 1, 2]
    assert run_job(*job, "--mixed_precision", "bf16", "--output_dir", tmp_path / "flag") == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_job(*job, "--output_dir", tmp_path / "launcher") == 0
    assert tree(tmp_path / "flag") == tree(tmp_path / "launcher")
    assert json.loads((tmp_path / "flag" / "run.json").read_text())["identity"]["mixed_precision"] == "bf16"


def test_a_disk_that_fails_is_one_line_and_loses_nothing(flags, reference, tmp_path, capsys, monkeypatch):
    publish, published = worker.publish, []

    def publish_until_full(path, data, **options):
        if path.suffix == ".png":
            published.append(path)
            if len(published) == 9:
                raise OSError(28, "No space left on device")
        publish(path, data, **options)

    job = [*flags, "--num_images_per_user", 11, "--batch_size", 4, "--output_dir", tmp_path]
    monkeypatch.setattr(worker, "publish", publish_until_full)
    assert run_job(*job) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    done = images_in(tmp_path)
    assert len(done) >= 8
    assert error == (
        f"batch_generate.py: error: --output_dir: No space left on device, make room; {len(done)} of 55 images are in "
        f"{tmp_path}, the same command goes on from there"
    )
    assert last_run(tmp_path)["state"] == "failed"
    monkeypatch.undo()
    assert run_job(*job) == 0
    assert tree(tmp_path) == reference


def test_another_process_that_found_bad_input_is_quoted_without_a_promise(flags, tmp_path, capsys, monkeypatch):
    def failed(config, shutdown):
        raise Failed("process 3 on node7: --vae_path: nowhere is not a folder", exit_status=2)

    monkeypatch.setattr("userdiff.job.run.run", failed)
    assert run_job(*flags, "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said == "batch_generate.py: error: process 3 on node7: --vae_path: nowhere is not a folder\n"


def test_where_no_more_threads_are_started_a_line_says_so_and_nothing_is_lost(
    flags, reference, tmp_path, capsys, monkeypatch
):
    job = [*flags, "--num_images_per_user", 11, "--batch_size", 4, "--output_dir", tmp_path]
    start, left = threading.Thread.start, [0]

    def start_some(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    for limit in range(20):
        left[0] = limit
        if (status := run_job(*job)) == 0:
            break
        error = capsys.readouterr().err
        assert status == 1
        assert "the system starts no more threads" in error
        assert "Traceback" not in error
    monkeypatch.undo()
    assert limit >= 3
    assert run_job(*job) == 0
    assert tree(tmp_path) == reference


def test_without_a_folder_for_temporary_files_the_variable_is_named(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    assert run_job(*flags, "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("batch_generate.py: error: TMPDIR: No usable temporary directory")
