"""Files that are not what their names say: nothing is waited for, nothing is touched, and memory is bounded."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.definitions import (
    IDENTITY,
    change_entry,
    csv_of,
    entry_of,
    fields_of,
    files_in,
    image_of,
    images_of,
    interrupt,
    name_of,
    png_of,
    record_of,
    run_of,
    write_dataset,
)
from tests.jobs import ROOT
from userdiff.cli import main
from userdiff.dataset import files, locks, rows, scan
from userdiff.dataset.layout import part_path
from userdiff.dataset.manifest import PartWriter
from userdiff.tools.status import read_status
from userdiff.tools.verify import verify

ITEMS = [(user_id, image_index) for user_id in (1, 2) for image_index in range(3)]
IMAGES = {item: image_of(*item) for item in ITEMS}


@pytest.fixture
def out(tmp_path):
    """A finished dataset of two users, three images each."""
    return write_dataset(tmp_path / "out", IMAGES, record_of(entry_of()))


@contextmanager
def seconds_at_most(seconds):
    """End what waits."""

    def end(number, frame):
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def listen(path):
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
        one.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


KINDS = {
    "FIFO": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("/mnt/archive/photo.png"),
    "folder": lambda path: path.mkdir(),
    "socket": listen,
}
NAMES = ["run.json", "manifest.csv", "manifest.part-00000.csv", "preview.html", ".userdiff.lock", ".userdiff.writers"]
NAMES += [name_of(1, 1), name_of(2, 7)]
COMMANDS = [
    "status {}",
    "verify {}",
    "verify {} --deep",
    "merge {}",
    "preview {}",
    "inspect {}",
    "merge {} --into {}.2",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_waited_for_or_replaced(out, capsys, kind, name):
    path = out / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    before = path.lstat()
    for command in COMMANDS:
        with seconds_at_most(20):
            status = main(command.replace("{}", str(out)).split())
        error = capsys.readouterr().err
        assert status in (0, 1, 2)
        assert error.count("\n") == (status == 2)
        if status == 2:
            assert name in error
    after = path.lstat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_what_is_no_file(out, kind):
    for name in (name_of(2, 7), "preview.html"):
        (out / name).unlink(missing_ok=True)
        KINDS[kind](out / name)
    assert {name_of(2, 7), "preview.html"} <= {problem.name for problem in verify(out) if problem.kind == "foreign"}


# Memory


def bomb(side):
    """A PNG of some hundred kilobytes that decodes to some hundred megabytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(bytes(side * (side + 1)), 1)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(40 * 10**9)


def of_wide_rows(out):
    (out / "manifest.csv").write_text(csv_of(*(fields_of(1, index, b"", (65535, 65535)) for index in range(3))))
    change_entry(out)  # records the hash


