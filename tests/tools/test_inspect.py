"""`userdiff inspect`: the figures against plain definitions of them, and what is said of them."""

import json
import math
import shutil
import statistics
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageStat

from tests.definitions import name_of, png_of_pixels, write_dataset
from userdiff.cli import main
from userdiff.text import listed
from userdiff.tools import inspect as inspection
from userdiff.tools import inspect_report as findings
from userdiff.tools import similarity as likeness
from userdiff.tools.inspect import inspect
from userdiff.tools.similarity import NEAR, Similarity


def pattern(*seed, size=32, channels=0):
    """A smooth random picture, the same for the same numbers: what has other numbers looks different."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, channels or 1), dtype=np.uint8)
    planes = [
        Image.fromarray(values[:, :, i]).resize((size, size), Image.Resampling.BICUBIC) for i in range(channels or 1)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)[:, :, slice(None) if channels else 0]


def face(user, i, **options):
    """A picture of a made-up user: half of it is theirs, half its own."""
    mine, own = pattern(user, **options).astype(int), pattern(user, 1 + i, **options).astype(int)
    return ((2 * mine + own) // 3).astype(np.uint8)


def noisy(pixels, seed=0):
    noise = np.random.default_rng(seed).integers(-2, 3, pixels.shape)
    return (pixels.astype(int) + noise).clip(0, 255).astype(np.uint8)


def make_dataset(folder, of_users):
    """Write images as a job does: user id -> pixels of each image."""
    images = {(u, i): png_of_pixels(pixels) for u, pictures in of_users.items() for i, pixels in enumerate(pictures)}
    return write_dataset(folder, images)


@pytest.fixture(scope="module")
def of_users():
    """Six users. User 12 is user 2 over again; user 3 has a flat image, a faint one, a near-copy and a bright one."""
    made = {user_id: [face(user_id, i) for i in range(12)] for user_id in (1, 2, 3, 7, 30)}
    made[3][4] = np.full((32, 32), 90, np.uint8)
    made[3][5] = (90 + pattern(99) // 120).astype(np.uint8)
    made[3][6] = noisy(made[3][2])
    made[7][8] = 200 + made[7][8] // 5
    made[12] = [pixels.copy() for pixels in made[2]]
    return made


@pytest.fixture(scope="module")
def dataset(of_users, tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), of_users)


@pytest.fixture(scope="module")
def report(dataset):
    return inspect(dataset)


def user(report, user_id):
    return next(one for one in report.users if one.user_id == user_id)


def said(capsys, *argv):
    assert main(["inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


# Nearest neighbours


def plain_nearest(queries, users, others, other_users, *, is_same):
    """One pair at a time."""
    found = []
    for i, query in enumerate(queries):
        own, other = (math.inf, -1), (math.inf, -1)
        for j, vector in enumerate(others):
            distance = sum((int(a) - int(b)) ** 2 for a, b in zip(query, vector, strict=True))
            if users[i] != other_users[j]:
                other = min(other, (distance, j), key=lambda pair: pair[0])
            elif not (is_same and i == j):
                own = min(own, (distance, j), key=lambda pair: pair[0])
        found.append((own[1], own[0], other[1], other[0]))
    return found


def vectors(draw, number, size, values):
    return np.array([[draw(values) for _ in range(size)] for _ in range(number)], np.int8).reshape(number, size)


@st.composite
def groups(draw):
    """Two sets of vectors of some users, of few values or of any."""
    values = draw(st.sampled_from([st.integers(0, 1), st.integers(-127, 127)]))
    size = draw(st.integers(1, 4))
    sets = []
    for _ in range(2):
        users = sorted(draw(st.lists(st.sampled_from([1, 2, 5, 31]), max_size=9)))
        sets.append((vectors(draw, len(users), size, values), np.array(users, np.int64)))
    return sets


@given(groups(), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_the_nearest_are_those_of_all_pairs(sets, rows, columns):
    (queries, users), (others, other_users) = sets
    with pytest.MonkeyPatch.context() as patch:  # blocks that the few vectors fill
        patch.setattr(likeness, "_ROWS", rows)
        patch.setattr(likeness, "_COLUMNS", columns)
        within = list(likeness.nearest(queries, users))
        between = list(likeness.nearest(queries, users, others, other_users))
    assert within == plain_nearest(queries, users, queries, users, is_same=True)
    assert between == plain_nearest(queries, users, others, other_users, is_same=False)


def test_distances_are_exact_where_they_are_largest():
    ends = np.array([[127] * 256, [-127] * 255 + [-126]], np.int8)
    exact = 255 * 254**2 + 253**2
    assert list(likeness.nearest(ends, np.array([1, 2]))) == [(-1, math.inf, 1, exact), (-1, math.inf, 0, exact)]


@given(groups(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_likeness_counts_whose_image_is_nearest(sets, is_same):
    (queries, users), (others, other_users) = sets
    given_others = () if is_same else (others, other_users)
    near = np.array(list(likeness.nearest(queries, users, *given_others)), NEAR)
    found = likeness.similarity(users, near, *given_others[1:])
    candidates = users if is_same else other_users
    assert set(found) == (set(users.tolist()) if len(candidates) > is_same else set())
    for user_id, one in found.items():
        mine = [row for row, whose in zip(near, users, strict=True) if whose == user_id]
        lost = [int(candidates[row["other"]]) for row in mine if row["other_distance"] < row["own_distance"]]
        counts = sorted((-lost.count(other), other) for other in set(lost))
        assert one.own == (len(mine) - len(lost)) / len(mine)
        assert one.other == (counts[0][1] if counts else None)
        assert one.other_share == (-counts[0][0] / len(mine) if counts else 0)
        hits = sum(whose == user_id for whose in candidates) - is_same
        assert one.chance == hits / (len(candidates) - is_same)


# The figures of a dataset


def test_copies_and_flat_and_odd_images_are_counted_by_user(report):
    counts = {one.user_id: (one.num_copies, one.num_shared, one.num_flat, one.num_odd) for one in report.users}
    ordinary, twin = (0, 0, 0, 0), (0, 12, 0, 0)
    assert counts == {1: ordinary, 2: twin, 3: (2, 0, 2, 2), 7: (0, 0, 0, 1), 12: twin, 30: ordinary}
    assert report.num_compared == 6 * 12 - 2  # flat ones with nothing


def test_the_closest_and_the_flattest_are_listed(report):
    closest = report.closest_within[0]
    assert (closest.names, closest.has_same_pixels) == ((name_of(3, 2), name_of(3, 6)), False)
    assert 0 < closest.difference <= inspection.COPY_DIFFERENCE < report.closest_within[1].difference
    assert {(pair.difference, pair.has_same_pixels) for pair in report.closest_across} == {(0, True)}
    assert [pair.names for pair in report.closest_across] == [(name_of(2, i), name_of(12, i)) for i in range(5)]
    assert [one.name for one in report.flattest[:2]] == [name_of(3, 4), name_of(3, 5)]
    assert report.flattest[0].value == 0 < report.flattest[1].value < inspection.FLAT_CONTRAST
    for worst in (report.closest_within, report.closest_across, report.flattest):
        assert len(worst) == inspection.LISTED


def plain_small(path):
    values = [int(value) for value in np.asarray(Image.open(path).convert("L").reduce(2)).ravel()]  # of 32x32
    centre, spread = statistics.fmean(values), statistics.pstdev(values)
    return [(value - centre) / spread for value in values]


def test_differences_are_those_of_plain_statistics(report, dataset):
    for pair in report.closest_within + report.closest_across:
        first, second = (plain_small(dataset / one) for one in pair.names)
        expected = statistics.fmean((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5
        assert pair.difference == pytest.approx(expected, abs=0.01)  # of values rounded to 1/32


def test_a_colour_alone_is_flat_and_edges_between_equally_bright_colours_are_not(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :, 0] = 255
    edge = red.copy()
    edge[:, 8:] = (0, 255, 0)
    report = inspect(make_dataset(tmp_path, {1: [red, edge]}))
    assert user(report, 1).num_flat == 1
    assert [one.value for one in report.flattest] == [0, 127.5]


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_brightness_and_contrast_are_those_of_plain_statistics(channels, tmp_path):
    pictures = [face(1, i, channels=channels) for i in range(4)]
    figures = user(inspect(make_dataset(tmp_path, {1: pictures})), 1)
    stats = [ImageStat.Stat(Image.fromarray(pixels)) for pixels in pictures]
    for found, values in (
        (figures.brightness, [statistics.fmean(stat.mean) for stat in stats]),
        (figures.contrast, [max(stat.stddev) for stat in stats]),
    ):
        assert found == pytest.approx((statistics.fmean(values), statistics.pstdev(values)))


def plain_oddness(values, value):
    centre = statistics.median(values)
    return abs(value - centre) / max(1.4826 * statistics.median(abs(v - centre) for v in values), 1)


def test_odd_images_are_far_from_their_users_median(report, of_users):
    values = {"brightness": [p.mean() for p in of_users[7]], "contrast": [p.std() for p in of_users[7]]}
    oddness = {what: plain_oddness(values[what], values[what][8]) for what in values}
    what = max(oddness, key=oddness.get)
    odd = next(one for one in report.oddest if one.name == name_of(7, 8))
    assert odd.value == pytest.approx(oddness[what])
    assert odd.what == f"{what} {values[what][8]:.0f}, its user's median {statistics.median(values[what]):.0f}"


def test_what_hardly_varies_or_is_few_is_not_odd(tmp_path):
    steady = [face(1, 0)] * 9
    steady[2] = steady[2] // 64 * 64 + 32  # nearly as bright
    steady[3] = steady[3] // 2 + 2
    assert 0 < abs(float(steady[2].mean() - steady[0].mean())) < 5
    few = [face(2, i) for i in range(inspection.ODD_IMAGES - 1)]
    few[3] = 220 + few[3] // 9
    report = inspect(make_dataset(tmp_path, {1: steady, 2: few}))
    assert [user(report, user_id).num_odd for user_id in (1, 2)] == [1, 0]


def test_a_user_is_most_like_themselves_or_like_their_twin(report):
    for user_id in (1, 3, 7, 30):
        assert user(report, user_id).generated.own >= 0.8
    for user_id, twin in ((2, 12), (12, 2)):  # every image has its double
        assert user(report, user_id).generated == Similarity(0.0, 11 / 69, twin, 1.0)
    assert user(report, 1).real is None


def test_likeness_does_not_see_brightness_and_contrast(tmp_path):
    """Users that only differ in these are as if the condition were ignored."""
    dim = [face(1, i) // 3 for i in range(10)]
    bright = [100 + face(1, 10 + i) // 3 for i in range(10)]
    report = inspect(make_dataset(tmp_path, {1: dim, 2: bright}))
    shares = [one.generated.own for one in report.users]
    assert statistics.fmean(shares) < 0.8
    assert user(report, 1).brightness[0] + 90 < user(report, 2).brightness[0]


def test_real_images_tell_users_that_were_swapped(tmp_path, capsys):
    swapped = {1: 2, 2: 1, 4: 4, 5: 5}
    made = {user_id: [face(shown, i) for i in range(6)] for user_id, shown in swapped.items()}
    out, real = make_dataset(tmp_path / "out", made), tmp_path / "real"
    assert all(one.generated.own == 1 for one in inspect(out).users)  # without real images nothing shows
    for user_id in (1, 2, 4):
        (real / f"ID-{user_id:03d}").mkdir(parents=True)
        for i in range(5):
            Image.fromarray(face(user_id, 50 + i, size=48)).save(real / f"ID-{user_id:03d}" / f"{i}.jpg", quality=95)
    (real / "notes").mkdir()
    (real / "list_4").write_text("no folder")
    assert [one.real for one in inspect(out, real).users[:3]] == [
        Similarity(0.0, 1 / 3, 2, 1.0),
        Similarity(0.0, 1 / 3, 1, 1.0),
        Similarity(1.0, 1 / 3, None, 0.0),
    ]
    text = said(capsys, out, "--real", real)
    assert "The most similar real image is of the same user: 33%, by chance 33%\n" in text
    assert "  Users no more like themselves than like another: 1 (like 2), 2 (like 1)\n" in text
    ends = [["0%", "2", "(100%)"], ["0%", "1", "(100%)"], ["-", "100%", "-"]]
    assert [line.split()[-3:] for line in text.splitlines()[3:6]] == ends
    assert text.splitlines()[6].split()[-5:-2] == ["100%", "-", "-"]  # without real images of theirs


def test_a_sample_of_each_user_is_spread_evenly(dataset, monkeypatch):
    chosen = {(10, 4): [0, 3, 6, 9], (8, 4): [0, 2, 5, 7], (3, 4): [0, 1, 2], (0, 4): []}
    assert {of: inspection._spread(*of) for of in chosen} == chosen
    monkeypatch.setattr(inspection, "COMPARED", 10)
    report = inspect(dataset)
    assert report.num_compared == 10
    assert "10 of 70 images, evenly chosen, were compared" in "\n".join(findings.report_lines("x", report))


# Small and ragged datasets

FLAT = [np.full((8, 8), 3, np.uint8)] * 2
MIXED = [face(1, 0), face(1, 1, size=20), face(1, 2, size=7, channels=3), face(1, 3, size=70, channels=4)]


@pytest.mark.parametrize(
    ("of_users", "start", "own_and_like", "has_verdict"),
    [
        ({4: [face(4, i) for i in range(3)]}, "4 3 0 0 0 0", "100% -", True),
        ({4: [face(4, 0)]}, "4 1 0 0 0 0", "- -", False),
        ({user_id: [face(user_id, 0)] for user_id in (3, 4, 9)}, "3 1 0 0 0 0", "- 4 (100%)", False),
        ({1: FLAT, 2: FLAT}, "1 2 2 0 0 0", "- -", False),
        ({1: [*MIXED, pattern(5)[:, :20]], 2: [face(2, 0)]}, "1 5 0", None, True),
    ],
    ids=["one user", "one image", "one image per user", "nothing but flat images", "other sizes and colours"],
)
def test_small_and_ragged_datasets(of_users, start, own_and_like, has_verdict, tmp_path, capsys):
    text = said(capsys, make_dataset(tmp_path, of_users))
    line = " ".join(text.splitlines()[3].split())
    assert line.startswith(start)
    assert own_and_like is None or line.endswith(f" {own_and_like}")
    assert ("The most similar" in text) == has_verdict
    assert len(of_users) > 1 or "Closest across users (difference, as above)\n    none\n" in text
    assert "cannot be read" not in text


# What is said


def test_damaged_images_are_named_and_passed_over(dataset, tmp_path, capsys):
    out = shutil.copytree(dataset, tmp_path / "out")
    (out / name_of(1, 3)).write_bytes((out / name_of(1, 3)).read_bytes()[:80])
    (out / name_of(30, 11)).unlink()
    (out / "manifest.csv").rename(out / "manifest.part-00000.csv")  # as of a job that was stopped
    text = said(capsys, out)
    assert text.startswith(f"{out}: 70 images of 6 users\n2 more cannot be read: {name_of(1, 3)}, {name_of(30, 11)}\n")
    assert user(inspect(out), 1).num_images == 11


def test_the_table_says_what_the_report_holds(report, dataset, capsys):
    lines = said(capsys, dataset).splitlines()
    assert lines[0] == f"{dataset}: 72 images of 6 users"
    assert [line.split()[0] for line in lines[3:9]] == ["1", "2", "3", "7", "12", "30"]
    bright, varied = user(report, 3).brightness, user(report, 3).contrast
    expected = "3 12 2 2 0 2 {:.0f} ± {:.0f} {:.0f} ± {:.0f} {:.0%}"
    assert lines[5].split()[:13] == expected.format(*bright, *varied, user(report, 3).generated.own).split()
    assert lines[4].split()[-3:] == ["0%", "12", "(100%)"]
    assert "  Users no more like themselves than like another: 2 (like 12), 12 (like 2)" in lines
    assert f"    0.00  {name_of(2, 0)}  {name_of(12, 0)}  same pixels" in lines
    assert f"     0.0  {name_of(3, 4)}" in lines
    assert max(map(len, lines[1:])) <= findings._WIDTH
    notes = "\n".join(lines[lines.index("What these figures can tell") :])
    for column in ("flat", "copies", "shared", "odd", "brightness", "contrast", "own", "most like"):
        assert column in lines[2]
        assert column in notes
    assert "real own" not in notes


def test_lists_are_bounded(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(findings, "USERS_SHOWN", 2)
    monkeypatch.setattr(findings, "listed", partial(listed, limit=1))
    out = shutil.copytree(dataset, tmp_path / "out")
    (out / name_of(1, 3)).unlink()
    (out / name_of(1, 4)).unlink()
    lines = said(capsys, out).splitlines()
    assert lines[1] == f"2 more cannot be read: {name_of(1, 3)} and 1 more"
    assert [line.split()[0] for line in lines[4:6]] == ["2", "12"]  # the least like themselves
    assert lines[6] == "and 4 more users, whose own share is no lower"
    assert "  Users no more like themselves than like another: 2 (like 12) and 1 more" in lines


def test_the_figures_can_be_written_as_json_and_are_the_same_again(report, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(likeness, "_ROWS", 5)
    monkeypatch.setattr(likeness, "_COLUMNS", 7)
    path = tmp_path / "figures.json"
    said(capsys, dataset, "--json", path)
    assert path.read_bytes() == findings.report_json(report)
    figures = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert figures["num_images"] == 72
    assert figures["limits"]["COPY_DIFFERENCE"] == inspection.COPY_DIFFERENCE
    assert [one["user_id"] for one in figures["users"]] == [1, 2, 3, 7, 12, 30]
    assert figures["users"][1]["generated"] == {"own": 0, "chance": 11 / 69, "other": 12, "other_share": 1}
    assert figures["closest_within"][0]["names"] == [name_of(3, 2), name_of(3, 6)]


# Wrong input


def test_a_dataset_of_which_nothing_can_be_read_is_refused(tmp_path):
    make_dataset(tmp_path, {1: [face(1, 0)]})
    (tmp_path / name_of(1, 0)).write_bytes(b"")
    with pytest.raises(ValueError, match=rf": none of 1 images can be read, the first is {name_of(1, 0)}$"):
        inspect(tmp_path)
    (tmp_path / "manifest.csv").unlink()
    with pytest.raises(ValueError, match=r"; `userdiff merge .*` makes its rows from the images$"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], r"real is not a folder$"),
        (["user_1/list.txt"], r"real holds no images in folders whose names end in a user's id, as user_07$"),
        (["user_1/a.png"], r"none of the 1 images in .*real can be read$"),
        (["user_1/a.png", "user_01/a.png"], r"user_01 and user_1 both end in 1$"),
    ],
)
def test_real_images_that_are_not_there(dataset, tmp_path, files, what):
    for name in files:
        (tmp_path / "real" / name).parent.mkdir(parents=True)
        (tmp_path / "real" / name).write_text("no image")
    with pytest.raises(ValueError, match=f"^--real: .*{what}"):
        inspect(dataset, tmp_path / "real")


def test_a_palette_is_read_as_its_colours(tmp_path):
    coloured = Image.fromarray(face(1, 0, channels=3)).quantize(16)
    coloured.save(tmp_path / "palette.png")
    coloured.convert("RGB").save(tmp_path / "plain.png")
    first, second = (inspection._look_at(tmp_path / one) for one in ("palette.png", "plain.png"))
    assert first[:3] == second[:3]
    assert first[2] > 0
