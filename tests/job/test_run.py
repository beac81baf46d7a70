"""Whole jobs in this process: what the bytes may depend on, and what they may not."""

import csv
import json
import platform
import random
import re
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import jobs
from tests.checkpoints import model_flags
from tests.jobs import play_processes, run_job, tree
from tests.oracle import assert_parity, oracle_image, oracle_seed
from userdiff.dataset.manifest import PartWriter
from userdiff.dataset.rows import COLUMNS
from userdiff.diffusion.model import JobModel
from userdiff.job import worker
from userdiff.job.run import run_process
from userdiff.shutdown import Failed

NUM_USERS = 5


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 2, "--device", "cpu"]


@pytest.fixture
def rows():
    def read(output_dir):
        with open(output_dir / "manifest.csv", newline="") as file:
            return list(csv.DictReader(file))

    return read


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


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_odd_batch_sizes_make_the_same_bytes_at_any_number_of_processes(batch_size, flags, tmp_path):
    job = [*flags, "--num_images_per_user", 5, "--user_ids", "2-4", "--batch_size", batch_size]
    assert run_job(*job, "--output_dir", tmp_path / "one") == 0
    assert play_processes(5, *job, "--output_dir", tmp_path / "five") == [0] * 5
    assert tree(tmp_path / "one") == tree(tmp_path / "five")


def test_one_image_and_sixteen_processes(flags, tmp_path):
    job = [*flags, "--num_images_per_user", 1, "--user_ids", 3]
    assert run_job(*job, "--output_dir", tmp_path / "one") == 0
    assert play_processes(16, *job, "--output_dir", tmp_path / "sixteen") == [0] * 16
    assert tree(tmp_path / "one") == tree(tmp_path / "sixteen")
    assert len(tree(tmp_path / "one")) == 2


def test_the_same_command_again_makes_nothing(flags, tmp_path, capsys):
    job = [*flags, "--num_images_per_user", 2, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("user_*/*")}
    assert play_processes(3, *job) == [0, 0, 0]  # an empty plan
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("user_*/*")} == before
    assert "10 already there, 0 to make" in capsys.readouterr().out


