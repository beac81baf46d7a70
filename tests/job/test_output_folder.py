"""What a job does with a folder that something is in already, and with a disk that refuses."""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.checkpoints import model_flags
from tests.dataset.test_png import crafted_png
from tests.definitions import chunks_of, files_in, png_of
from tests.jobs import finish, images_in, play_processes, run_job, start, tree
from userdiff import cli
from userdiff.config import parse_args
from userdiff.dataset import locks, scan
from userdiff.diffusion import generate
from userdiff.job import launcher, output_folder, run, store, worker
from userdiff.job.output_folder import disk_failure
from userdiff.shutdown import Failed, Stopped


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 1, "--batch_size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    """Five users, three images each."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_job(*flags, "--num_images_per_user", 3, "--output_dir", folder) == 0
    return folder


@pytest.fixture
def job(flags, tmp_path):
    return [*flags, "--num_images_per_user", 3, "--output_dir", tmp_path / "out"]


@pytest.fixture
def out(reference, tmp_path):
    """A finished dataset."""
    return shutil.copytree(reference, tmp_path / "out")


AUDITED = []
"""What is asked at every audit event of this process: a hook can never be taken back."""
sys.addaudithook(lambda event, args: [ask(event, args) for ask in AUDITED])


def encoded(image_format):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "navy").save(buffer, image_format)
    return buffer.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")


def put(out, name, content=PNG):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(content)
    return content


def lose_rows(out, part_of_name):
    labels = out / "manifest.csv"
    labels.write_text("".join(row for row in labels.open() if part_of_name not in row))


# What is refused: nothing changes


def only(name, content=PNG):
    """A folder that holds nothing but this file."""

    def prepare(out):
        shutil.rmtree(out)
        put(out, name, content)

    return prepare


def also(name, content=PNG):
    return lambda out: put(out, name, content)


def linked_to_another_dataset(out):
    shutil.rmtree(out / "user_05")
    lose_rows(out, "user_05")
    for image_index in range(4):
        put(out.parent, f"other/user_05/generated_{image_index:03d}.png", png_of(chunks_of(5, image_index)))
    (out / "user_05").symlink_to(out.parent / "other" / "user_05")


def cut_record(out):
    put(out, "run.json", (out / "run.json").read_bytes()[:-3])


def without_record(out):
    (out / "run.json").unlink()


