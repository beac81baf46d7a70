"""The row format, and rows as arrays, against plain lists of them."""

import gc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.test_manifest import ANY_ROWS, HEADER, ROWS, line
from userdiff.dataset.rows import BELIEVED, CLAIMED, COLUMNS, FINISHED, Table, read_rows


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One file, written anew by every example of a property."""
    return tmp_path_factory.mktemp("manifest") / "scratch.csv"


# Lines


@settings(max_examples=150, deadline=None)
@given(rows=ANY_ROWS, data=st.data())
def test_a_truncated_manifest_gives_its_whole_rows_and_no_others(scratch, rows, data):
    lines = [HEADER + "\n", *(line(row) for row in rows)]
    content = "".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    scratch.write_text(content[:cut])
    whole = [row for number, row in enumerate(rows) if len("".join(lines[: number + 2])) <= cut]
    assert list(read_rows(scratch)) == whole


MANGLING = st.lists(
    st.tuples(
        st.integers(0, 500), st.integers(0, 12), st.binary(max_size=4) | st.sampled_from([b"\n", b"\r", b",", b'"'])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(damage=MANGLING)
@example(damage=[(0, 500, b"\xff\xfe\x00")])
@example(damage=[(100, 0, b"9" * 5000)])
def test_of_a_mangled_manifest_only_whole_lines_are_read(scratch, damage):
    content = (HEADER + "\n" + "".join(line(row) for row in ROWS)).encode()
    for start, length, other in damage:
        content = content[:start] + other + content[start + length :]
    scratch.write_bytes(content)
    as_text = content.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    for row in read_rows(scratch):
        assert line(row) in as_text
        assert row.conditioning in {"trained", "random"}


def test_a_file_of_nothing_but_rows_with_numbers_too_large_gives_none(scratch):
    scratch.write_text(HEADER + "\n" + 3 * with_field("seed", 2**32))
    assert list(read_rows(scratch)) == []
    table = Table()
    table.read(scratch)
    assert len(table) == 0


def with_field(name, value):
    return ",".join(str(value) if column == name else str(getattr(ROWS[1], column)) for column in COLUMNS) + "\n"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param("\n", id="empty"),
        pytest.param(HEADER + "\n", id="a second header"),
        pytest.param(line(ROWS[1])[:-1], id="run into the next line"),
        pytest.param("," + line(ROWS[1]), id="a column too many"),
        pytest.param(line(ROWS[1]).partition(",")[2], id="a column too few"),
        pytest.param(line(ROWS[1]).replace(",", ";"), id="other separators"),
        pytest.param(line(ROWS[1]).replace(",", ", "), id="spaces"),
        pytest.param('"' + line(ROWS[1]).replace(",", '",', 1), id="quotes"),
        pytest.param(with_field("user_id", 0), id="user 0"),
        pytest.param(with_field("user_id", "02"), id="a padded id"),
        pytest.param(with_field("user_id", "\u0662"), id="a digit of another script"),
        pytest.param(with_field("user_id", ""), id="no id"),
        pytest.param(with_field("image_index", -1), id="a negative index"),
        pytest.param(with_field("image_index", "1_0"), id="an underscore"),
        pytest.param(with_field("seed", "1.0"), id="a fraction"),
        pytest.param(with_field("seed", "+1"), id="a sign"),
        pytest.param(with_field("seed", "nan"), id="not a number"),
        pytest.param(with_field("num_bytes", 5000 * "9"), id="a number nobody can read"),
        pytest.param(with_field("conditioning", "Trained"), id="an unknown conditioning"),
        pytest.param(with_field("sha256", 63 * "a"), id="a short hash"),
        pytest.param(with_field("sha256", 65 * "a"), id="a long hash"),
        pytest.param("\0" * 200 + "\n", id="a hole"),
    ],
)
def test_a_line_that_is_no_row_is_passed_over(tmp_path, bad):
    path = tmp_path / "manifest.csv"
    path.write_text(HEADER + "\n" + line(ROWS[0]) + bad + ("" if bad.endswith("\n") else line(ROWS[1])) + line(ROWS[2]))
    assert list(read_rows(path)) == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize("is_collecting", [True, False])
def test_reading_leaves_the_garbage_collector_as_it_was(is_collecting, tmp_path):
    (tmp_path / "manifest.csv").write_text(HEADER + "\n" + line(ROWS[0]))
    rows = read_rows(tmp_path / "manifest.csv")
    try:
        (gc.enable if is_collecting else gc.disable)()
        assert next(rows) == ROWS[0]
        assert gc.isenabled() == is_collecting  # between two pieces too
        assert list(rows) == []
        assert gc.isenabled() == is_collecting
    finally:
        gc.enable()


def test_line_ends_of_another_system_are_read(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_bytes((HEADER + "\n" + "".join(line(row) for row in ROWS)).replace("\n", "\r\n").encode())
    assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),
        ("num_inference_steps", 2**16),
        ("width", 2**16),
        ("height", 2**16),
        ("num_bytes", 2**32),
        ("seed", 10**10),
    ],
)
def test_a_number_that_no_image_has_makes_no_row(tmp_path, name, value):
    path = tmp_path / "manifest.csv"
    path.write_text(HEADER + "\n" + with_field(name, value) + with_field(name, value - 1) + line(ROWS[2]))
    assert list(read_rows(path)) == [ROWS[1]._replace(**{name: value - 1}), ROWS[2]][value == 10**10 :]


@pytest.mark.parametrize(
    "name", ["user_02/generated_008.png", "user_2/generated_007.png", "user_002/generated_007.png"]
)
def test_a_row_under_the_name_of_another_image_is_none(tmp_path, name):
    path = tmp_path / "manifest.csv"
    path.write_text(HEADER + "\n" + with_field("file_name", name) + line(ROWS[2]))
    assert list(read_rows(path)) == [ROWS[2]]


# Tables


def item(row):
    return row.user_id, row.image_index


SOME_ROWS = st.lists(  # of few images, so that several are of one
    st.tuples(
        ANY_ROWS.filter(bool).map(lambda rows: rows[0]),
        st.integers(1, 3),
        st.integers(0, 4),
        st.sampled_from([CLAIMED, BELIEVED, FINISHED]),
    ).map(
        lambda drawn: (
            drawn[0]._replace(
                file_name=f"user_{drawn[1]:02d}/generated_{drawn[2]:03d}.png",
                user_id=drawn[1],
                image_index=drawn[2],
                width=1 + drawn[2] // 3,
            ),
            drawn[3],
        )
    ),
    max_size=12,
)


def table_of(rows, parts=1):
    """Put rows into a table, a few at a time."""
    table = Table()
    for part in range(parts):
        for standing in (CLAIMED, BELIEVED, FINISHED):
            of_part = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
            table.extend((row for row, its_standing in of_part if its_standing == standing), standing)
        len(table)  # settles what there is so far
    return table


@settings(max_examples=150, deadline=None)
@given(rows=SOME_ROWS, parts=st.integers(1, 3))
def test_a_table_holds_its_rows_by_user_and_image(rows, parts):
    table = table_of(rows, parts)
    plain = sorted(((row, standing) for row, standing in rows), key=lambda pair: (item(pair[0]), pair[1]))
    assert [item(row) for row in table] == [item(row) for row, _ in plain]
    assert sorted(table) == sorted(row for row, _ in plain)
    assert len(table) == len(rows)
    assert table.user_ids == sorted({row.user_id for row, _ in rows})
    assert table.num_bytes() == sum(row.num_bytes for row, _ in rows)
    assert table.sizes() == {(row.width, row.height) for row, _ in rows}
    assert {u: indices.tolist() for u, indices in table.image_indices().items()} == {
        user_id: [row.image_index for row, _ in plain if row.user_id == user_id] for user_id in table.user_ids
    }
    for user_id in range(1, 4):
        for index in range(5):
            assert sorted(table.of_image(user_id, index)) == sorted(r for r, _ in rows if item(r) == (user_id, index))
        assert [item(row) for row in table.of_user(user_id, 2)] == [
            item(row) for row, _ in plain if row.user_id == user_id
        ][:2]


@settings(max_examples=150, deadline=None)
@given(rows=SOME_ROWS, parts=st.integers(1, 3))
def test_the_best_row_of_an_image_is_the_last_of_the_highest_standing(rows, parts):
    best = {}
    for row, standing in rows:
        if standing >= best.get(item(row), (0, None))[0]:
            best[item(row)] = standing, row
    table = table_of(rows, parts).keep_best()
    assert list(table) == [best[key][1] for key in sorted(best)]
    for limit in (0, 10**4, 10**8):
        expected = [key for key in sorted(best) if best[key][1].num_bytes <= limit and best[key][1].width == 2]
        heights = {row.height for _, row in best.values()}
        assert sorted(key for height in heights for key in table.smaller_than(2, height, limit)) == expected
    table.remove([(1, 0), (2, 4), (9, 9)])
    assert list(table) == [best[key][1] for key in sorted(best) if key not in {(1, 0), (2, 4)}]


def test_tables_are_joined_as_they_are():
    table, other = Table(ROWS[:2], CLAIMED), Table([ROWS[0]._replace(width=9), ROWS[2]])
    table.join(other)
    assert list(table.keep_best()) == [ROWS[0]._replace(width=9), *ROWS[1:]]


def test_an_empty_table_is_falsy_and_has_nobody():
    table = Table()
    assert not table
    assert (list(table), table.user_ids, table.of_user(1), table.of_image(1, 0)) == ([], [], [], [])
    assert (table.num_bytes(), table.sizes(), table.image_indices()) == (0, set(), {})
