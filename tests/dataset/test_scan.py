"""Which images are finished, against the contract: a trusted row and its file's size, or an image that proves itself."""

import shutil
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataset.test_layout import FOREIGN_NAMES
from tests.definitions import RUN, chunks_of, csv_of, fields_of, png_of, sha256
from userdiff.dataset.layout import part_paths
from userdiff.dataset.manifest import write_manifest
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import Row
from userdiff.dataset.scan import find_finished, read_all, user_folders

RECIPE = Recipe(seed=42, num_inference_steps=20, conditioning="trained", run=RUN)
OPAQUE = b"bytes that no row can be made from, only a recorded one be true of"
PART = "manifest.part-00000.csv"


def put(folder, user_id, image_index, data=None):
    """Lay an image into the folder, one that explains itself if nothing else is given; returns its row."""
    data = png_of(chunks_of(user_id, image_index)) if data is None else data
    row = Row(*fields_of(user_id, image_index, data))
    path = folder / row.file_name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return row


def record(path, *rows):
    path.write_text(csv_of(*rows))


def finished(folder, recipe=RECIPE, *, is_trusted=True):
    """Return what is finished; trusted: the manifest is as it was published, the parts are of this very run."""
    manifest = folder / "manifest.csv"
    published = sha256(manifest.read_bytes()) if manifest.exists() and is_trusted else None
    return list(find_finished(folder, recipe, published, trusted_parts=part_paths(folder) if is_trusted else ()).rows)


def test_a_recipe_describes_an_image_as_the_contract_says():
    assert RECIPE.row(31, 4, (3, 2), b"0123456789") == Row(*fields_of(31, 4, b"0123456789"))
    assert RECIPE.row(31, 4, (3, 2), b"").seed == 2555016077
    assert RECIPE.text_chunks(31, 4) == chunks_of(31, 4)


def test_only_images_of_a_job_are_found(tmp_path):
    names = ["user_01/generated_000.png", "user_01/generated_1000.png", "user_100/generated_002.png"]
    nested = ["user_01/user_01/generated_000.png", "old/user_01/generated_000.png"]
    for name in [*names, *nested, *FOREIGN_NAMES, "manifest.csv"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "user_02").touch()  # a file where a folder would be
    (tmp_path / "user_03").mkdir()
    (tmp_path / "user_01" / "generated_003.png").symlink_to("moved away.png")
    (tmp_path / "user_01" / "generated_004.png").mkdir()
    folders = {folder.name: folder for folder in user_folders(tmp_path)}
    found = {folder.user_id: folder.image_indices.tolist() for folder in folders.values() if len(folder.image_indices)}
    assert found == {1: [0, 1000], 100: [2]}
    foreign = {name.partition("/")[2] for name in FOREIGN_NAMES if name.startswith("user_01/")}
    foreign |= {"user_01", "generated_003.png", "generated_004.png"}
    assert {*folders["user_01"].foreign} == foreign - {".generated_000.png.tmp-0123abcd"}
    assert (folders["user_001"].user_id, folders["user_001"].foreign) == (-1, ["generated_000.png"])


# A row and its file


@pytest.mark.parametrize("name", ["manifest.csv", PART, "manifest.part-00007.csv"])
def test_a_recorded_image_of_the_right_size_is_finished(tmp_path, name):
    row = put(tmp_path, 4, 2, OPAQUE)
    for elsewhere in ("manifest.txt", f"{PART}.bak", "user_04/manifest.csv"):
        record(tmp_path / elsewhere, row)
    assert finished(tmp_path) == []
    record(tmp_path / name, row, row)
    assert finished(tmp_path) == [row]
    for change in ({"seed": 43}, {"num_inference_steps": 21}, {"conditioning": "random"}):
        assert finished(tmp_path, replace(RECIPE, **change)) == []
    for data in (OPAQUE[:-1], OPAQUE + b"!", b""):
        put(tmp_path, 4, 2, data)
        assert finished(tmp_path) == []
    (tmp_path / row.file_name).unlink()
    assert finished(tmp_path) == []


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
def test_a_row_that_does_not_agree_is_not_trusted_and_the_image_may_speak_for_itself(tmp_path, name, value):
    for data, is_proof in ((OPAQUE, False), (None, True)):
        row = put(tmp_path, 4, 2, data)
        record(tmp_path / "manifest.csv", row._replace(**{name: value}))
        # what the record says of the file outweighs what the file says of itself
        assert finished(tmp_path) == [row] * (is_proof and name != "num_bytes")