MADE_BY_NOBODY = "which no job is known to have made"
IN_THE_WAY = "user_02/generated_003.png was not made by this job or one before it, but an image of"


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]], ids=["", "dry run"])
@pytest.mark.parametrize(
    ("prepare", "more", "said"),
    [
        (also("notes.txt"), ["--seed", 43, "--eta", 0.5], "made otherwise (eta was 0.0, is 0.5; seed was 42, is 43); use"),
        (also("notes.txt"), ["--user_ids", 9], "--user_ids: 9 is out of range"),
        (without_record, ["--seed", 43], "has no run.json but holds user_01/generated_000.png, made with another model or"),
        (also("run.json", b""), [], "or start again with --overwrite"),
        (cut_record, [], "or start again with --overwrite"),
        (also("run.json", b'{"run": 1, "identity": {}, "numerics": {}}'), [], "or start again with --overwrite"),
        *(
            (prepare, more, f"holds {name}, {MADE_BY_NOBODY}")
            for more in ([], ["--overwrite"])
            for name, prepare in {
                "manifest.csv": only("manifest.csv", b"name,age\nAda,36\n"),
                "run.json": also("run.json", b'{"tool": "my tracker", "loss": [1, 2, 3]}'),
                "preview.html": only("preview.html", b"<p>my own page</p>"),
                "manifest.part-00000.csv": also("manifest.part-00000.csv", b"name,age\nAda,36\n"),
            }.items()
        ),
        (only("user_01/generated_000.png"), [], f"no run.json but holds user_01/generated_000.png, {MADE_BY_NOBODY}"),
        (only("user_01/generated_000.png"), ["--overwrite"], f"holds user_01/generated_000.png, {MADE_BY_NOBODY}"),
        (only("user_01/generated_000.png", b"somebody's"), [], f"holds user_01/generated_000.png, {MADE_BY_NOBODY}"),
        (only("user_07/photo.jpg", JPEG), [], f"holds user_07/photo.jpg, {MADE_BY_NOBODY}"),
        (only("user_12/generated_9.png"), ["--overwrite"], f"holds user_12/generated_9.png, {MADE_BY_NOBODY}"),
    ],
)  # fmt: skip
def test_what_is_not_this_jobs_is_refused_and_left_alone(job, out, tmp_path, capsys, prepare, more, said, dry_run):
    prepare(out)
    before = files_in(tmp_path)
    assert run_job(*job, *more, *dry_run) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("prepare", "more", "said"),
    [
        (also("user_02/generated_003.png"), [], f"--output_dir: {{out}}/{IN_THE_WAY}"),
        (also("user_02/generated_003.png", b"My notes\n"), [], IN_THE_WAY),
        (also("user_02/generated_003.png", JPEG), [], IN_THE_WAY),
        (also("user_02/generated_003.png"), ["--overwrite"], f"--overwrite: {{out}}/{IN_THE_WAY}"),
        (linked_to_another_dataset, [], "user_05/generated_000.png was not made by"),
        (linked_to_another_dataset, ["--overwrite"], "user_05/generated_000.png was not made by"),
    ],
)
def test_no_foreign_image_gives_its_place_to_one_of_the_job(job, out, tmp_path, capsys, prepare, more, said):
    prepare(out)
    before = files_in(tmp_path)
    assert run_job(*job, "--num_images_per_user", 4, *more) == 2
    assert said.format(out=out) in capsys.readouterr().err
    assert files_in(tmp_path) == before
    if not (out / "user_05").is_symlink():
        assert run_job(*job) == 0  # nobody asks for that one


