import csv
import hashlib
import io
import os
import random
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from userdiff.dataset.manifest import (
    MANIFEST_NAME,
    PartWriter,
    Recipe,
    find_finished,
    part_path,
    part_paths,
    read_all,
    write_manifest,
)
from userdiff.dataset.rows import COLUMNS, Row, read_rows

HEADER = "file_name,user_id,image_index,seed,num_inference_steps,conditioning,width,height,num_bytes,sha256"
RUN = "5d" * 32
RECIPE = Recipe(seed=42, num_inference_steps=20, conditioning="trained", run=RUN)


def seed_by_definition(user_id, image_index):
    digest = hashlib.blake2b(f"42:{user_id}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") + image_index) % 2**32


def text_by_definition(user_id, image_index):
    return {
        "user_id": str(user_id),
        "image_index": str(image_index),
        "seed": str(seed_by_definition(user_id, image_index)),
        "num_inference_steps": "20",
        "conditioning": "trained",
        "userdiff_run": RUN,
    }


def row_by_definition(user_id, image_index, data, size=(3, 2)):
    return Row(
        file_name=f"user_{user_id:02d}/generated_{image_index:03d}.png",
        user_id=user_id,
        image_index=image_index,
        seed=seed_by_definition(user_id, image_index),
        num_inference_steps=20,
        conditioning="trained",
        width=size[0],
        height=size[1],
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def png(text):
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        chunks.add_text(key, value)
    Image.new("RGB", (3, 2), "navy").save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def put(folder, user_id, image_index, data=None):
    """Lay an image into the folder, one that explains itself if nothing else is given; returns its row."""
    data = png(text_by_definition(user_id, image_index)) if data is None else data
    row = row_by_definition(user_id, image_index, data)
    path = folder / row.file_name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return row


def line(row):
    return ",".join(str(value) for value in row) + "\n"


def record(path, *rows):
    path.write_text(HEADER + "\n" + "".join(line(row) for row in rows))


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OPAQUE = b"bytes that no row can be made from, only a recorded one be true of"
ROWS = [row_by_definition(user_id, image_index, b"") for user_id, image_index in ((1, 0), (2, 7), (31, 1000))]

ANY_ROWS = st.lists(
    st.builds(
        lambda user_id, image_index, **other: Row(
            file_name=f"user_{user_id:02d}/generated_{image_index:03d}.png",
            user_id=user_id,
            image_index=image_index,
            **other,
        ),
        user_id=st.integers(1, 10**6),
        image_index=st.integers(0, 10**5),
        seed=st.integers(0, 2**32 - 1),
        num_inference_steps=st.integers(1, 1000),
        conditioning=st.sampled_from(["trained", "random"]),
        width=st.integers(1, 4096),
        height=st.integers(1, 4096),
        num_bytes=st.integers(0, 10**8),
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    ),
    max_size=4,
)


# The format


def test_the_columns_are_those_of_the_contract():
    assert ",".join(COLUMNS) == HEADER


def test_a_recipe_describes_an_image_as_the_contract_says():
    data = b"0123456789"
    assert RECIPE.row(31, 4, (3, 2), data) == row_by_definition(31, 4, data)
    assert RECIPE.row(31, 4, (3, 2), data).seed == 2555016077
    assert RECIPE.text_chunks(31, 4) == text_by_definition(31, 4)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ANY_ROWS)
def test_rows_are_plain_csv_and_read_back(tmp_path, rows):
    write_manifest(tmp_path, rows)
    path = tmp_path / "manifest.csv"
    assert path.read_bytes().decode("ascii") == HEADER + "\n" + "".join(line(row) for row in rows)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [{name: str(getattr(row, name)) for name in COLUMNS} for row in rows]
    assert list(read_rows(path)) == rows


def test_a_missing_manifest_has_no_rows(tmp_path):
    assert list(read_rows(tmp_path / "manifest.csv")) == []


# Parts


@pytest.mark.parametrize(
    ("process_index", "name"),
    [(0, "manifest.part-00000.csv"), (12, "manifest.part-00012.csv"), (99999, "manifest.part-99999.csv")],
)
def test_parts_are_named_by_process(tmp_path, process_index, name):
    assert part_path(tmp_path, process_index) == tmp_path / name


def test_parts_are_found_in_order_and_nothing_else_is(tmp_path):
    for name in ("manifest.part-00010.csv", "manifest.part-00002.csv", "manifest.csv", "manifest.part-00003.csv.bak"):
        (tmp_path / name).touch()
    assert [path.name for path in part_paths(tmp_path)] == ["manifest.part-00002.csv", "manifest.part-00010.csv"]