# Images that prove themselves


def test_an_unrecorded_image_that_explains_itself_is_adopted_whoever_asks_for_it(tmp_path):
    rows = [put(tmp_path, 4, 2), put(tmp_path, 99, 100_000)]
    assert finished(tmp_path) == rows
    assert finished(tmp_path / "empty") == []


WHOLE = png_of(chunks_of(4, 2))
AT = WHOLE.index(b"IDAT") + 8
TEXTS = [{**chunks_of(4, 2), key: value} for key in chunks_of(4, 2) for value in ("1", "")]
TEXTS += [{key: value for key, value in chunks_of(4, 2).items() if key != missing} for missing in chunks_of(4, 2)]
CHANGED_PIXEL = WHOLE[:AT] + bytes([WHOLE[AT] ^ 1]) + WHOLE[AT + 1 :]


@pytest.mark.parametrize("data", [*map(png_of, [chunks_of(4, 3), *TEXTS]), WHOLE[:-1], WHOLE[:-20], CHANGED_PIXEL])
def test_an_image_that_is_not_whole_or_not_what_its_name_says_is_not_adopted(tmp_path, data):
    put(tmp_path, 4, 2, data)
    assert finished(tmp_path) == []


@pytest.mark.parametrize("name", ["manifest.csv", PART])
def test_a_claim_is_believed_of_a_file_with_the_hash_it_names(tmp_path, name):
    row = put(tmp_path, 4, 2, png_of({"Software": "no word of a run, so only the row can vouch for it"}))
    record(tmp_path / name, row._replace(sha256="0" * 64), row, row._replace(width=2))  # the good one of several
    assert finished(tmp_path, is_trusted=False) == [row]
    (tmp_path / row.file_name).write_bytes(bytes(row.num_bytes))  # of the right size, full of zeros
    assert finished(tmp_path, is_trusted=False) == []
    row = put(tmp_path, 4, 2)
    for change in ({"width": 2}, {"height": 33}, {"sha256": "0" * 64}):
        record(tmp_path / name, row._replace(**change))
        # a manifest that was edited is put right by the image; in a part it is the image that was
        assert finished(tmp_path, is_trusted=False) == [row] * (name == "manifest.csv")


def test_a_manifest_of_another_hash_than_published_is_not_trusted(tmp_path):
    row = put(tmp_path, 4, 2)
    published = write_manifest(tmp_path, [row])
    assert find_finished(tmp_path, RECIPE, published).has_manifest
    record(tmp_path / "manifest.csv", row._replace(width=2))
    found = find_finished(tmp_path, RECIPE, published)
    assert (list(found.rows), found.has_manifest) == ([row], False)


# What else is found


def test_lost_and_foreign_images_are_named(tmp_path):
    kept, gone, zeros, replaced = (put(tmp_path, 4, index) for index in range(4))
    (tmp_path / gone.file_name).unlink()
    (tmp_path / zeros.file_name).write_bytes(b"")
    (tmp_path / replaced.file_name).write_bytes(b"\xff\xd8\xff a photo")
    record(tmp_path / "manifest.csv", kept, gone, zeros, replaced, put(tmp_path, 5, 0)._replace(seed=1))
    put(tmp_path, 4, 7, b"\xff\xd8\xff a photo")
    put(tmp_path, 4, 8, png_of(chunks_of(4, 8, run="ab" * 32)))
    put(tmp_path, 4, 9, png_of(chunks_of(4, 9))[:30])  # what is left of a job's
    (tmp_path / "user_04" / "notes.txt").touch()
    found = find_finished(tmp_path, RECIPE)
    assert [row.file_name for row in found.rows] == [kept.file_name, "user_05/generated_000.png"]
    assert found.lost == [(4, 1), (4, 2), (4, 3)]
    assert found.foreign_images == [(4, 7), (4, 8)]
    assert found.foreign_files == ["user_04/notes.txt"]