@pytest.mark.parametrize("more", [[], ["--dry_run"], ["--overwrite"]], ids=str)
def test_a_user_folder_that_is_a_file_is_one_line(job, tmp_path, capsys, more):
    put(tmp_path, "out/user_02", b"")
    before = files_in(tmp_path)
    assert run_job(*job, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --output_dir: ")
    assert "user_02" in line
    assert files_in(tmp_path) == before


def test_a_worker_that_outlived_its_job_keeps_the_next_one_out(job, out, reference, capsys, monkeypatch):
    monkeypatch.setattr(locks, "WRITERS_SECONDS", 0.2)
    with locks.writing(out):
        assert run_job(*job, "--seed", 7, "--overwrite") == 2
        assert "a process of an earlier job still has" in capsys.readouterr().err
    assert tree(out) == tree(reference)
    assert run_job(*job) == 0
    assert not list(out.glob(".userdiff*"))


# What is made again, and what is left


def damaged(damage):
    """An image without a row."""

    def prepare(out):
        path = out / "user_02" / "generated_002.png"
        path.write_bytes(damage(path.read_bytes()))
        lose_rows(out, "user_02/generated_002")

    return prepare


@pytest.mark.parametrize(
    ("prepare", "more"),
    [
        pytest.param(also("user_02/generated_001.png"), [], id="edited"),
        pytest.param(damaged(lambda png: b""), [], id="empty"),
        pytest.param(damaged(lambda png: png[:5]), [], id="cut in its signature"),
        pytest.param(damaged(lambda png: png[:-9]), [], id="cut at its end"),
        pytest.param(damaged(lambda png: bytes(len(png))), [], id="zeros, as after a power cut"),
        pytest.param(damaged(lambda png: b"????" + png[4:]), [], id="mangled in front"),
        pytest.param(only("notes/todo.txt"), [], id="a folder of other things"),
        pytest.param(shutil.rmtree, ["--overwrite"], id="no folder"),
        pytest.param(cut_record, ["--overwrite"], id="damaged record"),
        pytest.param(also("run.json", b'{"run": 1, "identity": {}, "numerics": {}}'), ["--overwrite"], id="odd record"),
    ],
)
def test_what_is_lost_is_made_again_and_the_rest_is_nobodys_business(job, out, reference, prepare, more):
    prepare(out)
    assert run_job(*job, *more) == 0
    assert tree(out) == tree(reference)
    if (out / "notes").exists():
        assert (out / "notes" / "todo.txt").read_bytes() == PNG


def edited(out, name):
    """Give an image other pixels, its text kept, as an image editor does."""
    with Image.open(out / name) as image:
        (out / name).write_bytes(png_of(image.text, (30, 30), "white"))


@pytest.mark.parametrize("command", ["whole", "killed before it is made again"])
@pytest.mark.parametrize("noted_in", ["manifest.csv", "manifest.part-00000.csv"])
def test_an_edited_image_is_made_again_and_never_taken_for_finished(
    job, out, reference, monkeypatch, noted_in, command
):
    (out / "manifest.csv").rename(out / noted_in)
    edited(out, "user_03/generated_001.png")
    if command != "whole":
        monkeypatch.setattr(run, "make_images", lambda *args, **options: raise_error(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_job(*job)
        monkeypatch.undo()
    assert run_job(*job) == 0
    assert tree(out) == tree(reference)


def raise_error(error):
    raise error


def test_an_edited_image_that_is_not_asked_for_is_not_forgotten(job, out, reference, capsys):
    edited(out, "user_03/generated_001.png")
    before = files_in(out)
    for _ in range(2):
        assert run_job(*job, "--user_ids", "1-2") == 0
        said = capsys.readouterr().out
        assert "1 image is beyond this request and missing or damaged: user_03/generated_001.png" in said
        after = files_in(out)
        assert {**after, "run.json": b"", "preview.html": b""} == {**before, "run.json": b"", "preview.html": b""}
    assert run_job(*job) == 0
    assert tree(out) == tree(reference)


@pytest.fixture
def meanwhile(out, monkeypatch):
    """A function that has something done while the next job makes the one image that is missing."""
    (out / "user_05" / "generated_002.png").unlink()
    make_images = run.make_images

    def have_done(what):
        def do_and_make(*args, **options):
            what()
            return make_images(*args, **options)

        monkeypatch.setattr(run, "make_images", do_and_make)

    return have_done


def test_an_image_that_is_edited_while_the_job_runs_is_made_again_by_the_next(job, out, reference, meanwhile):
    meanwhile(lambda: edited(out, "user_03/generated_001.png"))
    assert run_job(*job) == 1
    meanwhile(lambda: None)
    assert run_job(*job) == 0
    assert tree(out) == tree(reference)


def test_a_column_that_is_added_while_the_job_runs_is_kept(job, out, reference, meanwhile, capsys):
    def add():
        put(out, "manifest.csv", "".join(f"{row[:-1]},x\n" for row in (out / "manifest.csv").open()).encode())

    meanwhile(add)
    assert run_job(*job) == 0
    assert f"that is kept as {out / 'manifest.edited-1.csv'}\n" in capsys.readouterr().out
    (out / "manifest.edited-1.csv").unlink()
    assert tree(out) == tree(reference)


OWN_PHOTO = encoded("PNG")


@pytest.mark.parametrize(
    "make",
    [
        lambda out: (out / "user_01" / "generated_000.png").read_bytes(),  # a copy under another name
        lambda out: png_of(Image.open(out / "user_01" / "generated_000.png").text, (30, 30), "white"),
    ],
)
def test_a_whole_image_that_says_to_be_another_is_not_written_over(job, out, capsys, make):
    content = put(out, "user_02/generated_003.png", make(out))
    assert run_job(*job, "--num_images_per_user", 4) == 2
    assert "user_02/generated_003.png was not made by this job" in capsys.readouterr().err
    assert (out / "user_02" / "generated_003.png").read_bytes() == content


def test_starting_again_leaves_a_photo_that_took_an_images_name(job, out, tmp_path, capsys):
    put(out, "user_03/generated_001.png", OWN_PHOTO)
    assert run_job(*job, "--user_ids", 1, "--overwrite") == 0
    assert (out / "user_03" / "generated_001.png").read_bytes() == OWN_PHOTO
    assert not (out / "user_02").exists()
    assert run_job(*job, "--overwrite") == 2
    assert "user_03/generated_001.png was not made by" in capsys.readouterr().err


def test_two_users_of_one_folder_are_refused(job, out, capsys):
    shutil.rmtree(out / "user_02")
    (out / "user_02").symlink_to("user_01")
    before = files_in(out)
    one_place, not_ours = "are one place, needed: a folder for each user", "user_02/generated_000.png was not made by"
    for more, said in (([], one_place), (["--dry_run"], one_place), (["--overwrite"], not_ours)):
        assert run_job(*job, *more) == 2
        assert said in capsys.readouterr().err
    assert files_in(out) == before


def test_temporaries_of_another_dataset_are_left(job, out, tmp_path):
    (out / "user_05").rename(tmp_path / "elsewhere")
    (out / "user_05").symlink_to(tmp_path / "elsewhere")
    put(tmp_path, "elsewhere/.generated_009.png.tmp-01234567", b"half")
    (out / ".run.json.tmp-deadbeef").mkdir()
    assert run_job(*job) == 0
    assert (tmp_path / "elsewhere" / ".generated_009.png.tmp-01234567").exists()


def test_a_manifest_that_somebody_added_to_is_kept(job, out, reference, capsys):
    added = "".join(f"{line},train\n" for line in (out / "manifest.csv").read_text().splitlines())
    for more in ([], ["--overwrite"]):
        put(out, "manifest.csv", added.encode())
        assert run_job(*job, *more) == 0
        copy = out / "manifest.edited-1.csv"
        assert f"that is kept as {copy}\n" in capsys.readouterr().out
        assert copy.read_text() == added
        copy.rename(out.parent / copy.name)
        assert tree(out) == tree(reference)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "content", [encoded("PNG") + b"\n", crafted_png(width=20000, height=20000), PNG[:200], b"text", JPEG]
)
def test_an_image_of_ones_own_under_a_name_without_a_row_is_never_written_over(job, out, capsys, content, more):
    for path, asks in (("user_02/generated_003.png", ["--num_images_per_user", 4]), ("user_02/generated_003.png", [])):
        put(out, path, content)
        before = files_in(out)
        assert run_job(*job, *asks, *more) == (2 if asks else 0)
        said = capsys.readouterr()
        assert path in (said.err if asks else said.out + said.err)
        assert (out / path).read_bytes() == content
        if asks:
            assert files_in(out) == before


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "manifest.csv",
        "preview.html",
        "manifest.part-00000.csv",
        ".userdiff.lock",
        ".userdiff.writers",
        "user_01/generated_001.png",
        "user_01/generated_003.png",
    ],
)
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/mnt/gone"), lambda path: path.symlink_to(path)]
)
def test_what_is_no_file_is_neither_waited_for_nor_replaced(job, out, capsys, name, make):
    (out / name).unlink(missing_ok=True)
    make(out / name)
    before = os.lstat(out / name)
    for more in ([], ["--overwrite"], ["--dry_run"]):
        assert run_job(*job, "--num_images_per_user", 4, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert Path(name).name in error
        assert os.path.samestat(os.lstat(out / name), before)


def test_a_systems_files_bother_nobody(job, out, reference):
    names = (".DS_Store", "user_01/.DS_Store", "user_02/Thumbs.db", "user_02/.nfs000000000a1b2c3d")
    for name in names:
        put(out, name, b"x")
    (out / "run.json").unlink()
    assert run_job(*job) == 0
    for name in names:
        (out / name).unlink()
    assert tree(out) == tree(reference)


def test_what_is_lost_twice_recorded_is_said_once(job, out, capsys):
    shutil.copy(out / "manifest.csv", out / "manifest.part-00000.csv")  # two rows speak of each image
    (out / "user_04" / "generated_002.png").unlink()
    put(out, "user_05/generated_000.png", b"half")
    (out / "user_01" / "generated_001.png").unlink()
    assert run_job(*job, "--user_ids", 1) == 0
    said = capsys.readouterr().out
    assert ": user_04/generated_002.png, user_05/generated_000.png\n" in said
    assert "Note: 1 image is missing or damaged and made again: user_01/generated_001.png\n" in said


def test_a_row_that_no_run_of_this_recipe_wrote_names_no_lost_image(job, out, reference, capsys):
    labels = out / "manifest.csv"
    row = labels.read_text().splitlines()[-1].replace("user_05/generated_002", "user_95/generated_002")
    labels.write_text(labels.read_text() + re.sub(",5,2,", ",95,2,", row) + "\n")  # its seed is user 5's
    assert run_job(*job) == 0
    assert "missing or damaged" not in capsys.readouterr().out
    assert tree(out) == tree(reference)


def test_numerics_before_the_first_image_count_for_nothing(job, tmp_path, capsys, monkeypatch):
    def stop_at_once(*args):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(generate, "start", stop_at_once)
    assert run_job(*job, "--allow_tf32") == 143
    monkeypatch.undo()
    assert run_job(*job) == 0
    assert "when this folder was begun" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["numerics"]["allow_tf32"] is False


@pytest.mark.parametrize("more", [["--num_images_per_user", 4], ["--overwrite", "--seed", 7]])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_dry_run_plans_once_and_changes_nothing(job, out, tmp_path, capsys, more, num_processes):
    def disk():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}

    (out / "user_02" / "generated_001.png").unlink()
    for there in (14, 0):
        before = disk()
        assert play_processes(num_processes, *job, *more, "--dry_run") == [0] * num_processes
        assert disk() == before
        said = capsys.readouterr().out
        found = 0 if "--overwrite" in more else there
        assert f"{found} already there, " in said
        assert said.count("Plan: ") == said.count("Dry run: ") == 1
        assert (f"To be removed: {there} images" in said) == ("--overwrite" in more and there > 0)
        shutil.rmtree(out, ignore_errors=True)


