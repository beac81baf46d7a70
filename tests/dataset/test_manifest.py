import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tests.definitions import csv_of, fields_of, files_in, line_of, sha256
from userdiff.dataset.layout import part_path, part_paths
from userdiff.dataset.manifest import (
    PartWriter,
    is_manifest,
    manifest_sha256,
    num_part_rows,
    recorded_rows,
    write_manifest,
)
from userdiff.dataset.rows import Row, Trust, read_lines

ROWS = [Row(*fields_of(user_id, image_index, b"")) for user_id, image_index in ((1, 0), (2, 7), (31, 1000))]


def test_a_part_begins_anew_and_its_rows_can_be_read_as_they_are_appended(tmp_path):
    path = part_path(tmp_path, 0)
    path.write_text(csv_of(*ROWS))
    with PartWriter(path) as part:
        for count, row in enumerate(ROWS, start=1):
            part.append(row)
            assert list(read_lines(path)) == ROWS[:count]
            assert num_part_rows(tmp_path) == count
    assert path.read_text() == csv_of(*ROWS)


def test_several_threads_append_whole_rows(tmp_path, monkeypatch):
    rows = [Row(*fields_of(user_id, index, b"")) for user_id in range(1, 9) for index in range(20)]
    together = threading.Barrier(8)

    def append_all(mine):
        together.wait(10)
        for row in mine:
            part.append(row)

    with PartWriter(tmp_path / "part.csv") as part, ThreadPoolExecutor(8) as threads:
        write = part._file.write

        def write_slowly(text):  # and let others come in the middle of a line
            for piece in (text[:30], text[30:]):
                write(piece)
                time.sleep(0.0001)

        monkeypatch.setattr(
            part, "_file", SimpleNamespace(write=write_slowly, flush=part._file.flush, close=part._file.close)
        )
        list(threads.map(append_all, [rows[first : first + 20] for first in range(0, 160, 20)]))
    lines = (tmp_path / "part.csv").read_text().splitlines(keepends=True)
    assert sorted(lines[1:]) == sorted(line_of(row) for row in rows)


def test_what_is_recorded_has_the_trust_of_its_source(tmp_path):
    (tmp_path / "manifest.csv").write_text(csv_of(ROWS[0]))
    part_path(tmp_path, 3).write_text(csv_of(ROWS[1], ROWS[2]))
    for trusts in ((False, False), (True, False), (False, True)):
        rows = recorded_rows(
            tmp_path, trust_manifest=trusts[0], trusted_parts=part_paths(tmp_path) if trusts[1] else ()
        )
        assert list(rows) == ROWS
        of_manifest = Trust.RECORDED if trusts[0] else Trust.CLAIMED
        of_parts = Trust.RECORDED if trusts[1] else Trust.NOTED
        expected = [of_manifest, of_parts, of_parts]
        assert rows.array["trust"].tolist() == expected


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_the_manifest_is_the_same_whoever_did_what(tmp_path, num_processes):
    items = [(user_id, index) for user_id in (2, 10, 100) for index in (0, 2, 999, 1000)]
    rows = [Row(*fields_of(*item, b"")) for item in items]
    shuffled = random.Random(num_processes).sample(rows, len(rows))
    for process_index in range(num_processes):
        with PartWriter(part_path(tmp_path, process_index)) as part:
            for row in shuffled[process_index::num_processes]:
                part.append(row)
    for name in ("run.json", "manifest.csv.bak", "manifest.part-0.csv"):
        (tmp_path / name).write_text(f"content of {name}")
    for _ in range(2):  # again changes nothing
        published = write_manifest(tmp_path, recorded_rows(tmp_path).keep_best())
        assert (tmp_path / "manifest.csv").read_text() == csv_of(*rows)
        assert published == manifest_sha256(tmp_path) == sha256(csv_of(*rows).encode())
        assert set(files_in(tmp_path)) == {"manifest.csv", "run.json", "manifest.csv.bak", "manifest.part-0.csv"}


def test_parts_are_there_until_the_manifest_is(tmp_path, monkeypatch):
    (tmp_path / "manifest.csv").write_text(csv_of(ROWS[0]))
    part_path(tmp_path, 0).write_text(csv_of(ROWS[1]))
    before = files_in(tmp_path)

    def fail(source, destination):
        assert {path.name for path in tmp_path.glob("manifest.*")} == set(before)
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_manifest(tmp_path, ROWS[:2])
    assert files_in(tmp_path) == before
    write_manifest(tmp_path, ROWS[:2])
    assert set(files_in(tmp_path)) == {"manifest.csv"}


def test_a_manifest_is_told_by_its_first_line(tmp_path):
    for content, expected in ((csv_of(), True), ("", True), ("name,label\n", False)):
        (tmp_path / "labels.csv").write_text(content)
        assert is_manifest(tmp_path / "labels.csv") == expected
    assert manifest_sha256(tmp_path) is None
