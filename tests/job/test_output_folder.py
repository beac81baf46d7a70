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

import pytest
from PIL import Image

from tests.checkpoints import model_flags
from tests.jobs import finish, play_processes, run_job, start, tree
from userdiff.dataset import locks
from userdiff.diffusion import generate
from userdiff.job import output_folder, store, worker
from userdiff.job.output_folder import disk_failure
from userdiff.shutdown import Stopped


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


def picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16), "navy").save(path)
    return path.read_bytes()


# Growing and shrinking


def test_asking_for_fewer_says_what_lies_beyond_and_keeps_it(job, out, reference, capsys):
    assert run_job(*job, "--num_images_per_user", 2, "--user_ids", 2) == 0
    said = capsys.readouterr().out
    assert "Plan: 2 images (1 user x 2), 2 already there" in said
    assert "Beyond this request: 13 images of users 1-5 are there too, and stay" in said
    assert tree(out) == tree(reference)


def test_nothing_lies_beyond_a_request_for_all(job, out, capsys):
    assert run_job(*job) == 0
    assert "Beyond" not in capsys.readouterr().out


def test_files_of_ones_own_and_a_lost_or_edited_manifest_are_spoken_of(job, out, capsys):
    picture(out / "user_03" / "photo.png")
    picture(out / "user_03" / "generated_007.png")
    (out / "manifest.csv").unlink()
    assert run_job(*job) == 0
    said = capsys.readouterr()
    assert (
        "Warning: 2 files beside the images are not of this job, and loaders may read them too: user_03/photo.png, "
        f"user_03/generated_007.png; `userdiff verify {out}` lists all\n"
    ) in said.err
    assert "Note: manifest.csv is gone; its rows are made again from the images\n" in said.out
    with (out / "manifest.csv").open("a") as labels:
        labels.write("mine\n")
    assert run_job(*job) == 0
    assert "Note: manifest.csv is not as it was published; its rows are made again from" in capsys.readouterr().out
    (out / "user_03" / "photo.png").unlink()
    (out / "user_03" / "generated_007.png").unlink()
    assert run_job(*job) == 0
    said = capsys.readouterr()
    assert "Note: " not in said.out
    assert said.err == ""


def test_numerics_before_the_first_image_count_for_nothing(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "start", stop_at_once)
    assert run_job(*job, "--allow_tf32") == 143
    monkeypatch.undo()
    assert run_job(*job) == 0
    assert "when this folder was begun" not in capsys.readouterr().err
    numerics = json.loads((tmp_path / "out" / "run.json").read_text())["numerics"]
    assert numerics["allow_tf32"] is False


def stop_at_once(*args):
    raise Stopped(signal.SIGTERM)


# Another identity, other people's files


def test_a_refusal_names_the_fields_their_values_and_the_ways_on(job, out, reference, capsys):
    assert run_job(*job, "--seed", 43, "--eta", 0.5, "--num_inference_steps", 2) == 2
    assert capsys.readouterr().err == (
        f"batch_generate.py: error: --output_dir: {out} holds images made otherwise (eta was 0.0, is 0.5; "
        "num_inference_steps was 1, is 2; seed was 42, is 43); use another folder, or start again with --overwrite\n"
    )
    assert tree(out) == tree(reference)