# Locks and signals


def test_locks_are_taken_as_nfs_wants_them(job, reference, tmp_path, monkeypatch):
    """NFSv4 gives a shared lock only to who can read the file, an exclusive one only to who can write it."""
    flock = fcntl.flock

    def flock_of_nfs(file, operation):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        refused = {os.O_WRONLY: fcntl.LOCK_SH, os.O_RDONLY: fcntl.LOCK_EX}.get(mode, 0)
        if operation & refused:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    assert play_processes(2, *job) == [0, 0]
    assert locks.lock_holder(tmp_path / "out") is None
    assert tree(tmp_path / "out") == tree(reference)


@pytest.mark.parametrize(
    ("lost", "more"),
    [(None, []), (None, ["--overwrite"]), ("run.json", []), ("run.json", ["--overwrite"]), ("manifest.csv", ["--overwrite"])],
)  # fmt: skip
def test_a_signal_ends_the_wait_before_a_job(job, out, monkeypatch, capsys, lost, more):
    """The wait for a writer, or while the images of a folder without this file are read."""
    read, is_locked = scan.read_text_chunks, locks._is_locked

    def read_slowly(path):
        signal.raise_signal(signal.SIGINT)
        return read(path)

    def wait(file, kind):
        if file.name.endswith(".writers"):
            signal.raise_signal(signal.SIGINT)
        return is_locked(file, kind)

    with ExitStack() as held:
        if lost is None:
            held.enter_context(locks.writing(out))
            monkeypatch.setattr(locks, "_is_locked", wait)
        else:
            (out / lost).unlink()
            for module in (output_folder, scan):
                monkeypatch.setattr(module, "read_text_chunks", read_slowly)
        before = {name: data for name, data in files_in(out).items() if not name.startswith(".")}
        assert run_job(*job, *more) == 130
        monkeypatch.setattr(locks, "_is_locked", is_locked)
    assert "stopped by SIGINT" in capsys.readouterr().err
    assert {name: data for name, data in files_in(out).items() if not name.startswith(".")} == before


