import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.definitions import name_of
from userdiff.dataset import layout

FOREIGN_NAMES = [
    "user_1/generated_000.png",
    "user_001/generated_000.png",
    "user_xx/generated_000.png",
    "user_-1/generated_000.png",
    "user_\u0661\u0662/generated_000.png",
    "user_01/generated_00.png",
    "user_01/generated_0000.png",
    "user_01/generated_-01.png",
    "user_01/generated_4294967296.png",
    "user_01/generated_000.jpg",
    "user_01/generated_000.PNG",
    "user_01/generated_000.png.bak",
    "user_01/.generated_000.png.tmp-0123abcd",
    "user_01/copy of generated_000.png",
    "User_01/generated_000.png",
    "backup/generated_000.png",
    "generated_000.png",
]


@pytest.mark.parametrize(
    ("item", "name"), [((1, 0), "user_01/generated_000.png"), ((100, 1000), "user_100/generated_1000.png")]
)
def test_images_are_named_as_the_contract_says(item, name):
    assert layout.file_name(*item) == name == name_of(*item)


@given(st.integers(1, 2**63 - 1) | st.integers(1, 200), st.integers(0, 2**32 - 1) | st.integers(0, 2000))
def test_names_read_back(user_id, image_index):
    assert layout.parse_file_name(layout.file_name(user_id, image_index)) == (user_id, image_index)


@pytest.mark.parametrize("name", [*FOREIGN_NAMES, "a/user_01/generated_000.png", "user_01/generated_000.png\n", ""])
def test_foreign_names_are_no_images(name):
    assert layout.parse_file_name(name) is None


def test_parts_are_named_by_process_and_found_in_order_and_nothing_else_is(tmp_path):
    indices = [*range(100, 0, -1), 99999]
    for index in indices:
        layout.part_path(tmp_path, index).touch()
    for name in ("manifest.csv", "manifest.part-00003.csv.bak", "manifest.part-backup.csv", "manifest.part-0.csv"):
        (tmp_path / name).touch()
    names = [path.name for path in layout.part_paths(tmp_path)]
    assert names == [f"manifest.part-{index:05d}.csv" for index in sorted(indices)]


def test_new_names_are_new_and_known_again(tmp_path):
    temporaries = {layout.temporary_path(tmp_path / "run.json") for _ in range(20)}
    assert len(temporaries) == 20
    assert all(path.parent == tmp_path and layout.is_temporary(path.name) for path in temporaries)
    for name in (
        ".hidden",
        ".tmp-0123abcd",
        ".run.json.tmp-0123ABCD",
        ".run.json.tmp-0123abc",
        "run.json.tmp-0123abcd",
    ):
        assert not layout.is_temporary(name)
    mark = layout.shared_mark_path(tmp_path)
    mark.touch()
    (tmp_path / ".userdiff.shared-notes").touch()
    assert layout.shared_mark_paths(tmp_path) == [mark]