def test_a_process_that_comes_late_to_a_finished_dataset_is_waited_for(flags, reference, tmp_path, monkeypatch):
    def run_late(config, model, coordinator):
        time.sleep(coordinator.process_index)
        return run_process(config, model, coordinator)

    job = [*flags, "--num_images_per_user", 11, "--batch_size", 4, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    monkeypatch.setattr(jobs, "run_process", run_late)
    assert play_processes(2, *job) == [0, 0]
    assert tree(tmp_path) == reference


def test_the_order_of_user_ids_does_not_matter(flags, reference, tmp_path):
    ids = list(range(1, NUM_USERS + 1))
    random.Random(1).shuffle(ids)
    job = [*flags, "--num_images_per_user", 11, "--batch_size", 4, "--user_ids", *ids, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    assert tree(tmp_path) == reference


def test_an_image_generated_alone_is_the_same(flags, reference, tmp_path):
    job = [*flags, "--user_ids", 4, "--num_images_per_user", 1, "--batch_size", 4, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    name = "user_04/generated_000.png"
    assert tree(tmp_path)[name] == reference[name]


def test_a_grown_dataset_equals_one_made_at_once(flags, reference, tmp_path):
    job = [*flags, "--output_dir", tmp_path]
    assert run_job(*job, "--num_images_per_user", 3, "--user_ids", 2, 5, "--batch_size", 4) == 0
    assert run_job(*job, "--num_images_per_user", 3) == 0  # keeps the folder's batch size
    assert run_job(*job, "--num_images_per_user", 11) == 0
    assert tree(tmp_path) == reference


def test_asking_for_less_keeps_what_is_there(flags, reference, tmp_path):
    job = [*flags, "--output_dir", tmp_path, "--batch_size", 4]
    assert run_job(*job, "--num_images_per_user", 11) == 0
    assert run_job(*job, "--num_images_per_user", 2, "--user_ids", 1) == 0
    assert tree(tmp_path) == reference


def test_deleted_and_damaged_images_are_made_again(flags, reference, tmp_path):
    job = [*flags, "--output_dir", tmp_path, "--batch_size", 4, "--num_images_per_user", 11]
    assert run_job(*job) == 0
    for number in (0, 3, 7):
        (tmp_path / "user_02" / f"generated_{number:03d}.png").unlink()
    (tmp_path / "user_03" / "generated_004.png").write_bytes(b"")
    truncated = tmp_path / "user_05" / "generated_001.png"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    shutil.rmtree(tmp_path / "user_04")
    assert play_processes(2, *job) == [0, 0]
    assert tree(tmp_path) == reference


def test_a_lost_manifest_is_rebuilt_from_the_images(flags, reference, tmp_path, capsys):
    job = [*flags, "--output_dir", tmp_path, "--batch_size", 4, "--num_images_per_user", 11]
    assert run_job(*job) == 0
    (tmp_path / "manifest.csv").unlink()
    assert run_job(*job) == 0
    assert "55 already there, 0 to make" in capsys.readouterr().out
    assert tree(tmp_path) == reference


def test_parts_and_temporaries_of_a_killed_run_are_taken_up(flags, reference, tmp_path):
    job = [*flags, "--output_dir", tmp_path, "--batch_size", 4, "--num_images_per_user", 11]
    assert run_job(*job) == 0
    lines = (tmp_path / "manifest.csv").read_text().splitlines(keepends=True)
    (tmp_path / "manifest.part-00007.csv").write_text("".join(lines[:20]) + lines[20][:30])
    (tmp_path / "manifest.csv").unlink()
    (tmp_path / "user_01" / ".generated_003.png.tmp-0123abcd").write_bytes(b"half a PN")
    assert run_job(*job) == 0
    assert tree(tmp_path) == reference
    assert not list(tmp_path.glob("manifest.part-*"))


def test_threads_are_the_same_on_both_sides(flags, tmp_path):
    job = [*flags, "--num_images_per_user", 6, "--batch_size", 5]
    torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
    try:
        assert run_job(*job, "--output_dir", tmp_path / "one") == 0
        assert play_processes(3, *job, "--output_dir", tmp_path / "three") == [0] * 3
    finally:
        torch.set_num_threads(1)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


def test_the_folder_holds_what_the_contract_says(flags, rows, tmp_path):
    out = tmp_path / "out"
    assert run_job(*flags, "--num_images_per_user", 3, "--user_ids", 1, 4, "--output_dir", out) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"user_01", "user_04", "manifest.csv", "run.json", "preview.html"}
    table = rows(out)
    assert tuple(table[0]) == COLUMNS
    assert [(int(row["user_id"]), int(row["image_index"])) for row in table] == [
        (u, i) for u in (1, 4) for i in range(3)
    ]
    record = json.loads((out / "run.json").read_text())
    for row in table:
        user_id, image_index = int(row["user_id"]), int(row["image_index"])
        assert row["file_name"] == f"user_{user_id:02d}/generated_{image_index:03d}.png"
        assert int(row["seed"]) == oracle_seed(42, user_id, image_index)
        assert (row["width"], row["height"], row["conditioning"]) == ("16", "16", "trained")
        with Image.open(out / row["file_name"]) as image:
            assert image.text == {
                "user_id": row["user_id"],
                "image_index": row["image_index"],
                "seed": row["seed"],
                "num_inference_steps": "2",
                "conditioning": "trained",
                "userdiff_run": record["run"],
            }
    assert record["history"][-1]["state"] == "ended"
    assert record["history"][-1]["published"] == 6


def test_swapping_two_users_embeddings_swaps_their_images(checkpoint, tmp_path):
    swapped = shutil.copytree(checkpoint, tmp_path / "swapped")
    weights = load_file(swapped / "condition_encoder.safetensors")
    weights["user_embedding.weight"][[0, 2]] = weights["user_embedding.weight"][[2, 0]]
    save_file(weights, swapped / "condition_encoder.safetensors")
    expected = {(1, 0): oracle_image(checkpoint, 1, 0, steps=2, user_index=2)}
    job = [*model_flags(swapped), "--user_ids", 1, "--num_images_per_user", 1, "--num_inference_steps", 2]
    assert run_job(*job, "--output_dir", tmp_path / "out") == 0
    assert_parity(tmp_path / "out", expected)


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


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--user_ids", 6], "--user_ids: 6 is out of range, this checkpoint has users 1-5"),
        (["--user_ids", "2-9", "--train_user_ids", 2, 4, 9], "--user_ids: 3 5-8 is out of range, this checkpoint has users 2 4 9"),
        (["--num_inference_steps", 1001], "--num_inference_steps: "),
        (["--num_users", 31], "--condition_encoder_path: "),
        (["--scheduler_path", "nowhere"], "--scheduler_path: nowhere is not a folder"),
        (["--user_map", "nowhere.json"], "--user_map: "),
        (["--vae_path", "nowhere"], "--vae_path: nowhere is not a folder"),
        (["--unet_path", "nowhere"], "--unet_path: nowhere is not a folder"),
        (["--condition_encoder_path", "nowhere.pt", "--on_incompatible_weights", "random"],
         "--condition_encoder_path: nowhere.pt does not exist"),
        (["--device", "cuda"], "--device: no CUDA device is available here, use --device cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(extra, expected, flags, tmp_path, capsys):
    if extra[0] == "--device" and torch.cuda.is_available():
        extra, expected = ["--seed", -1], "--seed: -1 is out of range"
    assert run_job(*flags, "--output_dir", tmp_path / "out", *extra) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"batch_generate.py: error: {expected}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_random_conditioning_is_marked_everywhere(flags, rows, tmp_path, capsys):
    job = [*flags, "--num_users", 31, "--on_incompatible_weights", "random", "--num_images_per_user", 1]
    job += ["--user_ids", "29-31"]
    assert run_job(*job, "--output_dir", tmp_path / "one") == 0
    assert capsys.readouterr().err.count("the condition encoder is RANDOM") == 2  # at the start and at the end
    assert {row["conditioning"] for row in rows(tmp_path / "one")} == {"random"}
    assert play_processes(2, *job, "--output_dir", tmp_path / "two") == [0, 0]
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_images_of_another_identity_are_not_mixed_in(flags, tmp_path, capsys):
    job = [*flags, "--num_images_per_user", 1, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    before = tree(tmp_path)
    assert run_job(*job, "--seed", 43, "--eta", 0.5) == 2
    error = capsys.readouterr().err
    assert "eta was 0.0, is 0.5; seed was 42, is 43" in error
    assert tree(tmp_path) == before


def test_an_eta_of_1_is_the_same_job_however_it_is_written(checkpoint, tmp_path):
    from userdiff import JobConfig
    from userdiff.diffusion.model import load_model

    paths = {"vae_path": checkpoint, "unet_path": checkpoint, "condition_encoder_path": checkpoint, "num_users": 5}
    configs = [JobConfig(**paths, eta=eta, num_inference_steps=2) for eta in (1, 1.0)]
    one, same = (load_model(config, torch.device("cpu"), "no") for config in configs)
    assert one.run == same.run


def test_other_numerics_warn_and_are_kept_with_the_run_they_were_of(flags, tmp_path, capsys):
    job = [*flags, "--user_ids", 1, "--output_dir", tmp_path]
    assert run_job(*job, "--num_images_per_user", 2, "--batch_size", 4) == 0
    assert "new images may differ" not in capsys.readouterr().err
    assert run_job(*job, "--num_images_per_user", 3, "--batch_size", 8) == 0
    assert "batch_size was 4 when this folder was begun, is 8; new images may differ" in capsys.readouterr().err
    assert run_job(*job, "--num_images_per_user", 4) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["numerics"]["batch_size"] == 4
    assert [run["numerics"]["batch_size"] for run in record["history"]] == [4, 8, 4]


def test_processes_with_other_numerics_than_the_main_one_warn_once_a_kind(flags, tmp_path, capsys, monkeypatch):
    class OtherCard(JobModel):
        device_name = "another card"

    def run_on_two_kinds(config, model, coordinator):
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


def test_fewer_train_user_ids_than_rows_warn(flags, tmp_path, capsys):
    job = [*flags, "--train_user_ids", 1, 3, "--num_images_per_user", 1, "--output_dir", tmp_path]
    assert run_job(*job) == 0
    assert "--train_user_ids names 2 users, the table has 5 rows" in capsys.readouterr().err


def test_images_without_a_record_are_not_touched(flags, tmp_path, capsys):
    (tmp_path / "user_01").mkdir()
    (tmp_path / "user_01" / "generated_000.png").write_bytes(b"somebody's")
    assert run_job(*flags, "--output_dir", tmp_path) == 2
    assert "has no run.json but holds user_01/generated_000.png" in capsys.readouterr().err
    assert (tmp_path / "user_01" / "generated_000.png").read_bytes() == b"somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["user_01"]


def test_an_output_dir_that_is_a_file_is_refused(flags, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run_job(*flags, "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("batch_generate.py: error: --output_dir: ")


def test_an_image_that_is_not_finite_is_not_saved_and_tried_again(flags, rows, tmp_path, capsys, monkeypatch):
    decode, calls = AutoencoderKL.decode, []

    def decode_badly(self, latents, **options):
        (images,) = decode(self, latents, **options)
        calls.append(None)
        images[1 if len(calls) == 1 else 0, 0, 3, 3] = float("nan" if len(calls) == 1 else "-inf")
        return (images,)

    job = [*flags, "--num_images_per_user", 4, "--user_ids", 1, 2, "--batch_size", 4, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(AutoencoderKL, "decode", decode_badly)
    assert run_job(*job) == 1
    failed = json.loads((tmp_path / "out" / "run.json").read_text())["history"][-1]["failed"]
    assert len(failed) == len(calls)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Failed"))
    names = ", ".join(f"user_{user_id:02d}/generated_{image_index:03d}.png" for user_id, image_index in failed)
    assert said == f"Failed: {len(failed)} images are not finite; the same command tries again: {names}"
    assert len(rows(tmp_path / "out")) == 8 - len(failed)
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
        "Failed: 1 image is gone or changed since written; the same command makes up for it: user_02/generated_001.png"
    ) in out


def test_bf16_is_the_same_at_any_number_of_processes(flags, tmp_path, monkeypatch):
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
    done = list(tmp_path.glob("user_*/*.png"))
    assert len(done) >= 8
    assert error == (
        f"batch_generate.py: error: --output_dir: No space left on device, make room; {len(done)} of 55 images are in "
        f"{tmp_path}, the same command goes on from there"
    )
    assert json.loads((tmp_path / "run.json").read_text())["history"][-1]["state"] == "failed"
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
