"""`userdiff status`, `verify`, `preview`, `merge`: what a folder holds against what its records say.

What they print is frozen in `golden/transcripts`.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.definitions import (
    RUN,
    change_entry,
    entry_of,
    files_in,
    image_of,
    images_of,
    interrupt,
    manifest_of,
    name_of,
    png_of,
    record_of,
    shard_of,
    write_dataset,
)
from tests.jobs import ROOT
from userdiff.cli import main
from userdiff.dataset.locks import folder_lock
from userdiff.tools.merge import merge
from userdiff.tools.status import read_status
from userdiff.tools.verify import Problem, verify

IMAGES = images_of((user_id, image_index) for user_id in (1, 2) for image_index in range(3))


@pytest.fixture
def out(tmp_path):
    """A finished dataset: three images of users 1 and 2."""
    return write_dataset(tmp_path / "out", IMAGES, record_of(entry_of()))


# Status


def test_a_finished_dataset_is_complete_and_a_lost_image_makes_it_incomplete(out):
    status = read_status(out)
    assert (status.state, status.detail, status.beyond, status.unrecorded) == ("complete", "", 0, 0)
    assert (status.wanted, status.done, status.failed) == ({1: 3, 2: 3}, {1: 3, 2: 3}, {})
    change_entry(out, failed=[[1, 0], [2, 1]])
    (out / name_of(1, 2)).unlink()
    (out / name_of(2, 1)).write_bytes(b"cut")
    status = read_status(out)
    assert (status.state, status.done) == ("incomplete", {1: 2, 2: 2})
    assert status.failed == {2: 1}  # the other one has been made meanwhile


def test_what_lies_beyond_the_last_request_is_counted(out):
    change_entry(out, user_ids="2", num_images_per_user=2)
    status = read_status(out)
    assert (status.state, status.wanted, status.done, status.beyond) == ("complete", {2: 2}, {2: 2}, 4)


SHARE = [item for item in IMAGES if shard_of(*item, 4, 2) == 2]


@pytest.fixture
def half(tmp_path):
    """A finished shard, 2/2, of three images of users 1 and 2."""
    return write_dataset(tmp_path / "half", images_of(SHARE), record_of(entry_of(shard="2/2")))


def test_a_shard_is_complete_with_its_share(half, capsys):
    status = read_status(half)
    assert (status.state, status.shard, status.beyond) == ("complete", "2/2", 0)
    assert status.wanted == status.done == {1: 2, 2: 1}
    write_dataset(half, {**images_of(SHARE), (1, 1): IMAGES[1, 1]}, record_of(entry_of(shard="2/2")))
    (half / name_of(1, 2)).unlink()
    status = read_status(half)
    assert (status.state, status.wanted, status.done, status.beyond) == ("incomplete", {1: 2, 2: 1}, {1: 1, 2: 1}, 1)
    assert main(["status", str(half)]) == 0
    assert capsys.readouterr().out.startswith(f"{half}: incomplete, shard 2/2\n")


def test_verify_misses_what_is_of_the_shard_alone(half):
    assert verify(half, deep=True) == []
    interrupt(half, rows_left=1)
    (half / name_of(1, 1)).write_bytes(IMAGES[1, 1])  # of the other shard: it makes up for nothing
    assert [problem for problem in verify(half) if problem.kind == "missing"] == [
        Problem("missing", "user_01", "1 of 2 images of shard 2/2 are not there"),
        Problem("missing", "user_02", "1 of 1 images of shard 2/2 are not there"),
    ]
    (half / name_of(2, SHARE[-1][1])).write_bytes(IMAGES[SHARE[-1]])
    assert [problem.name for problem in verify(half) if problem.kind == "missing"] == ["user_01"]


@pytest.mark.parametrize(
    ("state", "cause", "said"),
    [
        ("running", None, "killed"),  # nobody holds the folder, whatever the record says
        ("stopped by signal 15", None, "stopped by SIGTERM"),
        ("stopped by signal 999", None, "stopped by signal 999"),  # edited
        ("stopped by signal 15", "no sign of life from process 1 on vm", "stopped by SIGTERM"),
        ("failed", "--output_dir: No space left on device", "failed"),
    ],
)
def test_how_a_run_ended_is_told_and_its_images_are_counted_by_its_parts(out, state, cause, said):
    (out / ".userdiff.lock").write_text("process 17 on another")  # a killed job's file, which nobody holds
    interrupt(out, rows_left=4, state=state, cause=cause)
    status = read_status(out)
    assert (status.state, status.detail, status.done) == (said, cause or "", {1: 3, 2: 1})
    with folder_lock(out):
        status = read_status(out)
    assert (status.state, status.done) == ("running", {1: 3, 2: 1})
    assert "process " in status.detail


def test_a_killed_job_of_a_full_disk_may_have_died_of_it(out, monkeypatch):
    interrupt(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 512, 512))
    assert read_status(out).detail == "or out of room, 512 bytes are free"


def test_a_lost_manifest_is_no_loss_of_images(out, capsys):
    (out / "manifest.csv").unlink()
    (out / name_of(2, 1)).unlink()
    status = read_status(out)
    assert (status.done, status.unrecorded) == ({1: 0, 2: 0}, 5)
    with folder_lock(out):  # their rows may be on the way
        assert main(["status", str(out)]) == 0
    assert "without a row" not in capsys.readouterr().out
    assert main(["merge", str(out)]) == 0
    assert read_status(out).done == {1: 3, 2: 2}


# Verification

BYTE_FLIPPED = IMAGES[1, 1][:-18] + bytes([IMAGES[1, 1][-18] ^ 1]) + IMAGES[1, 1][-17:]
OTHER_PIXELS = image_of(1, 1, colour="blue")
ROW_LESS = manifest_of({item: data for item, data in IMAGES.items() if item != (2, 2)}).encode()
EDITED = ("changed", "manifest.csv", "the manifest is not as it was published")
NO_RECORD = ("missing", "run.json", "the record is gone, and with it what was asked for")

FOLDERS = {  # what is done to a finished dataset, None is removal; and what verify finds
    "nothing": ({}, []),
    "a file missing and one changed": (
        {name_of(1, 0): None, name_of(1, 1): b"short"},
        [
            ("changed", name_of(1, 1), f"5 bytes, its row says {len(IMAGES[1, 1])}"),
            ("missing", name_of(1, 0), "the file is gone"),
        ],
    ),
    "what loaders take for a class or an image": (
        {
            "cover.png": b"",
            "extra/notes.txt": b"",
            "notes.txt": b"no harm",
            "user_02/.generated_001.png.tmp-0123abcd": b"",  # the next run's business
            "user_02/thumbs.txt": b"",
            **dict.fromkeys(("user_02/Thumbs.db", ".DS_Store", "user_01/.DS_Store", "@eaDir/x.png"), b""),  # a system's
            "user_03": b"",
        },
        [
            ("foreign", "cover.png", "an image beside the user folders hides all labels from loaders"),
            ("foreign", "extra", "loaders take every folder for a class"),
            ("foreign", "user_02/thumbs.txt", "not an image of a job"),
            ("foreign", "user_03", "a file where a user's folder goes"),
        ],
    ),
    "images without a row": (
        {
            name_of(2, 4): image_of(2, 4),
            name_of(2, 5): IMAGES[1, 0],
            name_of(2, 6): b"\x89PNG half",
            name_of(2, 7): png_of({}),
            name_of(2, 8): image_of(2, 8, run=RUN),
        },
        [
            ("changed", name_of(2, 5), "it says to be another image"),
            ("changed", name_of(2, 6), "no row in the manifest, and not a readable PNG"),
            ("foreign", name_of(2, 7), "not made by a job"),
            ("foreign", name_of(2, 8), "made with another model or other settings"),
            ("unrecorded", "user_02", "1 image without a row"),
        ],
    ),
    "a row less": ({"manifest.csv": ROW_LESS}, [EDITED, ("unrecorded", "user_02", "1 image without a row")]),
    "a row less, and a copy of another image": (
        {"manifest.csv": ROW_LESS, name_of(2, 2): IMAGES[1, 1]},
        [
            EDITED,
            ("changed", name_of(2, 2), "it says to be another image"),
            ("missing", "user_02", "1 of 3 images are not there"),
        ],
    ),
    "no manifest": (
        {"manifest.csv": None, name_of(2, 1): None},
        [
            ("missing", "manifest.csv", "the manifest is gone"),
            ("missing", "user_02", "1 of 3 images are not there"),
            ("unrecorded", "user_01", "3 images without a row"),
            ("unrecorded", "user_02", "2 images without a row"),
        ],
    ),
    "no record": ({"run.json": None}, [NO_RECORD]),
    "no record and a file less": (
        {"run.json": None, name_of(1, 0): None},
        [NO_RECORD, ("missing", name_of(1, 0), "the file is gone")],
    ),
}


def change(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)


@pytest.mark.parametrize(("files", "found"), FOLDERS.values(), ids=FOLDERS)
def test_verify_finds_what_is_not_as_the_records_say(out, files, found):
    change(out, files)
    assert verify(out) == verify(out, deep=True) == [Problem(*problem) for problem in found]


@pytest.mark.parametrize(
    ("data", "is_recorded", "what"),
    [
        (BYTE_FLIPPED, False, "not an intact PNG"),
        (OTHER_PIXELS, False, "its content is not what its row says"),
        (IMAGES[2, 2], True, "it says to be another image"),  # with a row to match: only its text gives it away
    ],
)
def test_deep_reads_what_size_cannot_tell(out, data, is_recorded, what):
    if is_recorded:
        (out / name_of(1, 1)).unlink()
        write_dataset(out, {**IMAGES, (1, 1): data}, record_of(entry_of()))
    (out / name_of(1, 1)).write_bytes(data)
    assert verify(out) == []
    assert verify(out, deep=True) == [Problem("changed", name_of(1, 1), what)]


def test_what_may_be_on_its_way_is_no_problem_while_a_job_runs(out):
    interrupt(out, rows_left=4)
    (out / name_of(2, 1)).write_bytes(IMAGES[2, 1])
    missing = Problem("missing", "user_02", "1 of 3 images are not there")
    unmerged = Problem("unmerged", "manifest.part-00000.csv", "rows of an interrupted run")
    assert verify(out) == [missing, unmerged, Problem("unrecorded", "user_02", "1 image without a row")]
    with folder_lock(out):
        assert verify(out) == [missing]


def test_a_long_list_is_cut_and_a_job_at_work_is_named(out, capsys):
    for number in range(25):
        (out / "user_01" / f"{number}.txt").write_text("x")
    with folder_lock(out):
        assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[20] == "foreign     and 5 more"
    assert lines[-1].startswith("A job is at work here (process ")


# Previews


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "The last run was killed; the job's command goes on from there"),
        (
            {"state": "stopped by signal 15"},
            "The last run was stopped by SIGTERM; the job's command goes on from there",
        ),
        (
            {"state": "failed", "cause": "no disk"},
            "The last run failed (no disk); the job's command goes on from there",
        ),
    ],
)
def test_after_a_mere_interruption_verify_says_that_it_is_one(out, capsys, entry, said):
    interrupt(out, rows_left=2, **entry)
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"{out}: 3 problems: 2 missing, 1 unmerged (sizes compared, contents not read)"
    assert lines[4].startswith(said)


def test_the_page_of_a_stopped_job_shows_what_is_there(out):
    interrupt(out, rows_left=4)
    assert main(["preview", str(out)]) == 0
    assert (out / "preview.html").read_text().count("<img ") == 4


def test_in_a_picture_what_cannot_be_read_is_crossed_out(tmp_path, capsys):
    out = write_dataset(tmp_path / "out", {item: png_of({}, (16, 16)) for item in IMAGES})
    change(out, {name_of(1, 1): BYTE_FLIPPED, name_of(2, 2): None})
    picture = ["preview", str(out), "--picture", str(tmp_path / "picture.png")]
    assert main([*picture, "--scale", "1"]) == 0
    assert capsys.readouterr().err == ""
    with Image.open(tmp_path / "picture.png") as image:
        tiles = np.asarray(image.convert("RGB"))
    for user, column in np.ndindex(2, 3):
        tile = tiles[4 + 20 * user :, 20 * column - 60 :][:16, :16]  # to their left stands whose they are
        is_crossed_out = (tile[np.eye(16, dtype=bool)] == 128).all() and (tile[1, 2:8] == 211).all()
        assert is_crossed_out == ((user, column) in {(0, 1), (1, 2)})
    assert (tiles[:20, :-60] < 128).any()
    assert not np.array_equal(tiles[4:20, :-60], tiles[24:40, :-60])
    assert main([*picture, "--scale", "2000"]) == 2
    assert "--picture: 96" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*picture, "--scale", "0"])


def test_a_disk_that_refuses_is_said_in_words(out, capsys, monkeypatch):
    def refuse(source, destination):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))

    monkeypatch.setattr(os, "replace", refuse)
    assert main(["preview", str(out)]) == 2
    assert capsys.readouterr().err == f"userdiff preview: error: Read-only file system ({out / 'preview.html'})\n"


# Merging


def test_merge_records_what_an_interrupted_run_has_made(out, capsys):
    interrupt(out, rows_left=4)
    with (out / "manifest.part-00000.csv").open("a") as part:
        part.write("user_02/generated_0")  # torn
    assert main(["merge", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'manifest.csv'}: 4 images\n"
    assert not list(out.glob("manifest.part-*"))
    assert (out / "manifest.csv").read_text() == manifest_of(dict(list(IMAGES.items())[:4]))
    assert {problem.kind for problem in verify(out)} == {"missing"}  # the record knows the new manifest


def test_merging_a_finished_dataset_changes_nothing_and_waits_for_no_running_job(out, capsys):
    merge(out)
    before = files_in(out)
    merge(out)
    assert files_in(out) == before
    assert before["manifest.csv"].decode() == manifest_of(IMAGES)
    with folder_lock(out):
        assert main(["merge", str(out)]) == 2
    assert "is in use by another job (process " in capsys.readouterr().err


# The command line


def test_who_stops_reading_is_told_nothing(out):
    command = [sys.executable, "-m", "userdiff", "verify", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_no_command_loads_torch(out, tmp_path):
    script = (
        "import sys; from userdiff.cli import main; print([main(command.split()) for command in sys.argv[1:]]); "
        "print('torch' in sys.modules)"
    )
    commands = [f"{name} {out}" for name in ("status", "verify", "merge", "preview", "inspect")]
    commands.append(f"merge {out} --into {tmp_path / 'joined'}")
    run = [sys.executable, "-c", script, *commands]
    process = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-2:] == ["[0, 0, 0, 0, 0, 0]", "False"]
