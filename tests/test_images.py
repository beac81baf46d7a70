import io
import os
import secrets
import stat
import struct
import threading
import zlib
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from userdiff.dataset.images import (
    WriterPool,
    decode_png,
    encode_png,
    file_name,
    parse_file_name,
    png_size,
    publish,
    remove_temporaries,
    user_folders,
)

PATIENCE = 10  # seconds until a test gives up on another thread; none waits that long when all is well


def noise(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def paths_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# Names


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ((1, 0), "user_01/generated_000.png"),
        ((31, 4), "user_31/generated_004.png"),
        ((99, 999), "user_99/generated_999.png"),
        ((100, 1000), "user_100/generated_1000.png"),
    ],
)
def test_images_are_named_as_the_contract_says(item, name):
    assert file_name(*item) == name
    assert parse_file_name(name) == item


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**63 - 1) | st.integers(1, 200), st.integers(0, 2**32 - 1) | st.integers(0, 2000))
def test_names_read_back(user_id, image_index):
    assert parse_file_name(file_name(user_id, image_index)) == (user_id, image_index)


FOREIGN_NAMES = [
    "user_1/generated_000.png",
    "user_001/generated_000.png",
    "user_xx/generated_000.png",
    "user_-1/generated_000.png",
    "user_\u0661\u0662/generated_000.png",
    "user_01/generated_00.png",
    "user_01/generated_0000.png",
    "user_01/generated_-01.png",
    "user_01/generated_000.jpg",
    "user_01/generated_000.PNG",
    "user_01/generated_000.png.bak",
    "user_01/.generated_000.png.tmp-0123abcd",
    "user_01/copy of generated_000.png",
    "User_01/generated_000.png",
    "backup/generated_000.png",
    "generated_000.png",
]


@pytest.mark.parametrize("name", [*FOREIGN_NAMES, "a/user_01/generated_000.png", "user_01/generated_000.png\n", ""])
def test_foreign_names_are_no_images(name):
    assert parse_file_name(name) is None


def test_only_images_of_a_job_are_found(tmp_path):
    names = ["user_01/generated_000.png", "user_01/generated_1000.png", "user_100/generated_002.png"]
    nested = ["user_01/user_01/generated_000.png", "old/user_01/generated_000.png"]
    for name in [*names, *nested, *FOREIGN_NAMES, "manifest.csv"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "user_02").touch()  # a file where a folder would be
    (tmp_path / "user_03").mkdir()
    folders = {folder.name: folder for folder in user_folders(tmp_path)}
    found = {folder.user_id: folder.image_indices.tolist() for folder in folders.values() if len(folder.image_indices)}
    assert found == {1: [0, 1000], 100: [2]}
    foreign = {name.partition("/")[2] for name in FOREIGN_NAMES if name.startswith("user_01/")}
    assert {*folders["user_01"].others} == {*foreign, "user_01"} - {".generated_000.png.tmp-0123abcd"}
    assert (folders["user_001"].user_id, folders["user_001"].others) == (0, ["generated_000.png"])


# PNG


@pytest.mark.parametrize("level", [0, 1, 3, 4, 6, 9])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 8), (16, 3)])
def test_a_png_holds_pixels_and_text(tmp_path, height, width, channels, level):
    pixels = noise(height, width, channels)
    text = {"user_id": "7", "seed": "4294967295", "userdiff_run": "ab" * 32}
    path = tmp_path / "image.png"
    path.write_bytes(encode_png(pixels, text, level))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image).reshape(height, width, channels), pixels)
        assert image.text == text
    assert decode_png(path.read_bytes()) == ((width, height), text)
    assert png_size(path.read_bytes()) == (width, height)


@pytest.mark.parametrize("level", [1, 6])
def test_a_view_of_other_strides_is_encoded_as_it_looks(tmp_path, level):
    pixels = noise(9, 6, 3).transpose(1, 0, 2)[::2, ::-1]
    path = tmp_path / "image.png"
    path.write_bytes(encode_png(pixels, {}, level))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)


@given(
    pixels=arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]))),
    text=st.dictionaries(
        st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    ),
    level=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_encoded_is_decoded(pixels, text, level):
    data = encode_png(pixels, text, level)
    size, found = decode_png(data)
    assert (size, found) == ((pixels.shape[1], pixels.shape[0]), text)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))).reshape(pixels.shape), pixels)