def test_nobody_listening_does_not_end_a_job(job, out):
    command = " ".join(map(str, [sys.executable, "batch_generate.py", *job, "--num_images_per_user", 4]))
    command = f"set -o pipefail; {command} |& head -n 1"
    status, stdout, stderr = finish(start(["bash", "-c", command], OMP_NUM_THREADS="1"))
    assert stdout.count("\n") == 1
    assert status == 0, stderr
    assert len(images_in(out)) == 20


# --overwrite


def test_overwrite_removes_what_a_job_wrote_and_nothing_else(job, out, tmp_path):
    assert run_job(*job, "--num_images_per_user", 5) == 0  # more than what will be asked for
    foreign = {
        name: put(out, name, content)
        for name, content in [
            ("user_01/mine.png", PNG),
            ("user_03/generated_999.png", b"\xff\xd8\xff a photo"),
            ("user_04/generated_999.png", PNG),
            ("user_77/generated_000.png", PNG),
            ("album/one.png", PNG),
            ("labels.csv", b"mine"),
        ]
    }
    lines = (out / "manifest.csv").read_text().splitlines(keepends=True)
    lose_rows(out, "user_03/generated_004")  # an image of the old model
    put(out, "user_03/generated_003.png", b"")  # recorded, and no longer a PNG
    (out / "manifest.part-00002.csv").write_text(lines[0] + lines[1])
    put(out, "user_02/.generated_003.png.tmp-0123abcd", b"half")
    (out / "user_05").rename(tmp_path / "larger_disk")
    (out / "user_05").symlink_to(tmp_path / "larger_disk")

    job += ["--user_ids", 1, 2, "--seed", 7]
    assert run_job(*job, "--overwrite") == 0
    for name, content in foreign.items():
        assert (out / name).read_bytes() == content
        (out / name).unlink()
    assert (out / "user_05").is_symlink()
    assert not list((tmp_path / "larger_disk").iterdir())
    (out / "user_05").unlink()
    for folder in ("user_03", "user_77", "user_04", "album"):
        (out / folder).rmdir()  # empty but for the foreign
    assert {path.name for path in out.iterdir()} == {"user_01", "user_02", "manifest.csv", "run.json", "preview.html"}
    assert run_job(*job, "--output_dir", tmp_path / "new") == 0
    assert tree(out) == tree(tmp_path / "new")
    assert len(json.loads((out / "run.json").read_text())["history"]) == 1


