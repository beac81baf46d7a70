"""`userdiff status`, `verify`, `merge`: what a folder holds against what its records say."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import model_flags
from tests.jobs import ROOT, run_job, tree
from userdiff.cli import main
from userdiff.dataset.locks import folder_lock
from userdiff.dataset.png import encode_png
from userdiff.dataset.rows import read_lines
from userdiff.tools.merge import merge
from userdiff.tools.status import read_status
from userdiff.tools.verify import Problem, verify


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 1, "--batch_size", 4, "--num_images_per_user", 3]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert run_job(*flags, "--user_ids", 1, 2, "--output_dir", folder) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def interrupt(folder, rows_left=4, state="running"):
    """Make of a finished dataset what a killed run leaves: no manifest yet, a part with some rows, no end noted."""
    lines = (folder / "manifest.csv").read_text().splitlines(keepends=True)
    (folder / "manifest.csv").write_text(lines[0])
    (folder / "manifest.part-00000.csv").write_text("".join(lines[: 1 + rows_left]))
    for line in lines[1 + rows_left :]:
        (folder / line.split(",")[0]).unlink()
    change_entry(folder, state=state)


def change_entry(folder, **changes):
    record = json.loads((folder / "run.json").read_text())
    record["history"][-1].update(changes)
    (folder / "run.json").write_text(json.dumps(record))


# Status


def test_a_finished_dataset_is_complete(out):
    status = read_status(out)
    assert (status.state, status.detail, status.beyond) == ("complete", "", 0)
    assert (status.wanted, status.done, status.failed) == ({1: 3, 2: 3}, {1: 3, 2: 3}, {})


def test_a_run_that_is_going_on_is_told_by_its_lock_and_counted_by_its_parts(out):
    interrupt(out)
    with folder_lock(out):
        status = read_status(out)
    assert status.state == "running"
    assert "process " in status.detail
    assert status.done == {1: 3, 2: 1}


@pytest.mark.parametrize(
    ("state", "cause", "said", "detail"),
    [
        ("running", None, "killed", ""),  # nobody holds the folder, whatever the record says
        ("stopped by signal 15", None, "stopped by SIGTERM", ""),
        ("stopped by signal 999", None, "stopped by signal 999", ""),  # edited
        (
            "stopped by signal 15",
            "no sign of life from process 1 on vm",
            "stopped by SIGTERM",
            "no sign of life from process 1 on vm",
        ),
        ("failed", "--output_dir: No space left on device", "failed", "--output_dir: No space left on device"),
    ],
)
def test_how_a_run_ended_is_told(out, state, cause, said, detail):
    (out / ".userdiff.lock").write_text("process 17 on another")  # a killed job's file, which nobody holds
    interrupt(out, state=state)
    change_entry(out, cause=cause)
    status = read_status(out)
    assert (status.state, status.detail) == (said, detail)
    assert (status.wanted, status.done) == ({1: 3, 2: 3}, {1: 3, 2: 1})


def test_images_lost_since_are_missing_and_failed_ones_are_told_by_user(out):
    change_entry(out, failed=[[1, 0], [2, 1]])
    (out / "user_01" / "generated_002.png").unlink()
    (out / "user_02" / "generated_001.png").write_bytes(b"short")
    status = read_status(out)
    assert status.state == "incomplete"
    assert status.done == {1: 2, 2: 2}
    assert status.failed == {2: 1}  # the other one has been made meanwhile


def test_what_lies_beyond_the_last_request_is_counted(flags, out):
    assert run_job(*flags, "--user_ids", 2, "--num_images_per_user", 2, "--output_dir", out) == 0
    status = read_status(out)
    assert (status.state, status.wanted, status.done, status.beyond) == ("complete", {2: 2}, {2: 2}, 4)


def test_status_is_a_table(out, capsys):
    (out / "user_02" / "generated_001.png").unlink()
    assert main(["status", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: incomplete",
        "    user     done  missing   failed",
        "       1        3        0        0",
        "       2        2        1        0",
        "     all        5        1        0",
    ]


# Verification


def test_a_good_dataset_has_no_problems(out, capsys):
    assert verify(out) == verify(out, deep=True) == []
    assert main(["verify", str(out), "--deep"]) == 0
    assert capsys.readouterr().out == f"{out}: all is well (every image read)\n"


def test_verify_finds_what_is_missing_changed_or_foreign(out, capsys):
    (out / "user_01" / "generated_000.png").unlink()
    size = (out / "user_01" / "generated_001.png").stat().st_size
    (out / "user_01" / "generated_001.png").write_bytes(b"short")
    Image.new("RGB", (2, 2)).save(out / "user_02" / "generated_007.png")
    (out / "user_02" / "thumbs.db").write_bytes(b"x")
    (out / "user_02" / ".generated_001.png.tmp-0123abcd").write_bytes(b"x")  # the next run's business
    Image.new("RGB", (2, 2)).save(out / "cover.png")
    (out / "extra").mkdir()
    (out / "notes.txt").write_text("no harm")
    assert verify(out) == [
        Problem("changed", "user_01/generated_001.png", f"5 bytes, its row says {size}"),
        Problem("foreign", "cover.png", "an image beside the user folders hides all labels from loaders"),
        Problem("foreign", "extra", "loaders take every folder for a class"),
        Problem("foreign", "user_02/generated_007.png", "not made by a job"),
        Problem("foreign", "user_02/thumbs.db", "not an image of a job"),
        Problem("missing", "user_01/generated_000.png", "the file is gone"),
    ]
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"changed     user_01/generated_001.png: 5 bytes, its row says {size}"
    assert lines[6:] == [
        f"{out}: 6 problems (sizes compared, contents not read)",
        (
            "What is changed: images: remove those that have the size of their row, then run the job's command; "
            "manifest.csv: the job's command writes it anew, and so does `userdiff merge`"
        ),
        "What is foreign: move it away",
        "What is missing: images and run.json: run the job's command; manifest.csv: that, or `userdiff merge`",
    ]


def test_a_preview_says_what_it_lacks(out, capsys):
    assert main(["preview", str(out), "--picture", str(out / "picture")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("userdiff preview: error: --picture: ")
    assert "needed: a name ending in .png or " in error
    assert main(["preview", str(out), "--picture", str(out / "nowhere" / "picture.png")]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"userdiff preview: error: --picture: '{out}/nowhere/picture.png' lies in no folder, needed: one that exists\n"
    )
    (out / "manifest.csv").unlink()
    assert main(["preview", str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"; `userdiff merge {out}` makes its rows from the images\n")


def test_the_page_of_a_stopped_job_shows_what_is_there(out):
    interrupt(out)
    assert main(["preview", str(out)]) == 0
    assert (out / "preview.html").read_text().count("<img ") == 4


def test_in_a_picture_what_cannot_be_read_is_crossed_out(out, tmp_path, capsys):
    flip_a_byte(out / "user_01" / "generated_001.png")
    (out / "user_02" / "generated_002.png").unlink()
    assert main(["preview", str(out), "--picture", str(tmp_path / "picture.png"), "--scale", "1"]) == 0
    assert capsys.readouterr().err == ""
    with Image.open(tmp_path / "picture.png") as image:
        tiles = np.asarray(image.convert("RGB"))
    for user, column in np.ndindex(2, 3):
        tile = tiles[4 + 20 * user :, 4 + 20 * column :][:16, :16]
        is_crossed_out = (tile[np.eye(16, dtype=bool)] == 128).all() and (tile[1, 2:8] == 211).all()
        assert is_crossed_out == ((user, column) in {(0, 1), (1, 2)})


def test_a_long_list_is_cut_and_a_job_at_work_is_named(out, capsys):
    for number in range(25):
        (out / "user_01" / f"{number}.txt").write_text("x")
    with folder_lock(out):
        assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[20] == "foreign     and 5 more"
    assert lines[-1].startswith("A job is at work here (process ")


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


def swap(path):
    """Another image of the same dataset, with its own row's hash: only what it says of itself gives it away."""
    folder = path.parent.parent
    data = (folder / "user_02" / "generated_002.png").read_bytes()
    path.write_bytes(data)
    lines = (folder / "manifest.csv").read_text().splitlines()
    donor = next(line for line in lines if line.startswith("user_02/generated_002"))
    rows = [
        line.split(",")[:6] + donor.split(",")[6:] if "user_01/generated_001" in line else line.split(",")
        for line in lines
    ]
    (folder / "manifest.csv").write_text("".join(",".join(row) + "\n" for row in rows))