def test_the_fast_levels_choose_no_filter_and_cost_little(tmp_path):
    """Every row has the filter Sub; of a smooth image the file is about as large."""
    y, x = np.mgrid[0:128, 0:128]
    pixels = np.stack([x + y, 2 * x, 255 - y], axis=-1).clip(0, 255).astype(np.uint8)
    pixels += np.random.default_rng(0).integers(0, 4, pixels.shape, dtype=np.uint8)
    fast = encode_png(pixels, {"user_id": "1"}, 1)
    data = fast[fast.index(b"IDAT") + 4 : fast.index(b"IEND") - 8]
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(128, 1 + 3 * 128)
    assert set(rows[:, 0].tolist()) == {1}
    assert len(fast) < 1.3 * len(encode_png(pixels, {"user_id": "1"}))


@pytest.mark.parametrize("level", [1, 6])
def test_text_in_any_script_is_kept(tmp_path, level):
    text = {"latin": "déjà vu", "other": "用户 ①", "empty": "", "long": 1000 * "x"}
    path = tmp_path / "image.png"
    path.write_bytes(encode_png(noise(2, 2, 3), text, level))
    assert decode_png(path.read_bytes())[1] == text


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match=f"^a PNG has 1, 3 or 4 channels, the VAE makes {channels}$"):
        encode_png(np.zeros((4, 4, channels), dtype=np.uint8), {})


@pytest.mark.parametrize("missing", [*range(1, 30), 0.5, 1.0])
def test_a_truncated_png_is_not_intact(tmp_path, missing):
    data = encode_png(noise(8, 8, 3), {"user_id": "1"})
    kept = len(data) - missing if isinstance(missing, int) else int(len(data) * (1 - missing))
    path = tmp_path / "image.png"
    path.write_bytes(data[:kept])
    with pytest.raises(OSError, match=r"."):
        decode_png(path.read_bytes())


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PIXELS = zlib.compress(b"\0\1\2\0\3\4")  # two rows of two grey pixels, each after its filter type


def crafted_png(*, width=2, height=2, extra=b"", pixels=PIXELS):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_bit_flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_the_crafted_png_is_intact(tmp_path):
    (tmp_path / "image.png").write_bytes(crafted_png())
    assert decode_png((tmp_path / "image.png").read_bytes()) == ((2, 2), {})


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"an image", id="text"),
        pytest.param(b"\xff\xd8\xff\xe0 JFIF", id="jpeg"),
        pytest.param(crafted_png(pixels=b"none"), id="pixels that are not deflated"),
        pytest.param(crafted_png(extra=chunk(b"gAMA", b"")), id="an empty gamma"),
        pytest.param(crafted_png(width=0), id="no width"),
        pytest.param(crafted_png(width=60000, height=60000), id="a size that nobody can hold"),
        pytest.param(with_bit_flipped(crafted_png(), 17), id="a changed header"),
        pytest.param(with_bit_flipped(crafted_png(), -14), id="a changed checksum of the pixels"),
        pytest.param(with_bit_flipped(crafted_png(extra=chunk(b"tEXt", b"a\0b")), 43), id="a changed text"),
    ],
)
def test_what_is_no_intact_png_is_an_os_error(tmp_path, data):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"."):
        decode_png(path.read_bytes())