@pytest.mark.parametrize("name", ["user_01/generated_000.png", "user_07/photo.jpg", "user_12/generated_9.png"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_user_folders_of_somebody_else_are_not_touched(job, tmp_path, capsys, name, overwrite):
    content = picture(tmp_path / "out" / name) if (tmp_path / "out").mkdir() is None else b""
    assert run_job(*job, *overwrite) == 2
    error = capsys.readouterr().err
    assert f"has no run.json but holds {name}, which no job is known to have made" in error
    assert error.count("\n") == 1
    assert [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").glob("*/*")] == [name]
    assert (tmp_path / "out" / name).read_bytes() == content


def test_other_files_in_the_folder_are_nobodys_business(job, tmp_path, reference):
    (tmp_path / "out" / "notes").mkdir(parents=True)
    (tmp_path / "out" / "notes" / "todo.txt").write_text("mine")
    (tmp_path / "out" / "readme.md").write_text("mine")
    assert run_job(*job) == 0
    assert tree(tmp_path / "out") == tree(reference)
    assert (tmp_path / "out" / "notes" / "todo.txt").read_text() == "mine"


def test_without_a_record_images_of_another_run_are_refused(job, out, capsys):
    (out / "run.json").unlink()
    assert run_job(*job, "--seed", 43) == 2
    assert "has no run.json but holds user_01/generated_000.png, made with another model or" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"run": 1, "identity": {}, "numerics": {}, "history": []}'])
def test_a_damaged_record_is_refused_and_overwritten_on_demand(job, out, reference, capsys, content):
    (out / "run.json").write_text(content)
    assert run_job(*job) == 2
    assert "or start again with --overwrite" in capsys.readouterr().err
    assert run_job(*job, "--overwrite") == 0
    assert f"Removed: 15 images of earlier runs, from {out}\n" in capsys.readouterr().out
    assert tree(out) == tree(reference)


def test_a_foreign_image_is_not_replaced_by_a_plain_run_either(job, out, capsys):
    content = picture(out / "user_02" / "generated_003.png")
    assert run_job(*job, "--num_images_per_user", 4) == 2
    error = capsys.readouterr().err
    assert "--output_dir: " in error
    assert "user_02/generated_003.png was not made by this job or one before it" in error
    assert (out / "user_02" / "generated_003.png").read_bytes() == content
    assert run_job(*job) == 0  # nobody asks for that one


def test_a_recorded_image_that_somebody_edited_is_made_again(job, out, reference):
    picture(out / "user_02" / "generated_001.png")
    assert run_job(*job) == 0
    assert tree(out) == tree(reference)


def test_a_user_folder_that_leads_to_another_dataset_is_not_written_through(job, flags, out, tmp_path):
    other = tmp_path / "other"
    assert run_job(*flags, "--seed", 9, "--num_images_per_user", 4, "--output_dir", other) == 0
    before = tree(other)
    shutil.rmtree(out / "user_05")
    lines = (out / "manifest.csv").read_text().splitlines(keepends=True)
    (out / "manifest.csv").write_text("".join(line for line in lines if "user_05" not in line))
    (out / "user_05").symlink_to(other / "user_05")
    assert run_job(*job) == 2
    assert run_job(*job, "--overwrite") == 2
    assert tree(other) == before


def test_somebodys_table_is_not_replaced(job, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.csv").write_text("name,age\nAda,36\n")
    assert run_job(*job) == 2
    assert "holds a manifest.csv that no job made" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.csv").read_text() == "name,age\nAda,36\n"


JPEG = io.BytesIO()
Image.new("RGB", (16, 16), "navy").save(JPEG, "JPEG")


@pytest.mark.parametrize("content", [b"My notes\n", JPEG.getvalue()], ids=["text", "JPEG"])
def test_a_file_of_ones_own_under_an_images_name_is_kept_whatever_it_is(job, out, capsys, content):
    path = out / "user_02" / "generated_003.png"
    path.write_bytes(content)
    assert run_job(*job, "--num_images_per_user", 4) == 2
    assert f"--output_dir: {path} was not made by this job or one before it" in capsys.readouterr().err
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda png: b"", id="empty"),
        pytest.param(lambda png: png[:5], id="cut in its signature"),
        pytest.param(lambda png: png[:-9], id="cut at its end"),
        pytest.param(lambda png: bytes(len(png)), id="zeros, as after a power cut"),
        pytest.param(lambda png: b"????" + png[4:], id="mangled in front"),
    ],
)
def test_a_damaged_image_without_a_row_is_made_again(job, out, reference, damage):
    path = out / "user_02" / "generated_002.png"
    path.write_bytes(damage(path.read_bytes()))
    labels = out / "manifest.csv"
    labels.write_text("".join(row for row in labels.open() if "user_02/generated_002" not in row))
    assert run_job(*job) == 0
    assert tree(out) == tree(reference)


def test_a_user_folder_that_is_a_file_is_one_line(job, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "user_02").write_text("")
    assert run_job(*job) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("batch_generate.py: error: --output_dir: ")


def test_what_is_lost_beyond_the_request_is_said(job, out, capsys):
    shutil.copy(out / "manifest.csv", out / "manifest.part-00000.csv")  # two rows speak of each image
    (out / "user_04" / "generated_002.png").unlink()
    (out / "user_05" / "generated_000.png").write_bytes(b"half")
    (out / "user_01" / "generated_001.png").unlink()
    assert run_job(*job, "--user_ids", 1) == 0
    said = capsys.readouterr().out
    assert (
        "Warning: 2 images are beyond this request and missing or damaged: user_04/generated_002.png, "
        "user_05/generated_000.png\n"
    ) in said
    assert "Note: 1 image is missing or damaged and made again: user_01/generated_001.png\n" in said


@pytest.mark.parametrize("name", [".userdiff.lock", ".userdiff.writers", "user_03"])
def test_a_disk_that_is_full_from_the_start_is_no_wrong_argument(job, tmp_path, capsys, monkeypatch, name):
    def refuse(event, args):
        if event in {"open", "os.mkdir"} and os.path.basename(str(args[0])) == name:  # noqa: PTH119
            monkeypatch.undo()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    AUDITED.append(refuse)
    try:
        assert run_job(*job) == 1
    finally:
        AUDITED.clear()
    said = f"error: --output_dir: No space left on device ({tmp_path / 'out' / name}), make room; "
    assert said in capsys.readouterr().err
    assert run_job(*job) == 0


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


def test_a_worker_that_outlived_its_job_keeps_the_next_one_out(job, out, reference, capsys, monkeypatch):
    monkeypatch.setattr(locks, "WRITERS_SECONDS", 0.2)
    with locks.writing(out):
        assert run_job(*job, "--seed", 7, "--overwrite") == 2
        assert "a process of an earlier job still has" in capsys.readouterr().err
    assert tree(out) == tree(reference)
    assert run_job(*job) == 0
    assert not list(out.glob(".userdiff*"))


def test_a_row_that_no_run_of_this_recipe_wrote_names_no_lost_image(job, out, reference, capsys):
    labels = out / "manifest.csv"
    row = labels.read_text().splitlines()[-1].replace("user_05/generated_002", "user_95/generated_002")
    labels.write_text(labels.read_text() + re.sub(",5,2,", ",95,2,", row) + "\n")  # its seed is user 5's
    assert run_job(*job) == 0
    assert "missing or damaged" not in capsys.readouterr().out
    assert tree(out) == tree(reference)


@pytest.mark.parametrize("what", ["a writer", "the images of a folder without a record"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_signal_ends_the_wait_before_a_job(job, out, reference, capsys, monkeypatch, what, overwrite):
    read, is_locked = output_folder.read_text_chunks, locks._is_locked

    def read_slowly(path):
        signal.raise_signal(signal.SIGINT)
        return read(path)

    def wait(file, kind):
        if file.name.endswith(".writers"):
            signal.raise_signal(signal.SIGINT)
        return is_locked(file, kind)

    with ExitStack() as held:
        if what == "a writer":
            held.enter_context(locks.writing(out))
            monkeypatch.setattr(locks, "_is_locked", wait)
        else:
            (out / "run.json").rename(out.parent / "kept.json")
            monkeypatch.setattr(output_folder, "read_text_chunks", read_slowly)
        assert run_job(*job, *overwrite) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err
    if what != "a writer":
        (out.parent / "kept.json").rename(out / "run.json")
    assert tree(out) == tree(reference)


@pytest.mark.parametrize("pipe", ["|", "|&"])
def test_nobody_listening_does_not_end_a_job(job, out, pipe):
    command = " ".join(map(str, [sys.executable, "batch_generate.py", *job, "--num_images_per_user", 4]))
    command = f"set -o pipefail; {command} {pipe} head -n 1"
    status, stdout, stderr = finish(start(["bash", "-c", command], OMP_NUM_THREADS="1"))
    assert stdout.count("\n") == 1
    assert status == 0, stderr
    assert len(list(out.glob("user_*/*.png"))) == 20


# --overwrite


def test_an_interrupt_before_anything_was_removed_removes_nothing(job, out, reference, monkeypatch):
    read = output_folder.read_text_chunks

    def read_and_interrupt(path):
        os.kill(os.getpid(), signal.SIGINT)
        return read(path)

    (out / "manifest.csv").unlink()
    monkeypatch.setattr(output_folder, "read_text_chunks", read_and_interrupt)
    assert run_job(*job, "--overwrite") == 130
    assert len(list(out.glob("user_*/*.png"))) == 15


def test_overwrite_leaves_a_linked_folder_and_what_only_has_the_name_of_an_image(job, out, tmp_path):
    (out / "user_02").rename(tmp_path / "larger_disk")
    (out / "user_02").symlink_to(tmp_path / "larger_disk")
    (out / "user_03" / "generated_999.png").write_bytes(b"\xff\xd8\xff a photo")
    assert run_job(*job, "--seed", 7, "--overwrite") == 0
    assert (out / "user_02").is_symlink()
    assert len(list((tmp_path / "larger_disk").iterdir())) == 3
    assert (out / "user_03" / "generated_999.png").read_bytes() == b"\xff\xd8\xff a photo"


def test_overwrite_removes_what_a_job_wrote_and_nothing_else(job, flags, out, tmp_path):
    assert run_job(*job, "--num_images_per_user", 5) == 0  # more than what will be asked for
    foreign = {
        name: picture(out / name)
        for name in ("user_01/mine.png", "user_04/generated_999.png", "user_77/generated_000.png", "album/one.png")
    }
    (out / "labels.csv").write_text("mine")
    unrecorded = out / "user_03" / "generated_004.png"  # of the old model, and its row is lost
    lines = (out / "manifest.csv").read_text().splitlines(keepends=True)
    (out / "manifest.csv").write_text("".join(line for line in lines if "user_03/generated_004" not in line))
    torn = out / "user_03" / "generated_003.png"  # recorded, and no longer a PNG
    torn.write_bytes(b"")
    (out / "manifest.part-00002.csv").write_text(lines[0] + lines[1])
    (out / "user_02" / ".generated_003.png.tmp-0123abcd").write_bytes(b"half")

    assert run_job(*job, "--user_ids", 1, 2, "--seed", 7, "--overwrite") == 0
    assert not unrecorded.exists()
    assert not torn.exists()
    for name, content in foreign.items():
        assert (out / name).read_bytes() == content
        (out / name).unlink()
    assert (out / "labels.csv").read_text() == "mine"
    for folder in ("user_77", "user_04", "album"):
        (out / folder).rmdir()  # empty but for the foreign
    (out / "labels.csv").unlink()
    assert {path.name for path in out.iterdir()} == {"user_01", "user_02", "manifest.csv", "run.json", "preview.html"}
    assert run_job(*job[:-1], tmp_path / "new", "--user_ids", 1, 2, "--seed", 7) == 0
    assert tree(out) == tree(tmp_path / "new")
    assert len(json.loads((out / "run.json").read_text())["history"]) == 1


def test_overwrite_does_not_take_the_place_of_a_foreign_image(job, out, reference, capsys):
    content = picture(out / "user_02" / "generated_003.png")
    assert run_job(*job, "--overwrite", "--num_images_per_user", 4) == 2
    assert "--overwrite: " in (error := capsys.readouterr().err)
    assert "user_02/generated_003.png was not made by this job or one before it, but an image of" in error
    assert (out / "user_02" / "generated_003.png").read_bytes() == content
    (out / "user_02" / "generated_003.png").unlink()
    assert tree(out) == tree(reference)  # nothing was removed


def test_overwrite_of_an_empty_or_missing_folder_is_a_plain_run(job, tmp_path, reference):
    assert run_job(*job, "--overwrite") == 0
    assert tree(tmp_path / "out") == tree(reference)


def test_a_group_that_the_launcher_restarts_does_not_start_again(job, out, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_job(*job, "--overwrite") == 0
    assert "15 already there, 0 to make" in capsys.readouterr().out


# Flat images


def test_images_of_one_colour_are_counted_and_named(job, tmp_path, capsys, monkeypatch):
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


def disk(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_what_a_job_will_take_is_said_before_it_starts(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk(10**9))
    assert run_job(*job) == 0
    said = capsys.readouterr()
    assert "Disk: at most 11.5kB to write, 1.00GB free" in said.out  # 15 images of 16 x 16 x 3 bytes
    assert "a full disk" not in said.err
    assert run_job(*job, "--num_images_per_user", 4) == 0
    assert re.search(r"Disk: about \d\.\d\dkB to write, 1\.00GB free", capsys.readouterr().out)
    assert run_job(*job, "--num_images_per_user", 4) == 0
    assert "Disk" not in capsys.readouterr().out  # nothing to write


def test_a_disk_that_is_too_small_is_said_up_front(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk(8192))
    assert run_job(*job) == 0
    assert f"Warning: 15 images take at most 11.5kB, and {tmp_path / 'out'} has 8.19kB free" in capsys.readouterr().err


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


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_real_disk_that_fills_up_loses_nothing(flags, tmp_path, capsys, num_processes):
    """Each image is a block and each folder's inode counts: 400 kB hold some 80 of the 200 images."""
    job = [*flags, "--num_images_per_user", 40]
    assert run_job(*job, "--output_dir", tmp_path / "elsewhere") == 0
    with mounted(tmp_path / "disk", "size=400k") as folder:
        out = folder / "out"
        capsys.readouterr()
        if num_processes == 1:
            assert run_job(*job, "--output_dir", out) == 1
            error = capsys.readouterr().err.strip().splitlines()[-1]
            done = len(list(out.glob("user_*/*.png")))
            assert error.startswith(f"batch_generate.py: error: --output_dir: No space left on device ({out}")
            assert error.endswith(
                f", make room; {done} of 200 images are in {out}, the same command goes on from there"
            )
        else:
            with pytest.raises(Exception, match="No space left on device"):
                play_processes(num_processes, *job, "--output_dir", out)
        made = {path: path.read_bytes() for path in out.glob("user_*/*.png")}
        assert 20 < len(made) < 200
        for path, content in made.items():
            assert content == (tmp_path / "elsewhere" / path.relative_to(out)).read_bytes()
        assert not list(out.glob("user_*/.*"))
        assert run_job(*job, "--output_dir", out) == 1  # still full: nothing changes
        assert made.items() <= {path: path.read_bytes() for path in out.glob("user_*/*.png")}.items()
        subprocess.run(["mount", "-o", "remount,size=40m", str(folder)], check=True)
        assert run_job(*job, "--output_dir", out) == 0
        assert tree(out) == tree(tmp_path / "elsewhere")


def test_a_read_only_disk_is_one_line(job, tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=4m,ro") as folder:
        assert run_job(*job, "--output_dir", folder / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("batch_generate.py: error: --output_dir: ")
    assert "Read-only file system" in error
    assert error.count("\n") == 1


def test_a_folder_one_may_not_write_is_one_line(flags, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    may_not_write = []
    if os.geteuid() == 0:  # who may write anywhere
        may_not_write = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv, which takes root its rights, is not installed")
    command = [*may_not_write, sys.executable, "batch_generate.py", *map(str, flags), "--output_dir", folder]
    status, stdout, stderr = finish(start(command, OMP_NUM_THREADS="1"))
    assert status == 2, stderr
    assert stderr.startswith("batch_generate.py: error: --output_dir: ")
    assert "Permission denied" in stderr
    assert stderr.count("\n") == 1
    assert stdout == ""
    assert list(folder.iterdir()) == []


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