def other_pixels(path):
    """The right size, and the right words, but other pixels: only the hash gives it away."""
    with Image.open(path) as image:
        text, size = dict(image.text), path.stat().st_size
    black = np.zeros((16, 16, 3), np.uint8)
    short = size - len(encode_png(black, {**text, "more": ""}))
    path.write_bytes(encode_png(black, {**text, "more": short * "x"}))
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip_a_byte, "not an intact PNG"),
        (other_pixels, "its content is not what its row says"),
        (swap, "it says to be another image"),
    ],
)
def test_deep_reads_what_size_cannot_tell(out, damage, what):
    path = out / "user_01" / "generated_001.png"
    damage(path)
    shallow = [problem for problem in verify(out) if problem.name.endswith(".png")]
    deep = [problem for problem in verify(out, deep=True) if problem.name.endswith(".png")]
    assert shallow == []
    assert deep == [Problem("changed", "user_01/generated_001.png", what)]


def test_an_edited_manifest_and_a_row_less_are_told(out):
    text = (out / "manifest.csv").read_text()
    (out / "manifest.csv").write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert verify(out) == [
        Problem("changed", "manifest.csv", "the manifest is not as it was published"),
        Problem("unrecorded", "user_02", "1 image without a row"),
    ]


def drop_row(out, name):
    labels = out / "manifest.csv"
    labels.write_text("".join(row for row in labels.open() if name not in row))