def test_a_missing_file_and_a_folder_are_os_errors(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(OSError, match=path.name):
            decode_png(path.read_bytes())


# Publishing


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_a_published_file_is_whole_and_alone(tmp_path, data):
    publish(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data
    assert paths_in(tmp_path) == ["file"]


def test_publishing_replaces_what_was_there(tmp_path):
    publish(tmp_path / "file", b"a longer old text")
    publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert paths_in(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_permissions_are_what_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        publish(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_the_name_changes_hands_in_one_step_within_one_folder(tmp_path, monkeypatch):
    target, moves = tmp_path / "file", []
    target.write_bytes(b"old")

    def replace(source, destination):
        moves.append((source.parent, source.read_bytes(), target.read_bytes(), destination))
        source.rename(destination)

    monkeypatch.setattr(os, "replace", replace)
    publish(target, b"new")
    assert moves == [(tmp_path, b"new", b"old", target)]
    assert target.read_bytes() == b"new"


def test_each_publication_has_a_temporary_of_its_own(tmp_path, monkeypatch):
    sources = []
    monkeypatch.setattr(os, "replace", lambda source, destination: sources.append(source))
    for _ in range(20):
        publish(tmp_path / "file", b"data")
    assert len(set(sources)) == 20


def test_nothing_is_left_where_the_target_is_a_folder(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="target"):
        publish(tmp_path / "target", b"data")
    assert paths_in(tmp_path) == []
    assert (tmp_path / "target").is_dir()


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_nothing_is_left_and_the_old_file_stays_where_publishing_fails(tmp_path, monkeypatch, error):
    def replace(source, destination):
        raise error

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error)) as raised:
        publish(tmp_path / "file", b"new")
    assert raised.value is error
    assert paths_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "missing" / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_temporary_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "01" * size)
    monkeypatch.setattr(os, "replace", lambda source, destination: None)
    publish(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "file", b"second")


# Temporaries of a killed job


def leave_temporary(target, monkeypatch):
    """What `publish` leaves when its process is killed before the rename."""
    target.parent.mkdir(exist_ok=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda source, destination: None)
        publish(target, b"half")


@pytest.mark.parametrize(
    "name", ["user_01/generated_000.png", "user_100/generated_1000.png", "manifest.csv", "run.json"]
)
def test_temporaries_of_a_job_are_removed(tmp_path, monkeypatch, name):
    leave_temporary(tmp_path / name, monkeypatch)
    assert len(paths_in(tmp_path)) == 1
    remove_temporaries(tmp_path)
    assert paths_in(tmp_path) == []


def test_nothing_but_temporaries_of_a_job_is_removed(tmp_path, monkeypatch):
    others = [
        ".hidden",
        ".tmp-0123abcd",
        ".manifest.csv.tmp-0123ABCD",
        ".manifest.csv.tmp-0123abc",
        ".manifest.csv.tmp-0123abcd.bak",
        "manifest.csv",
        "manifest.csv.tmp-0123abcd",
        "manifest.part-00000.csv",
        "other/.generated_000.png.tmp-0123abcd",
        "user_01/.notes.tmp",
        "user_01/deeper/.generated_000.png.tmp-0123abcd",
        "user_01/generated_000.png",
        "user_01/generated_000.png.tmp-0123abcd",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    leave_temporary(tmp_path / "user_01" / "generated_001.png", monkeypatch)
    remove_temporaries(tmp_path)
    assert paths_in(tmp_path) == sorted(others)


# The writer pool


def test_leaving_the_pool_waits_for_every_task():
    gate, done = threading.Event(), []

    def task(number):
        assert gate.wait(PATIENCE)
        done.append(number)

    with WriterPool(num_threads=8, max_pending=200) as pool:
        for number in range(200):
            pool.submit(lambda number=number: task(number))
        assert done == []
        gate.set()
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize(("num_threads", "max_pending"), [(1, 1), (4, 2), (2, 4), (8, 8)])
def test_many_submitters_get_every_task_done_once(num_threads, max_pending):
    done = []

    def submit_all(first):
        for number in range(first, first + 50):
            pool.submit(lambda number=number: done.append(number))

    with WriterPool(num_threads, max_pending) as pool:
        submitters = [threading.Thread(target=submit_all, args=(first,)) for first in range(0, 200, 50)]
        for submitter in submitters:
            submitter.start()
        for submitter in submitters:
            submitter.join(PATIENCE)
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_tasks_run_on_as_many_threads_as_were_asked_for(num_threads):
    gate, started, threads = threading.Event(), threading.Semaphore(0), set()

    def task():
        threads.add(threading.get_ident())
        started.release()
        assert gate.wait(PATIENCE)

    with WriterPool(num_threads, max_pending=6) as pool:
        for _ in range(6):
            pool.submit(task)
        assert all(started.acquire(timeout=PATIENCE) for _ in range(num_threads))  # while none of them can end
        gate.set()
    assert len(threads) == num_threads


@pytest.mark.parametrize(("num_threads", "max_pending"), [(2, 3), (4, 1)])
def test_submitting_blocks_while_enough_is_pending(num_threads, max_pending):
    gate, one_more_is_in = threading.Event(), threading.Event()

    def submit_one_more():
        pool.submit(lambda: None)
        one_more_is_in.set()

    with WriterPool(num_threads, max_pending) as pool:
        for _ in range(max_pending):
            pool.submit(lambda: gate.wait(PATIENCE))
        submitter = threading.Thread(target=submit_one_more)
        submitter.start()
        assert not one_more_is_in.wait(0.1)
        gate.set()
        assert one_more_is_in.wait(PATIENCE)
        submitter.join(PATIENCE)


def failing(error, cause=None):
    def task():
        raise error from cause

    return task


def run_pool(body, num_threads, max_pending):
    with WriterPool(num_threads, max_pending) as pool:
        body(pool)


def submit_and_hear(pool, task, heard):
    try:
        pool.submit(task)
    except OSError as failure:
        heard.append(failure)


def test_a_failure_is_raised_at_the_end_with_its_cause():
    error, cause = OSError("disk full"), ValueError("quota")
    with pytest.raises(OSError, match="disk full") as raised:
        run_pool(lambda pool: pool.submit(failing(error, cause)), num_threads=1, max_pending=3)
    assert raised.value is error
    assert raised.value.__cause__ is cause


def test_the_first_of_two_failures_is_raised():
    gate, errors = threading.Event(), [OSError("first"), OSError("second")]

    def body(pool):
        pool.submit(lambda: gate.wait(PATIENCE))
        for error in errors:
            pool.submit(failing(error))
        gate.set()

    with pytest.raises(OSError, match="first") as raised:
        run_pool(body, num_threads=1, max_pending=3)
    assert raised.value is errors[0]


def test_after_a_failure_submitting_raises_it_and_runs_nothing_more():
    error, heard, ran = OSError("disk full"), [], []

    def submit_more(pool):
        for _ in range(5):  # the first of these waits until the failure is known
            submit_and_hear(pool, lambda: ran.append(1), heard)

    def body(pool):
        pool.submit(failing(error))
        submitter = threading.Thread(target=submit_more, args=(pool,), daemon=True)
        submitter.start()
        submitter.join(PATIENCE)

    with pytest.raises(OSError, match="disk full"):
        run_pool(body, num_threads=1, max_pending=1)
    assert heard == 5 * [error]
    assert ran == []


def test_a_submitter_that_is_waiting_hears_of_the_failure():
    gate, error, heard, ran = threading.Event(), OSError("disk full"), [], []

    def fail_later():
        assert gate.wait(PATIENCE)
        raise error

    def body(pool):
        pool.submit(fail_later)
        submitter = threading.Thread(target=submit_and_hear, args=(pool, lambda: ran.append(1), heard), daemon=True)
        submitter.start()
        gate.set()
        submitter.join(PATIENCE)

    with pytest.raises(OSError, match="disk full"):
        run_pool(body, num_threads=1, max_pending=1)
    assert heard == [error]
    assert ran == []


def test_a_task_that_succeeds_at_the_same_moment_does_not_hide_a_failure(monkeypatch):
    """The end of a good task is held up until the failure of another is known, then goes on."""
    both_are_in, good_is_ending, failure_is_known = threading.Event(), threading.Event(), threading.Event()
    exception_of = Future.exception

    def slow_exception(future, timeout=None):
        error = exception_of(future, timeout)
        if error is None:
            good_is_ending.set()
            failure_is_known.wait(0.5)
        return error

    def fail():
        assert both_are_in.wait(PATIENCE)
        good_is_ending.wait(0.5)
        raise OSError("disk full")

    def body(pool):
        pool.submit(lambda: both_are_in.wait(PATIENCE))
        pool.submit(fail)
        both_are_in.set()
        with suppress(OSError):
            pool.submit(lambda: None)  # waits for a place, which the failed task gives back
        failure_is_known.set()

    monkeypatch.setattr(Future, "exception", slow_exception)
    with pytest.raises(OSError, match="disk full"):
        run_pool(body, num_threads=2, max_pending=2)


@pytest.mark.parametrize("task_fails", [False, True])
def test_an_error_of_the_body_is_not_masked_and_what_was_submitted_is_done_first(task_fails):
    gate, done, mistake = threading.Event(), [], KeyError("body")

    def task():
        assert gate.wait(PATIENCE)
        done.append("written")
        if task_fails:
            raise OSError("disk full")

    def body(pool):
        pool.submit(task)
        threading.Timer(0.05, gate.set).start()  # while the pool is being left
        raise mistake

    with pytest.raises(KeyError) as raised:
        run_pool(body, num_threads=1, max_pending=2)
    assert raised.value is mistake
    assert done == ["written"]
