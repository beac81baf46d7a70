import os
import secrets
import stat

import pytest

from tests.definitions import files_in
from userdiff.dataset.atomic import publish, remove_temporaries


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
    ".hidden",
    ".manifest.csv.tmp-0123abcd.bak",
    "manifest.csv",
    "manifest.csv.tmp-0123abcd",
    "other/.generated_000.png.tmp-0123abcd",
    "user_01/.notes.tmp",
    "user_01/deeper/.generated_000.png.tmp-0123abcd",
    "user_01/generated_000.png.tmp-0123abcd",
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
