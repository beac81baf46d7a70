"""The row format, and rows as one array, against plain lists of them."""

import csv
import re
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.definitions import HEADER, csv_of, fields_of, line_of, name_of
from userdiff.dataset.rows import COLUMNS, Row, Rows, Trust, as_rows, read_lines
from userdiff.dataset.rows import HEADER as OUR_HEADER

ROWS = [Row(*fields_of(user_id, image_index, b"")) for user_id, image_index in ((1, 0), (2, 7), (31, 1000))]


def row_of(user_id, image_index, number):
    """A row of an image; another number gives it other fields."""
    rng = Random(number)
    seed, steps, *measured = (
        rng.choice([low, high, rng.randint(low, high)])
        for low, high in ((0, 2**32 - 1), (1, 1000), (1, 4096), (1, 4096), (0, 10**8))
    )
    item = (name_of(user_id, image_index), user_id, image_index)
    return Row(*item, seed, steps, rng.choice(["trained", "random"]), *measured, rng.randbytes(32).hex())


NUMBERS = st.integers(0, 2**32)
ANY_ROWS = st.lists(st.builds(row_of, st.integers(1, 10**6), st.integers(0, 10**5), NUMBERS), max_size=4)


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


NUMBER = r"(0|[1-9]\d{0,19})"
LINE = re.compile(rf"([^,]*),{','.join([NUMBER] * 4)},(?:trained|random),{','.join([NUMBER] * 3)},[0-9a-f]{{64}}")
LIMITS = {"user_id": 10**18, "image_index": 2**32, "seed": 2**32, "num_inference_steps": 2**16}
LIMITS |= {"width": 2**16, "height": 2**16, "num_bytes": 2**32}


def is_row(line):
    """Whether a line, without its end, is a row by definition."""
    if not (match := LINE.fullmatch(line)):
        return False
    name, *numbers = match.groups()
    user_id, image_index, *_ = numbers = [int(number) for number in numbers]
    fits = all(number < limit for number, limit in zip(numbers, LIMITS.values(), strict=True))
    return user_id >= 1 and fits and name == name_of(user_id, image_index)


MANGLING = st.lists(
    st.tuples(
        st.integers(0, 500), st.integers(0, 500), st.binary(max_size=4) | st.sampled_from([b"\n", b"\r", b",", b'"'])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(rows=ANY_ROWS, damage=MANGLING)
@example(rows=ROWS, damage=[(0, 500, b"\xff\xfe\x00")])
@example(rows=ROWS, damage=[(100, 0, b"9" * 5000)])
@example(rows=ROWS, damage=[(200, 500, b"")])
@example(rows=ROWS, damage=[(len(csv_of(*ROWS)) - 1, 1, b"")])
def test_of_a_mangled_or_truncated_manifest_all_whole_lines_are_read_and_no_others(scratch, rows, damage):
    content = csv_of(*rows).encode()
    for start, length, other in damage:
        content = content[:start] + other + content[start + length :]
    scratch.write_bytes(content)
    lines = content.decode("latin-1").replace("\r\n", "\n").split("\n")[:-1]
    assert [row.line for row in read_lines(scratch)] == [line + "\n" for line in lines if is_row(line)]


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


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])  # or as another system writes them
def test_all_lines_are_read_and_of_no_file_none(tmp_path, line_end):
    assert list(read_lines(tmp_path / "manifest.csv")) == []
    (tmp_path / "manifest.csv").write_bytes(csv_of(*ROWS).replace("\n", line_end).encode())
    assert list(read_lines(tmp_path / "manifest.csv")) == ROWS


@pytest.mark.parametrize(("name", "limit"), list(LIMITS.items())[2:])
def test_a_number_that_no_image_has_makes_no_row(tmp_path, name, limit):
    path = tmp_path / "manifest.csv"
    path.write_text(HEADER + "\n" + with_field(name, limit) + with_field(name, limit - 1))
    assert list(read_lines(path)) == list(Rows(read_lines(path))) == [ROWS[1]._replace(**{name: limit - 1})]


# Tables


def item(row):
    return row.user_id, row.image_index


FEW_IMAGES = st.builds(row_of, st.integers(1, 3), st.integers(0, 4), NUMBERS)  # so that several rows are of one
SOME_ROWS = st.lists(st.tuples(FEW_IMAGES, st.sampled_from(list(Trust))), max_size=12)


def table_of(rows, parts):
    """Put rows into a table, a few at a time."""
    table = Rows()
    for part in range(parts):
        for trust in Trust:
            of_part = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
            table.extend((row for row, its_trust in of_part if its_trust == trust), trust)
    return table


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=100, deadline=None)
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
