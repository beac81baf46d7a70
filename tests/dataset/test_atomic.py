import errno
import os
import re
import secrets
import stat

import pytest

from tests.definitions import files_in
from userdiff.dataset import atomic
from userdiff.dataset.atomic import check_file_system, publish, remove_temporaries


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000, [b"in ", b"pieces"]])
@pytest.mark.parametrize("sync", [False, True])
def test_a_published_file_takes_the_place_of_the_old_in_one_step_within_one_folder(tmp_path, monkeypatch, data, sync):
    target, whole, moves = tmp_path / "file", b"".join(data) if isinstance(data, list) else data, []
    target.write_bytes(b"old")

    def replace(source, destination):
        moves.append((source.parent, source.read_bytes(), target.read_bytes(), destination))
        source.rename(destination)

    monkeypatch.setattr(os, "replace", replace)
    publish(target, data, sync=sync)
    assert moves == [(tmp_path, whole, b"old", target)]
    assert files_in(tmp_path) == {"file": whole}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o666)])
def test_permissions_are_what_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        publish(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_nothing_is_left_and_the_old_file_stays_where_publishing_fails(tmp_path, monkeypatch, error):
    def replace(source, destination):
        raise error

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error)) as raised:
        publish(tmp_path / "file", b"new")
    assert raised.value is error
    assert files_in(tmp_path) == {"file": b"old"}


def test_what_cannot_be_published_is_named_and_nothing_is_made(tmp_path):
    (tmp_path / "target").mkdir()
    for path in (tmp_path / "target", tmp_path / "missing" / "file"):
        with pytest.raises(OSError, match=path.name):
            publish(path, b"data")
    assert [path.name for path in tmp_path.rglob("*")] == ["target"]


OTHERS = [
    ".draft.tmp-00c0ffee",
    ".hidden",
    ".manifest.csv.tmp-0123abcd.bak",
    "manifest.csv",
    "manifest.csv.tmp-0123abcd",
    "other/.generated_000.png.tmp-0123abcd",
    "user_01/.draft.tmp-00c0ffee",
    "user_01/.notes.tmp",
    "user_01/deeper/.generated_000.png.tmp-0123abcd",
    "user_01/generated_000.png.tmp-0123abcd",
    "user_work/.generated_000.png.tmp-0123abcd",
]


def test_temporaries_of_a_killed_job_are_removed_and_nothing_else_is(tmp_path, monkeypatch):
    names = ["user_01/generated_000.png", "user_100/generated_1000.png", "manifest.csv", "run.json"]
    for name in [*names, *OTHERS]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for name in OTHERS:
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "replace", lambda source, destination: None)  # as if killed before the rename
    for name in names:
        publish(tmp_path / name, b"half")
    assert len(files_in(tmp_path)) == len(OTHERS) + 4
    monkeypatch.setattr(secrets, "token_hex", lambda size: "01" * size)
    publish(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):  # somebody else's is not written over
        publish(tmp_path / "file", b"second")
    remove_temporaries(tmp_path)
    assert sorted(files_in(tmp_path)) == sorted(OTHERS)


# File systems


def refusing(error_number):
    def refuse(*args):
        raise OSError(error_number, os.strerror(error_number))

    return refuse


@pytest.mark.parametrize("error_number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_without_sync_a_file_is_published_all_the_same(tmp_path, monkeypatch, error_number):
    monkeypatch.setattr(os, "fsync", refusing(error_number))
    check_file_system(tmp_path)
    publish(tmp_path / "file", b"data", sync=True)
    assert files_in(tmp_path) == {"file": b"data"}


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error_number", [errno.EPERM, errno.EXDEV, errno.EIO])
def test_a_file_system_that_cannot_publish_is_refused_and_left_empty(tmp_path, monkeypatch, call, error_number):
    monkeypatch.setattr(os, call, refusing(error_number))
    with pytest.raises(ValueError, match=re.escape(os.strerror(error_number))):
        check_file_system(tmp_path)
    assert files_in(tmp_path) == {}


def test_a_file_system_that_replaces_no_file_is_refused(tmp_path, monkeypatch):
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: refusing(errno.EPERM)() if new.exists() else real(old, new))
    with pytest.raises(ValueError, match="local disk"):
        check_file_system(tmp_path)
    assert files_in(tmp_path) == {}


def test_a_file_system_that_gives_back_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "read_file", lambda path, max_bytes: b"1")
    with pytest.raises(ValueError, match="it gave other bytes"):
        check_file_system(tmp_path)


def test_a_full_disk_is_no_fault_of_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        check_file_system(tmp_path)