def test_what_is_read_is_shown_and_what_is_trusted_is_not_read(tmp_path):
    trusted, claimed = put(tmp_path, 4, 2, OPAQUE), put(tmp_path, 4, 3)
    published = write_manifest(tmp_path, [trusted])
    record(tmp_path / PART, claimed)
    shown = []

    def track(items, total):
        shown.append(total)
        return items

    assert list(find_finished(tmp_path, RECIPE, published, track=track).rows) == [trusted, claimed]
    assert shown == [1]


def test_whoever_stops_iterating_waits_for_no_more_than_a_slice():
    read = []
    for _ in read_all(read.append, range(100_000)):
        break
    assert len(read) <= 2000


# Anything at all, against the definition


ITEMS = [(user_id, image_index) for user_id in (1, 2, 30) for image_index in range(3)]
FILES = {
    "whole": lambda item: png_of(chunks_of(*item)),
    "opaque": lambda item: b"opaque" + bytes(item),
    "emptied": lambda item: b"",
    "cut": lambda item: png_of(chunks_of(*item))[:-9],
    "foreign": lambda item: png_of({"title": "mine"}),
    "of another run": lambda item: png_of(chunks_of(*item, run="ab" * 32)),
}


@cache
def file_of(item, kind):
    return FILES[kind](item)


CLAIMS = st.lists(st.tuples(st.sampled_from(ITEMS), st.sampled_from(list(FILES)), st.booleans()), max_size=8)


def expected_row(data, trusted, claimed):
    """By the contract: of trusted rows the last counts, by size; of others any, by hash."""
    if trusted and trusted[-1].num_bytes == len(data):
        return trusted[-1]
    is_png = data[:8] == b"\x89PNG\r\n\x1a\n"
    for row in claimed:
        if is_png and row.sha256 == sha256(data):
            return row
    return None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.sampled_from(ITEMS), st.sampled_from(list(FILES))),
    manifest=CLAIMS,
    part=CLAIMS,
    is_trusted=st.booleans(),
)
def test_whatever_lies_there_counts_as_the_contract_says(tmp_path, files, manifest, part, is_trusted):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    data_of = {item: file_of(item, kind) for item, kind in files.items()}
    for item, data in data_of.items():
        put(tmp_path, *item, data)
    claims = {
        name: [
            Row(*fields_of(*item, file_of(item, kind)))._replace(**({} if agrees else {"seed": 1}))
            for item, kind, agrees in rows
        ]
        for name, rows in (("manifest.csv", manifest), (PART, part))
    }
    for name, rows in claims.items():
        record(tmp_path / name, *rows)
    expected = []
    for item in ITEMS:
        of_item = {name: [row for row in rows if row[1:3] == item] for name, rows in claims.items()}
        trusted = of_item["manifest.csv"] if is_trusted else []
        claimed = of_item[PART] + ([] if is_trusted else of_item["manifest.csv"])
        # a row that does not agree vouches for nothing, but as the last of the trusted ones it counts
        trusted = [] if trusted and trusted[-1].seed == 1 else trusted
        noted = [*of_item[PART], *(of_item["manifest.csv"] if is_trusted else [])]
        recorded = [row for row in noted if row.seed != 1]
        agreeing = recorded or [row for row in claimed if row.seed != 1]
        row = expected_row(data_of[item], trusted, agreeing) if item in data_of else None
        # an image may speak for itself, but not against the record
        if row is None and files.get(item) == "whole" and not recorded:
            row = Row(*fields_of(*item, data_of[item]))
        expected += [row] if row else []
    published = sha256((tmp_path / "manifest.csv").read_bytes()) if is_trusted else None
    assert list(find_finished(tmp_path, RECIPE, published).rows) == expected