@pytest.mark.parametrize("begins", [0, 1, 2])
def test_a_launch_starts_again_once_however_often_its_group_is_restarted(job, out, monkeypatch, capsys, begins):
    """The first group may die before it has begun: what it was to replace is still there, and is replaced then."""
    monkeypatch.setattr(store.Coordinator, "launch_id", lambda coordinator: "this launch")
    remove = output_folder._remove
    for attempt in range(3):
        monkeypatch.setattr(launcher, "restart_count", lambda attempt=attempt: attempt)
        monkeypatch.setattr(output_folder, "_remove", remove if attempt >= begins else dying)
        status = run_job(*job, "--overwrite")
        said = capsys.readouterr().out
        assert status == (0 if attempt >= begins else 1)
        assert ("Removed: 15 images" in said) == (attempt == begins)
        assert ("15 already there, 0 to make" in said) == (attempt > begins)
    monkeypatch.setattr(store.Coordinator, "launch_id", lambda coordinator: "the next launch")
    assert run_job(*job, "--overwrite") == 0
    assert "Removed: 15 images" in capsys.readouterr().out


def dying(*_):
    raise Failed("the process dies before it removes anything")


def test_a_removal_that_broke_off_is_gone_on_with_by_the_restarted_group(job, out, monkeypatch, capsys):
    """What is left is of the old dataset, and maybe of another model."""
    monkeypatch.setattr(store.Coordinator, "launch_id", lambda coordinator: "this launch")
    unlink, removed = Path.unlink, []

    def unlink_and_die(path, missing_ok=False):
        if path.suffix == ".png":
            removed.append(path)
        if len(removed) == 5:
            raise Failed("the process dies")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_and_die)
        assert run_job(*job, "--seed", 7, "--overwrite") == 1
    assert len(images_in(out)) == 11
    assert run_job(*job, "--seed", 7, "--overwrite") == 0
    assert "0 already there, 15 to make" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("process_index", "restarts", "again"),
    [(0, 0, "the same command goes"), (0, 1, "the same command, without"), (1, 0, "the same command, without")],
)
def test_whoever_cannot_tell_whether_all_was_removed_advises_what_removes_nothing(
    job, monkeypatch, capsys, process_index, restarts, again
):
    """The main process of a launch with --overwrite may have died, and a machine's first process speaks."""
    monkeypatch.setattr(cli.launcher, "process_index", lambda: process_index)
    monkeypatch.setattr(cli.launcher, "restart_count", lambda: restarts)
    config = parse_args([str(flag) for flag in [*job, "--overwrite"]])
    cli._print_end("batch_generate.py", config, Failed("lost contact with the launcher", is_alone=True))
    assert f"; what is done is kept in {config.output_dir}, {again}" in capsys.readouterr().err


