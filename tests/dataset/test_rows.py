"""The row format, and rows as one array, against plain lists of them."""

import csv

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.definitions import HEADER, csv_of, fields_of, line_of, name_of
from userdiff.dataset.rows import COLUMNS, Row, Rows, Trust, as_rows, read_lines
from userdiff.dataset.rows import HEADER as OUR_HEADER

ROWS = [Row(*fields_of(user_id, image_index, b"")) for user_id, image_index in ((1, 0), (2, 7), (31, 1000))]


ANY_USER, ANY_INDEX = st.integers(1, 10**6), st.integers(0, 10**5)


@st.composite
def any_row(draw, user_ids=ANY_USER, image_indices=ANY_INDEX):
    user_id, image_index = draw(user_ids), draw(image_indices)
    numbers = [
        draw(st.integers(low, high)) for low, high in ((0, 2**32 - 1), (1, 1000), (1, 4096), (1, 4096), (0, 10**8))
    ]
    seed, steps, width, height, num_bytes = numbers
    conditioning = draw(st.sampled_from(["trained", "random"]))
    sha256 = draw(st.binary(min_size=32, max_size=32)).hex()
    return Row(
        name_of(user_id, image_index), user_id, image_index, seed, steps, conditioning, width, height, num_bytes, sha256
    )