def test_a_row_can_be_read_as_soon_as_it_is_appended(tmp_path):
    path = tmp_path / "part.csv"
    with PartWriter(path) as part:
        for count, row in enumerate(ROWS, start=1):
            part.append(row)
            assert list(read_rows(path)) == ROWS[:count]
    assert path.read_text() == HEADER + "\n" + "".join(line(row) for row in ROWS)


def test_a_part_begins_anew(tmp_path):
    record(tmp_path / "part.csv", *ROWS)
    with PartWriter(tmp_path / "part.csv") as part:
        part.append(ROWS[2])
    assert list(read_rows(tmp_path / "part.csv")) == [ROWS[2]]


class SlowFile:
    """A file that takes its time in the middle of a line."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        for piece in (text[:30], text[30:]):
            self.file.write(piece)
            time.sleep(0.0001)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_several_threads_append_whole_rows(tmp_path, monkeypatch):
    rows = [row_by_definition(user_id, index, b"") for user_id in range(1, 9) for index in range(20)]
    together = threading.Barrier(8)

    def append_all(mine):
        together.wait(10)
        for row in mine:
            part.append(row)

    with PartWriter(tmp_path / "part.csv") as part:
        monkeypatch.setattr(part, "_file", SlowFile(part._file))
        threads = [threading.Thread(target=append_all, args=(rows[first : first + 20],)) for first in range(0, 160, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    lines = (tmp_path / "part.csv").read_text().splitlines(keepends=True)
    assert lines[0] == HEADER + "\n"
    assert sorted(lines[1:]) == sorted(line(row) for row in rows)


# What is finished


def finished(folder, recipe=RECIPE):
    """What is finished where all records are believed: a manifest as it was published, the parts of this very run."""
    manifest = folder / MANIFEST_NAME
    sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None
    return list(find_finished(folder, recipe, sha256, believe_parts=True).rows)


def finished_rows(folder, *values, **options):
    return list(find_finished(folder, *values, **options).rows)


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.part-00000.csv", "manifest.part-00007.csv"])
def test_a_recorded_image_of_the_right_size_is_finished(tmp_path, name):
    row = put(tmp_path, 4, 2, OPAQUE)
    record(tmp_path / name, row)
    assert finished(tmp_path) == [row]


@pytest.mark.parametrize("name", ["manifest.txt", "manifest.part-00000.csv.bak", "user_04/manifest.csv"])
def test_records_elsewhere_do_not_count(tmp_path, name):
    row = put(tmp_path, 4, 2, OPAQUE)
    record(tmp_path / name, row)
    assert finished(tmp_path) == []


@pytest.mark.parametrize("data", [OPAQUE[:-1], OPAQUE + b"!", b""])
def test_a_recorded_image_of_another_size_is_not_finished(tmp_path, data):
    record(tmp_path / MANIFEST_NAME, put(tmp_path, 4, 2, OPAQUE))
    put(tmp_path, 4, 2, data)
    assert finished(tmp_path) == []


def test_a_recorded_image_that_is_missing_is_not_finished(tmp_path):
    rows = [put(tmp_path, 4, 2, OPAQUE), put(tmp_path, 4, 3, OPAQUE)]
    record(tmp_path / MANIFEST_NAME, *rows)
    (tmp_path / rows[0].file_name).unlink()
    assert finished(tmp_path) == [rows[1]]


EDITS = {
    "file_name": "user_04/generated_003.png",
    "user_id": 5,
    "image_index": 3,
    "seed": 1,
    "num_inference_steps": 21,
    "conditioning": "random",
    "num_bytes": len(OPAQUE) - 1,
}


@pytest.mark.parametrize(("name", "value"), EDITS.items())
def test_a_row_that_does_not_agree_with_the_plan_is_not_believed(tmp_path, name, value):
    row = put(tmp_path, 4, 2, OPAQUE)
    record(tmp_path / MANIFEST_NAME, row._replace(**{name: value}))
    assert finished(tmp_path) == []


@pytest.mark.parametrize(("name", "value"), EDITS.items())
def test_in_place_of_a_row_that_is_not_believed_the_image_speaks_for_itself(tmp_path, name, value):
    row = put(tmp_path, 4, 2)
    record(tmp_path / MANIFEST_NAME, row._replace(**{name: value}))
    assert finished(tmp_path) == [row]


@pytest.mark.parametrize("change", [{"seed": 43}, {"num_inference_steps": 21}, {"conditioning": "random"}])
def test_rows_of_another_recipe_are_not_believed(tmp_path, change):
    record(tmp_path / MANIFEST_NAME, put(tmp_path, 4, 2, OPAQUE))
    assert finished(tmp_path, replace(RECIPE, **change)) == []


def test_rows_given_twice_or_in_several_places_count_once(tmp_path):
    rows = [put(tmp_path, 4, 2, OPAQUE), put(tmp_path, 1, 0, OPAQUE)]
    record(tmp_path / MANIFEST_NAME, rows[0], rows[0], rows[1])
    record(tmp_path / "manifest.part-00000.csv", rows[0])
    assert finished(tmp_path) == [rows[1], rows[0]]


def test_an_unrecorded_image_that_explains_itself_is_adopted(tmp_path):
    row = put(tmp_path, 31, 4)
    assert finished(tmp_path) == [row]


@pytest.mark.parametrize("key", list(text_by_definition(4, 2)))
@pytest.mark.parametrize("value", ["1", "", None])
def test_an_unrecorded_image_of_another_origin_is_not_adopted(tmp_path, key, value):
    text = text_by_definition(4, 2)
    put(tmp_path, 4, 2, png({**text, key: value} if value is not None else {k: text[k] for k in text if k != key}))
    assert finished(tmp_path) == []


def test_an_image_under_the_name_of_another_is_not_adopted(tmp_path):
    put(tmp_path, 4, 2, png(text_by_definition(4, 3)))
    put(tmp_path, 5, 2, png(text_by_definition(4, 2)))
    assert finished(tmp_path) == []


@pytest.mark.parametrize("missing", [1, 4, 12, 16, 20, 60])
def test_a_truncated_image_is_not_adopted(tmp_path, missing):
    put(tmp_path, 4, 2, png(text_by_definition(4, 2))[:-missing])
    assert finished(tmp_path) == []


def test_an_image_in_other_pixels_than_its_checksum_says_is_not_adopted(tmp_path):
    data = png(text_by_definition(4, 2))
    at = data.index(b"IDAT") + 8
    put(tmp_path, 4, 2, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert finished(tmp_path) == []


def test_images_that_nobody_asks_for_any_more_stay_in_the_dataset(tmp_path):
    rows = [put(tmp_path, 99, 100_000, OPAQUE), put(tmp_path, 12345, 7)]
    record(tmp_path / MANIFEST_NAME, rows[0])
    assert finished(tmp_path) == rows


def test_what_is_no_image_of_a_job_is_passed_over(tmp_path):
    row = put(tmp_path, 4, 2)
    data = (tmp_path / row.file_name).read_bytes()
    for name in ("user_4/generated_002.png", "user_04/copy.png", "other/generated_002.png", "generated_002.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "user_04" / "generated_003.png").mkdir()
    assert finished(tmp_path) == [row]


def test_a_link_that_leads_nowhere_is_no_image(tmp_path):
    row = put(tmp_path, 4, 2)
    (tmp_path / "user_04" / "generated_003.png").symlink_to("moved away.png")
    assert finished(tmp_path) == [row]


UNBELIEVED = pytest.mark.parametrize("name", ["manifest.csv", "manifest.part-00000.csv"])


@UNBELIEVED
def test_a_claim_is_believed_of_a_file_with_the_hash_it_names(tmp_path, name):
    data = png({"Software": "no word of a run, so only the row can vouch for it"})
    row = put(tmp_path, 4, 2, data)
    record(tmp_path / name, row)
    assert finished_rows(tmp_path, RECIPE) == [row]


@UNBELIEVED
def test_a_file_of_the_right_size_full_of_zeros_is_not_what_an_interrupted_run_claims(tmp_path, name):
    row = put(tmp_path, 4, 2)
    record(tmp_path / name, row)
    (tmp_path / row.file_name).write_bytes(bytes(row.num_bytes))
    assert finished_rows(tmp_path, RECIPE) == []
    assert finished(tmp_path) == [row]  # what size alone would say


@pytest.mark.parametrize("change", [{"width": 2}, {"height": 33}, {"sha256": "0" * 64}])
@UNBELIEVED
def test_a_damaged_claim_is_put_right_by_the_image(tmp_path, name, change):
    row = put(tmp_path, 4, 2)
    record(tmp_path / name, row._replace(**change))
    assert finished_rows(tmp_path, RECIPE) == [row]


def test_a_manifest_of_another_hash_than_published_is_not_believed(tmp_path):
    row = put(tmp_path, 4, 2)
    record(tmp_path / MANIFEST_NAME, row)
    published = hashlib.sha256((tmp_path / MANIFEST_NAME).read_bytes()).hexdigest()
    record(tmp_path / MANIFEST_NAME, row._replace(width=2))
    assert finished_rows(tmp_path, RECIPE, published) == [row]


def test_the_good_one_of_two_claims_counts(tmp_path):
    row = put(tmp_path, 4, 2, png({}))
    record(tmp_path / "manifest.part-00000.csv", row._replace(sha256="0" * 64), row, row._replace(width=2))
    assert finished_rows(tmp_path, RECIPE) == [row]


def test_what_is_read_is_shown_and_what_is_believed_is_not_read(tmp_path):
    believed, claimed = put(tmp_path, 4, 2, OPAQUE), put(tmp_path, 4, 3)
    published = write_manifest(tmp_path, [believed])
    record(tmp_path / "manifest.part-00000.csv", claimed)
    shown = []

    def track(rows, total):
        shown.append(total)
        return rows

    assert finished_rows(tmp_path, RECIPE, published, track=track) == [believed, claimed]
    assert shown == [1]


def test_whoever_stops_listening_waits_for_no_more_than_a_slice():
    read = []
    for _ in read_all(read.append, range(100_000)):
        break
    assert len(read) <= 2000


def test_an_empty_folder_holds_nothing_finished(tmp_path):
    assert finished(tmp_path) == []


# Merging


def test_finished_rows_are_sorted_as_numbers(tmp_path):
    items = [(1000, 0), (100, 2), (99, 1), (2, 1000), (2, 999), (10, 0), (2, 0)]
    rows = {item: put(tmp_path, *item, OPAQUE) for item in items}
    record(tmp_path / "manifest.part-00000.csv", *rows.values())
    write_manifest(tmp_path, finished(tmp_path))
    assert list(read_rows(tmp_path / MANIFEST_NAME)) == [rows[item] for item in sorted(items)]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_the_manifest_is_the_same_whoever_did_what(tmp_path, num_processes):
    rows = [put(tmp_path, user_id, index, OPAQUE) for user_id in (1, 2, 11) for index in range(5)]
    shuffled = random.Random(num_processes).sample(rows, len(rows))
    for process_index in range(num_processes):
        with PartWriter(part_path(tmp_path, process_index)) as part:
            for row in shuffled[process_index::num_processes]:
                part.append(row)
    write_manifest(tmp_path, finished(tmp_path))
    assert (tmp_path / "manifest.csv").read_text() == HEADER + "\n" + "".join(line(row) for row in rows)
    assert not list(tmp_path.glob("manifest.part-*"))


def test_merging_again_changes_nothing(tmp_path):
    rows = [put(tmp_path, 1, 0, OPAQUE), put(tmp_path, 1, 1)]
    record(tmp_path / "manifest.part-00000.csv", rows[0])
    write_manifest(tmp_path, finished(tmp_path))
    once = files_in(tmp_path)
    write_manifest(tmp_path, finished(tmp_path))
    assert files_in(tmp_path) == once


def test_merging_touches_the_manifest_and_its_parts_alone(tmp_path):
    put(tmp_path, 1, 0)
    for name in ("run.json", "preview.html", "notes.csv", "manifest.csv.bak", "manifest.part-00000.csv.bak"):
        (tmp_path / name).write_text(f"content of {name}")
    others = files_in(tmp_path)
    record(tmp_path / MANIFEST_NAME)
    record(tmp_path / "manifest.part-00000.csv")
    write_manifest(tmp_path, ROWS)
    found = files_in(tmp_path)
    assert found.pop("manifest.csv").decode() == HEADER + "\n" + "".join(line(row) for row in ROWS)
    assert found == others


def test_a_file_that_only_looks_like_a_part_is_left_alone(tmp_path):
    for name in ("manifest.part-backup.csv", "manifest.part-0.csv"):
        (tmp_path / name).write_text("mine")
    write_manifest(tmp_path, ROWS)
    assert set(files_in(tmp_path)) == {"manifest.csv", "manifest.part-backup.csv", "manifest.part-0.csv"}


def test_parts_are_there_until_the_manifest_is(tmp_path, monkeypatch):
    record(tmp_path / MANIFEST_NAME, ROWS[0])
    record(tmp_path / "manifest.part-00000.csv", ROWS[1])
    seen = []

    def rename(source, destination):
        seen.append({path.name for path in tmp_path.glob("manifest.*")})
        source.rename(destination)

    monkeypatch.setattr(os, "replace", rename)
    write_manifest(tmp_path, ROWS[:2])
    assert seen == [{"manifest.csv", "manifest.part-00000.csv"}]
    assert set(files_in(tmp_path)) == {"manifest.csv"}


def test_a_merge_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    record(tmp_path / MANIFEST_NAME, ROWS[0])
    record(tmp_path / "manifest.part-00000.csv", ROWS[1])
    before = files_in(tmp_path)

    def fail(source, destination):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(tmp_path, ROWS[:2])
    assert files_in(tmp_path) == before