# Flat images


def test_images_of_one_colour_are_counted_and_named(job, capsys, monkeypatch):
    images = generate.Batch.images
    flat = {(1, 2), (2, 0)}

    def images_with_flat_ones(batch):
        return ((item, pixels * 0 + 37 if item in flat else pixels) for item, pixels in images(batch))

    monkeypatch.setattr(generate.Batch, "images", images_with_flat_ones)
    assert play_processes(2, *job) == [0, 0]
    said = capsys.readouterr().out
    assert "Warning: 2 images are one single colour" in said
    assert "user_01/generated_002.png, user_02/generated_000.png" in said
    monkeypatch.setitem(store.MAX_NOTED, "flat", 1)  # of very many, some are named
    assert run_job(*job, "--overwrite") == 0
    assert "Warning: 2 images are one single colour, which a model seldom means: user_0" in capsys.readouterr().out


# Disks


@pytest.mark.parametrize(
    ("name", "number", "status", "said"),
    [
        (".userdiff.lock", errno.ENOSPC, 1, "No space left on device ({}), make room; "),
        (".userdiff.writers", errno.ENOSPC, 1, "No space left on device ({}), make room; "),
        ("user_03", errno.ENOSPC, 1, "No space left on device ({}), make room; "),
        (".userdiff.lock", errno.EACCES, 2, "{} cannot be used (Permission denied), needed: "),
    ],
)
def test_a_disk_that_refuses_from_the_start_is_one_line(job, tmp_path, capsys, name, number, status, said):
    def refuse(event, args):
        if event in {"open", "os.mkdir"} and os.path.basename(str(args[0])) == name:  # noqa: PTH119
            AUDITED.clear()
            raise OSError(number, os.strerror(number), str(args[0]))

    AUDITED.append(refuse)
    assert run_job(*job) == status
    assert AUDITED == []
    assert f"error: --output_dir: {said.format(tmp_path / 'out' / name)}" in capsys.readouterr().err
    assert run_job(*job) == 0


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EDQUOT, "Disk quota exceeded (out/user_01/generated_000.png), make room, or have the quota raised"),
        (errno.EROFS, "Read-only file system (out/user_01/generated_000.png), have it mounted for writing"),
        (errno.EIO, "Input/output error (out/user_01/generated_000.png), see to the disk"),
    ],
)
def test_what_a_disk_refuses_is_said_with_a_remedy(number, said):
    error = OSError(number, os.strerror(number), "out/user_01/generated_000.png")
    assert str(disk_failure(error)) == f"--output_dir: {said}"
    assert disk_failure(error).exit_status == 1