ANY_ROWS = st.lists(any_row(), max_size=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One file, written anew by every example of a property."""
    return tmp_path_factory.mktemp("manifest") / "scratch.csv"


# Lines


@settings(max_examples=50, deadline=None)
@given(rows=ANY_ROWS)
def test_rows_are_plain_csv_and_read_back(scratch, rows):
    assert OUR_HEADER == HEADER + "\n"
    scratch.write_text(OUR_HEADER + "".join(row.line for row in rows))
    assert scratch.read_text() == csv_of(*rows)
    with scratch.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(getattr(row, name)) for name in COLUMNS} for row in rows]
    assert list(read_lines(scratch)) == rows


def test_a_missing_manifest_has_no_rows(tmp_path):
    assert list(read_lines(tmp_path / "manifest.csv")) == []


@settings(max_examples=150, deadline=None)
@given(rows=ANY_ROWS, data=st.data())
def test_a_truncated_manifest_gives_its_whole_rows_and_no_others(scratch, rows, data):
    content = csv_of(*rows)
    cut = data.draw(st.integers(0, len(content)))
    scratch.write_text(content[:cut])
    assert list(read_lines(scratch)) == [
        row for number, row in enumerate(rows, 1) if len(csv_of(*rows[:number])) <= cut
    ]


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
    content = csv_of(*ROWS).encode()
    for start, length, other in damage:
        content = content[:start] + other + content[start + length :]
    scratch.write_bytes(content)
    as_text = content.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    for row in read_lines(scratch):
        assert line_of(row) in as_text
        assert row.conditioning in {"trained", "random"}


def with_field(name, value):
    return line_of(tuple(value if column == name else getattr(ROWS[1], column) for column in COLUMNS))


NO_ROWS = {
    "empty": "\n",
    "a second header": HEADER + "\n",
    "run into the next line": line_of(ROWS[1])[:-1],
    "a column too many": "," + line_of(ROWS[1]),
    "a column too few": line_of(ROWS[1]).partition(",")[2],
    "other separators": line_of(ROWS[1]).replace(",", ";"),
    "spaces": line_of(ROWS[1]).replace(",", ", "),
    "quotes": '"' + line_of(ROWS[1]).replace(",", '",', 1),
    "another image's name": with_field("file_name", "user_02/generated_008.png"),
    "a name of no job": with_field("file_name", "user_2/generated_007.png"),
    "user 0": with_field("user_id", 0),
    "a user beyond the last": with_field("user_id", 10**18),
    "a padded id": with_field("user_id", "02"),
    "a digit of another script": with_field("user_id", "\u0662"),
    "no id": with_field("user_id", ""),
    "a negative index": with_field("image_index", -1),
    "an underscore": with_field("image_index", "1_0"),
    "a negative seed": with_field("seed", -1),
    "a fraction": with_field("seed", "1.0"),
    "a sign": with_field("seed", "+1"),
    "not a number": with_field("seed", "nan"),
    "a number nobody can read": with_field("num_bytes", 5000 * "9"),
    "an unknown conditioning": with_field("conditioning", "Trained"),
    "a short hash": with_field("sha256", 62 * "a"),
    "a long hash": with_field("sha256", 66 * "a"),
    "a hash in capitals": with_field("sha256", 64 * "A"),
    "a hash with spaces": with_field("sha256", 32 * "aa "),
    "a hole": "\0" * 200 + "\n",
}


@pytest.mark.parametrize("bad", NO_ROWS.values(), ids=NO_ROWS)
def test_a_line_that_is_no_row_is_passed_over(tmp_path, bad):
    path = tmp_path / "manifest.csv"
    after = "" if bad.endswith("\n") else line_of(ROWS[1])
    path.write_text(csv_of(ROWS[0]) + bad + after + line_of(ROWS[2]))
    assert list(read_lines(path)) == [ROWS[0], ROWS[2]]


def test_line_ends_of_another_system_are_read(tmp_path):
    (tmp_path / "manifest.csv").write_bytes(csv_of(*ROWS).replace("\n", "\r\n").encode())
    assert list(read_lines(tmp_path / "manifest.csv")) == ROWS


@pytest.mark.parametrize(
    ("name", "limit"),
    [("seed", 2**32), ("num_inference_steps", 2**16), ("width", 2**16), ("height", 2**16), ("num_bytes", 2**32)],
)
def test_a_number_that_no_image_has_makes_no_row(tmp_path, name, limit):
    path = tmp_path / "manifest.csv"
    path.write_text(HEADER + "\n" + with_field(name, limit) + with_field(name, limit - 1))
    assert list(read_lines(path)) == list(Rows(read_lines(path))) == [ROWS[1]._replace(**{name: limit - 1})]


# Tables


def item(row):
    return row.user_id, row.image_index


SOME_ROWS = st.lists(  # of few images, so that several are of one
    st.tuples(any_row(st.integers(1, 3), st.integers(0, 4)), st.sampled_from(list(Trust))), max_size=12
)


def table_of(rows, parts):
    """Put rows into a table, a few at a time."""
    table = Rows()
    for part in range(parts):
        for trust in Trust:
            of_part = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
            table.extend((row for row, its_trust in of_part if its_trust == trust), trust)
    return table


@settings(max_examples=150, deadline=None)
@given(rows=SOME_ROWS, parts=st.integers(1, 3))
def test_a_table_holds_its_rows_by_user_and_image(rows, parts):
    table = table_of(rows, parts)
    plain = sorted(rows, key=lambda pair: (item(pair[0]), pair[1]))
    assert [item(row) for row in table] == [item(row) for row, _ in plain]
    assert sorted(table) == sorted(row for row, _ in plain)
    assert table.array["trust"].tolist() == [trust for _, trust in plain]
    assert len(table) == len(rows)
    assert table.user_ids == sorted({row.user_id for row, _ in rows})
    assert table.num_bytes() == sum(row.num_bytes for row, _ in rows)
    assert table.sizes() == sorted({(row.width, row.height) for row, _ in rows})
    of_user = {u: [row.image_index for row, _ in plain if row.user_id == u] for u in table.user_ids}
    assert {u: indices.tolist() for u, indices in table.image_indices().items()} == of_user
    for user_id in range(5):
        assert [row.image_index for row in as_rows(table.of_user(user_id))] == of_user.get(user_id, [])
        for index in range(5):
            assert sorted(table.of_image(user_id, index)) == sorted(r for r, _ in rows if item(r) == (user_id, index))


@settings(max_examples=150, deadline=None)
@given(rows=SOME_ROWS, parts=st.integers(1, 3), data=st.data())
def test_the_best_row_of_an_image_is_the_last_with_the_most_trust(rows, parts, data):
    best = {}
    for row, trust in rows:
        if trust >= best.get(item(row), (0, None))[0]:
            best[item(row)] = trust, row
    table = table_of(rows, parts).keep_best()
    kept = [best[key][1] for key in sorted(best)]
    assert list(table) == kept
    mask = data.draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept)))
    view = table.array  # somebody may hold one
    table.keep(np.array(mask, bool))
    assert list(table) == [row for row, is_kept in zip(kept, mask, strict=True) if is_kept]
    assert len(view) == len(kept)


def test_an_empty_table_is_falsy_and_has_nobody():
    table = Rows()
    assert not table
    assert (list(table), table.user_ids, len(table.of_user(1)), table.of_image(1, 0)) == ([], [], 0, [])
    assert (table.num_bytes(), table.sizes(), table.image_indices()) == (0, [], {})
    assert Rows(ROWS).of_image(1, -1) == Rows(ROWS).of_image(1, 2**32) == []  # as an edited record may have it