PEAK = """
import resource, sys
from userdiff.cli import main
for command in sys.argv[2:]:
    status = main(command.replace("{}", sys.argv[1]).split())
    assert status in (0, 1, 2), status
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_of(out):
    """Run every command in one process; returns how many MB it took."""
    commands = [*COMMANDS, "preview {} --picture {}.png --scale 1", "inspect {} --real {}"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(out), *commands],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert "Traceback" not in done.stderr
    return int(done.stdout.rpartition("peak ")[2])


def test_what_decodes_or_reads_to_gigabytes_takes_no_more_memory_than_an_ordinary_dataset(out):
    ordinary = peak_of(out)
    huge, large = bomb(20000), bomb(4096)
    for item in ITEMS[:4]:
        (out / name_of(*item)).write_bytes(huge)
    for item in ITEMS[4:]:
        (out / name_of(*item)).write_bytes(large)
    with open(out / name_of(2, 5), "wb") as file:  # a header of a small image, and a chunk of two gigabytes, sparse
        file.write(png_of({}, (32, 32))[:33] + struct.pack(">I", 2 * 10**9) + b"prVt")
        file.truncate(2 * 10**9 + 50)
    for index in range(7, 11):  # of no row
        (out / name_of(1, index)).write_bytes(large)
    sparse(out / name_of(2, 9))
    sparse(out / part_path(out, 0))
    assert peak_of(out) < ordinary + 200
    of_wide_rows(out)
    assert peak_of(out) < ordinary + 200
    sparse(out / "manifest.csv")
    assert peak_of(out) < ordinary + 200
    (out / "manifest.csv").write_text(csv_of() + "\n" * 10**7)
    with open(out / "manifest.csv", "r+b") as file:
        file.truncate(10**12)
    assert peak_of(out) < ordinary + 200
    sparse(out / "run.json")
    assert peak_of(out) < ordinary + 200


# Formats and targets


def test_nothing_but_png_is_even_tried_under_an_images_name(out, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(out / name_of(1, 0), "GIF")
    (out / name_of(1, 1)).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    real = out.parent / "real"
    (real / "user_01").mkdir(parents=True)
    (real / "user_01" / "a.png").write_bytes((out / name_of(1, 1)).read_bytes())
    Image.new("RGB", (8, 8), "red").save(real / "user_01" / "b.jpg")
    opened, tried = Image.open, []
    monkeypatch.setattr(
        Image, "open", lambda file, formats=None: tried.append(formats) or opened(file, formats=formats)
    )
    assert main(["inspect", str(out), "--real", str(real)]) == 0
    assert "2 more cannot be read: user_01/generated_000.png, user_01/generated_001.png" in capsys.readouterr().out
    assert set(tried) == {("PNG",), ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")}


def test_figures_go_where_a_person_says_through_links_and_into_what_is_no_file(out, tmp_path):
    (tmp_path / "link.json").symlink_to("figures.json")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for name in ("link.json", "stdout"):
        command = f"{sys.executable} -m userdiff inspect {out} --json {tmp_path / name} | cat"
        done = subprocess.run(command, shell=True, check=True, cwd=ROOT, capture_output=True, text=True)
        assert ('"num_images": 6' in done.stdout) == (name == "stdout")
        assert (tmp_path / name).is_symlink()
    assert main(["inspect", str(out), "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    assert json.loads((tmp_path / "figures.json").read_text())["num_images"] == 6


def test_what_a_link_in_a_source_leads_to_is_not_linked_and_not_read_out(out, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"-----BEGIN PRIVATE KEY-----\n")
    path = out / name_of(1, 0)
    path.unlink()
    path.symlink_to(secret)
    contents = {**IMAGES, (1, 0): secret.read_bytes()}
    lines = [fields_of(*item, data) for item, data in contents.items()]
    (out / "manifest.csv").write_text(csv_of(*lines))
    change_entry(out)
    assert main(["merge", str(out), "--into", str(tmp_path / "C")]) == 0
    assert not (tmp_path / "C" / name_of(1, 0)).exists()
    assert secret.stat().st_nlink == 1


# What is printed


def test_names_cannot_forge_lines_nor_end_a_command(out, capsys):
    names = ["x\ny", "\x1b[2J", "\u202etxt", "caf\u00e9", "photo\udcff.bin"]
    for name in names:
        (out / "user_01" / name).write_bytes(b"")
    assert main(["verify", str(out)]) == 1
    said = capsys.readouterr().out
    assert "foreign     user_01/caf\u00e9: not an image of a job\n" in said
    assert all(line.isprintable() for line in said.splitlines())
    for shown in (r"x\ny", r"\x1b[2J", r"\u202etxt", r"photo\udcff.bin"):
        assert f"foreign     user_01/{shown}: not an image of a job\n" in said


@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_streams_of_few_letters_or_closed_ones_end_nothing(out, setting):
    (out / "user_01" / "photo\udcff\u00e9.bin").write_bytes(b"")
    for redirection in ("", ">&-", "2>&-", ">&- 2>&- <&-"):
        command = f"{sys.executable} -m userdiff verify {out} {redirection}"
        done = subprocess.run(
            command, shell=True, check=False, cwd=ROOT, env={**os.environ, **setting}, capture_output=True
        )
        assert (done.returncode, done.stderr) == (1, b"")
        assert b"Traceback" not in done.stdout
    before = files_in(out)
    subprocess.run(f"{sys.executable} -m userdiff merge {out} >&- 2>&-", shell=True, check=True, cwd=ROOT)
    assert {**files_in(out), "run.json": b""} == {**before, "run.json": b""}  # nothing printed went into a file


# Reading beside others


def test_an_image_that_the_disk_does_not_read_is_not_called_changed(out, monkeypatch):
    opened = files.os.open

    def refuse(path, flags, *mode):
        if str(path).endswith(name_of(1, 1)):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(files.os, "open", refuse)
    ((kind, name, what),) = ((problem.kind, problem.name, problem.what) for problem in verify(out, deep=True))
    assert (kind, name, what) == ("unreadable", name_of(1, 1), "Input/output error")


def merge_at_the_first_read(monkeypatch, module, name, out):
    """Have another process merge just before a file is read."""
    real, merged = getattr(module, name), []

    def reading(*arguments, **options):
        if not merged:
            merged.append(subprocess.run([sys.executable, "-m", "userdiff", "merge", str(out)], cwd=ROOT, check=True))
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, reading)


@pytest.mark.parametrize(("module", "name"), [(rows, "open_file"), (scan.layout, "user_folders"), (rows, "_parse")])
def test_a_merge_meanwhile_makes_nobody_lie(out, monkeypatch, module, name):
    interrupt(out)
    change_entry(out, state="ended", ended="2026-11-23T11:07:30+00:00")
    merge_at_the_first_read(monkeypatch, module, name, out)
    status = read_status(out)
    assert (sum(status.done.values()), status.unrecorded) == (6, 0)


@pytest.mark.parametrize(("module", "name"), [(rows, "open_file"), (scan.layout, "user_folders")])
def test_a_merge_meanwhile_is_no_problem(out, monkeypatch, module, name):
    interrupt(out)
    change_entry(out, state="ended", ended="2026-11-23T11:07:30+00:00")
    merge_at_the_first_read(monkeypatch, module, name, out)
    assert [problem for problem in verify(out) if problem.kind != "unmerged"] == []


def test_a_merge_waits_for_whoever_may_still_write(out, monkeypatch, capsys):
    monkeypatch.setattr(locks, "WRITERS_SECONDS", 0.2)
    with locks.writing(out), PartWriter(part_path(out, 0)):
        assert main(["merge", str(out)]) == 2
        assert "still has" in capsys.readouterr().err
        assert part_path(out, 0).exists()
    assert main(["merge", str(out)]) == 0


# What people did to their dataset


def test_an_edited_image_is_no_finished_one_and_no_merge_hides_that(out, tmp_path, capsys):
    path = out / name_of(1, 1)
    path.write_bytes(png_of(Image.open(path).text, (30, 30), "white"))
    kept = path.read_bytes()
    for command in ("merge", "merge", "preview"):
        before = files_in(out)["manifest.csv"]
        assert main([command, str(out)]) == 0
        assert files_in(out)["manifest.csv"] == before
        capsys.readouterr()
        for deep in ([], ["--deep"]):
            assert main(["verify", str(out), *deep]) == 1
            assert f"changed     {name_of(1, 1)}" in capsys.readouterr().out
    assert main(["merge", str(out), "--into", str(tmp_path / "C")]) == 0
    assert "1 images missing, damaged or of another run: user_01/generated_001.png" in capsys.readouterr().out
    assert kept not in files_in(tmp_path / "C").values()


def test_a_manifest_that_somebody_added_to_is_kept(out, tmp_path, capsys):
    lines = (out / "manifest.csv").read_text().splitlines()
    added = "".join(f"{line},{'split' if number == 0 else 'train'}\n" for number, line in enumerate(lines))
    for number in (1, 2):
        (out / "manifest.csv").write_text(added + f"# {number}\n")
        assert main(["merge", str(out)]) == 0
        copy = out / f"manifest.edited-{number}.csv"
        assert str(copy) in capsys.readouterr().out
        assert copy.read_text() == added + f"# {number}\n"
        assert (out / "manifest.csv").read_text().splitlines() == lines
    (out / "manifest.csv").write_text(added)
    other = write_dataset(tmp_path / "other", images_of([(1, 7)]), record_of(entry_of()))
    assert main(["merge", str(other), "--into", str(out)]) == 0
    assert (out / "manifest.edited-3.csv").read_text() == added
    assert not [problem for problem in verify(out) if problem.kind == "foreign"]
    whole = (out / "manifest.csv").read_bytes()
    for damaged in (
        bytes(500),
        b"",
        whole + b"\xff\0,x,y",
        b"?" + whole[1:],
        whole.replace(b"_", b",", 1),
        whole[300:],
    ):
        (out / "manifest.csv").write_bytes(damaged)
        assert main(["merge", str(out)]) == 0
        assert not (out / "manifest.edited-4.csv").exists()
        assert (out / "manifest.csv").read_bytes() == whole
    (out / "manifest.csv").write_text("name,age\nAda,36\n")
    assert main(["merge", str(out)]) == 0
    assert (out / "manifest.edited-4.csv").read_text() == "name,age\nAda,36\n"


def test_the_image_of_a_foreign_identity_stays_foreign(out):
    assert run_of(IDENTITY) == record_of()["run"]
    (out / name_of(1, 9)).write_bytes(image_of(1, 9, run="f" * 64))
    assert [problem.kind for problem in verify(out)] == ["foreign"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(numerics={}),
        lambda entry: entry.update(joined=[[[]]]),
        lambda entry: entry.update(user_ids="1-10000000"),
    ],
)
def test_an_odd_entry_is_one_line(out, capsys, change):
    record = json.loads((out / "run.json").read_text())
    change(record["history"][-1])
    (out / "run.json").write_text(json.dumps(record))
    for command in ("status", "verify", "merge"):
        assert main([command, str(out)]) == 2
        assert "run.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("preview {} --picture {}/user_01/generated_000.png", "--picture: "),
        ("preview {} --picture {}/sheet.png", "--picture: "),
        ("preview {} --picture {}/../p.webp --scale 2000", "--picture: "),
        ("inspect {} --json {}/manifest.csv", "--json: "),
        ("merge {} --into {}/../loop", "--into: "),
        ("merge {} --into {}/../loop/x", ""),
        ("merge {}/../loop --into {}/../x", ""),
        ("merge {} --into {}/../taken", "user_02 is no folder"),
    ],
)
def test_a_target_that_is_none_is_one_line_and_nothing_is_touched(out, tmp_path, capsys, flags, said):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "p.webp").write_bytes(b"precious")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "user_02").write_bytes(b"hi")
    before = files_in(tmp_path)
    assert main(flags.replace("{}", str(out)).split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert files_in(tmp_path) == before


def test_an_image_wider_than_a_row_can_note_is_foreign(out):
    text = Image.open(out / name_of(1, 0)).text
    (out / "manifest.csv").unlink()
    (out / name_of(1, 0)).write_bytes(png_of(text, (70000, 1)))
    assert main(["merge", str(out)]) == 0
    assert not any(row.startswith(name_of(1, 0)) for row in (out / "manifest.csv").open())


def test_a_folder_that_cannot_be_listed_is_not_empty(out, monkeypatch, capsys):
    real = Path.iterdir

    def refuse(path):
        if path == out:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    before = (out / "manifest.csv").read_bytes()
    for command in ("status", "verify", "merge", "inspect"):
        assert main([command, str(out)]) == 2
        assert f"Permission denied ({out})" in capsys.readouterr().err
    assert (out / "manifest.csv").read_bytes() == before


@pytest.mark.parametrize("target", ["/etc/passwd/x", "/" + "x" * 300])
@pytest.mark.parametrize("name", [name_of(1, 7), "user_09", "other"])
def test_a_link_that_leads_nowhere_ends_nothing(out, capsys, name, target):
    (out / name).symlink_to(target)
    for command in ("status", "verify", "merge"):
        assert main([command, str(out)]) in (0, 1)
        assert capsys.readouterr().err == ""


def test_a_small_file_of_ones_own_is_no_lock(out, capsys):
    for name in (".userdiff.lock", ".userdiff.writers", ".userdiff.probe"):
        (out / name).write_bytes(b"precious")
        assert main(["merge", str(out)]) == 2
        assert name in capsys.readouterr().err
        assert (out / name).read_bytes() == b"precious"
        (out / name).unlink()