def test_a_copy_of_another_image_is_neither_unrecorded_nor_there(out):
    name = "user_02/generated_001.png"
    drop_row(out, name)
    shutil.copy(out / "user_01" / "generated_001.png", out / name)
    problems = verify(out)
    assert Problem("changed", name, "it says to be another image") in problems
    assert Problem("missing", "user_02", "1 of 3 images are not there") in problems
    assert "unrecorded" not in {problem.kind for problem in problems}


def test_a_lost_manifest_is_no_loss_of_images(out, capsys):
    (out / "manifest.csv").unlink()
    (out / "user_02" / "generated_001.png").unlink()
    assert verify(out) == [
        Problem("missing", "manifest.csv", "the manifest is gone"),
        Problem("missing", "user_02", "1 of 3 images are not there"),
        Problem("unrecorded", "user_01", "3 images without a row"),
        Problem("unrecorded", "user_02", "2 images without a row"),
    ]
    status = read_status(out)
    assert (status.done, status.unrecorded) == ({1: 0, 2: 0}, 5)
    assert main(["status", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"5 images without a row, not counted here: `userdiff merge {out}` records what is this job's, and so does the "
        "job's command"
    )
    with folder_lock(out):  # their rows may be on the way
        assert main(["status", str(out)]) == 0
    assert "without a row" not in capsys.readouterr().out
    assert main(["merge", str(out)]) == 0
    assert read_status(out).done == {1: 3, 2: 2}


def test_an_unfinished_dataset_lacks_what_was_not_made_and_merged(out):
    interrupt(out)
    assert [problem for problem in verify(out) if problem.kind != "changed"] == [
        Problem("missing", "user_02", "2 of 3 images are not there"),
        Problem("unmerged", "manifest.part-00000.csv", "rows of an interrupted run"),
    ]
    with folder_lock(out):
        assert "unmerged" not in {problem.kind for problem in verify(out)}  # it is being written


def test_an_image_whose_row_is_on_the_way_is_no_problem_while_a_job_runs(out):
    text = (out / "manifest.csv").read_text()
    (out / "manifest.csv").write_text("".join(text.splitlines(keepends=True)[:-1]))
    with folder_lock(out):
        assert "unrecorded" not in {problem.kind for problem in verify(out)}
    assert "unrecorded" in {problem.kind for problem in verify(out)}


def test_a_job_image_that_cannot_be_read_and_has_no_row_is_not_called_foreign(out):
    text = (out / "manifest.csv").read_text()
    (out / "manifest.csv").write_text("".join(text.splitlines(keepends=True)[:-1]))
    (out / "user_02" / "generated_002.png").write_bytes(b"\x89PNG half")
    what = "no row in the manifest, and not a readable PNG"
    assert Problem("changed", "user_02/generated_002.png", what) in verify(out)


def test_without_a_record_the_manifest_alone_is_compared(out):
    (out / "run.json").unlink()
    gone = Problem("missing", "run.json", "the record is gone, and with it what was asked for")
    assert verify(out, deep=True) == [gone]
    (out / "user_01" / "generated_000.png").unlink()
    assert verify(out) == [gone, Problem("missing", "user_01/generated_000.png", "the file is gone")]


@pytest.mark.parametrize("command", ["status", "merge"])
def test_a_dataset_that_lost_its_record_is_told_what_makes_it_again(out, capsys, command):
    (out / "run.json").unlink()
    assert main([command, str(out)]) == 2
    assert capsys.readouterr().err == (
        f"userdiff {command}: error: {out} holds no dataset: no run.json; the job's command makes it again\n"
    )


def test_a_killed_job_of_a_full_disk_may_have_died_of_it(out, monkeypatch):
    interrupt(out, state="running")
    assert (read_status(out).state, read_status(out).detail) == ("killed", "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 512, 512))
    assert read_status(out).detail == "or out of room, 512 bytes are free"


def test_a_file_where_a_users_folder_goes_is_foreign(out):
    shutil.rmtree(out / "user_02")
    (out / "user_02").write_text("")
    assert Problem("foreign", "user_02", "a file where a user's folder goes") in verify(out)


@pytest.mark.parametrize("flag", ["--columns", "--scale"])
def test_a_picture_of_nothing_is_refused(out, tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        main(["preview", str(out), "--picture", str(tmp_path / "picture.png"), flag, "0"])
    assert f"{flag}: 0 is out of range, needed: 1 or more" in capsys.readouterr().err


def test_a_disk_that_refuses_is_said_in_words(out, capsys, monkeypatch):
    def refuse(source, destination):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))

    monkeypatch.setattr(os, "replace", refuse)
    assert main(["preview", str(out)]) == 2
    assert capsys.readouterr().err == f"userdiff preview: error: Read-only file system ({out / 'preview.html'})\n"


# Merging


def test_merge_does_what_the_next_run_would_without_making_the_rest(flags, out, finished, capsys):
    interrupt(out)
    with (out / "manifest.part-00000.csv").open("a") as part:
        part.write("user_02/generated_0")  # torn
    assert main(["merge", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'manifest.csv'}: 4 images\n"
    assert not list(out.glob("manifest.part-*"))
    assert list(read_lines(out / "manifest.csv")) == list(read_lines(finished / "manifest.csv"))[:4]
    assert "changed" not in {problem.kind for problem in verify(out)}  # the record knows the new manifest
    assert run_job(*flags, "--user_ids", 1, 2, "--output_dir", out) == 0
    assert tree(out) == tree(finished)


def test_merging_a_finished_dataset_changes_nothing(out, finished):
    merge(out)
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == {
        path.name: path.read_bytes() for path in finished.glob("*.*")
    }


def test_merge_waits_for_no_running_job(out, capsys):
    with folder_lock(out):
        assert main(["merge", str(out)]) == 2
    assert "is in use by another job (process " in capsys.readouterr().err


# The command line


@pytest.mark.parametrize("command", ["status", "verify", "merge", "preview"])
def test_a_folder_without_a_dataset_is_one_line(command, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert main([command, str(folder)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"userdiff {command}: error: {folder} holds no ")
        assert said.err.count("\n") == 1
        assert said.out == ""


@pytest.mark.parametrize("command", ["status", "verify"])
def test_who_stops_reading_is_told_nothing(command, out):
    job = subprocess.Popen(
        [sys.executable, "-m", "userdiff", command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    job.stdout.close()
    assert job.stderr.read() == ""
    assert job.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("command", ["status", "verify", "merge"])
def test_a_damaged_record_is_one_line(command, out, capsys):
    (out / "run.json").write_text("{")
    assert main([command, str(out)]) == 2
    assert "is damaged; restore it" in capsys.readouterr().err


def test_none_of_them_loads_torch(out):
    script = "import sys; from userdiff.cli import main; print(main(sys.argv[1:])); print('torch' in sys.modules)"
    for command in ("status", "verify", "merge", "preview"):
        run = [sys.executable, "-c", script, command, str(out)]
        process = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        assert process.stdout.splitlines()[-2:] == ["0", "False"]