def disk(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_what_a_job_will_take_is_said_before_it_starts(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk(8192))
    assert run_job(*job, "--dry_run") == 0
    warning = f"Warning: 15 images take at most 11.5kB, and {tmp_path / 'out'} has 8.19kB free"
    assert warning in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", disk(10**9))
    assert run_job(*job) == 0
    said = capsys.readouterr()
    assert "Disk: at most 11.5kB to write, 1.00GB free" in said.out  # 15 images of 16 x 16 x 3 bytes
    assert "images take" not in said.err
    assert run_job(*job, "--num_images_per_user", 4) == 0
    assert re.search(r"Disk: about \d\.\d\dkB to write, 1\.00GB free", capsys.readouterr().out)


def test_the_first_images_tell_what_the_rest_will_take(flags, tmp_path, capsys, monkeypatch):
    """The worst case fits; then the disk fills up meanwhile."""
    monkeypatch.setattr(shutil, "disk_usage", disk(10**9))
    encode = worker.encode_png

    def encode_and_fill(pixels, text, *level):
        monkeypatch.setattr(shutil, "disk_usage", disk(20_000))
        return encode(pixels, text, *level)

    monkeypatch.setattr(worker, "encode_png", encode_and_fill)
    assert run_job(*flags, "--num_images_per_user", 200, "--user_ids", 1, 2, "--output_dir", tmp_path) == 0
    assert capsys.readouterr().err.count("images take about") == 1


@contextmanager
def mounted(folder, options):
    """A real small disk."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_fills_up_loses_nothing(flags, tmp_path):
    """Each image is a block and each folder's inode counts: 400 kB hold some 80 of the 200 images."""
    job = [*flags, "--num_images_per_user", 40]
    assert run_job(*job, "--output_dir", tmp_path / "elsewhere") == 0
    with mounted(tmp_path / "disk", "size=400k") as folder:
        out = folder / "out"
        with pytest.raises(Exception, match="No space left on device"):
            play_processes(3, *job, "--output_dir", out)
        made = {path: path.read_bytes() for path in images_in(out)}
        assert 20 < len(made) < 200
        for path, content in made.items():
            assert content == (tmp_path / "elsewhere" / path.relative_to(out)).read_bytes()
        assert not list(out.glob("user_*/.*"))
        assert run_job(*job, "--output_dir", out) == 1  # still full: nothing changes
        assert made.items() <= {path: path.read_bytes() for path in images_in(out)}.items()
        subprocess.run(["mount", "-o", "remount,size=40m", str(folder)], check=True)
        assert run_job(*job, "--output_dir", out) == 0
        assert tree(out) == tree(tmp_path / "elsewhere")


@pytest.mark.parametrize(("dry_run", "said"), [([], "Read-only file system"), (["--dry_run"], "cannot be written to")])
def test_a_read_only_disk_is_one_line(job, tmp_path, capsys, dry_run, said):
    with mounted(tmp_path / "disk", "size=4m,ro") as folder:
        assert run_job(*job, "--output_dir", folder / "out", *dry_run) == 2
    error = capsys.readouterr().err
    assert error.startswith("batch_generate.py: error: --output_dir: ")
    assert said in error
    assert error.count("\n") == 1
