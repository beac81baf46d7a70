"""`userdiff judge`: the figures of a dataset against plain definitions of them, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.definitions import name_of, png_of_pixels, write_dataset
from tests.judges import FUNCTION, NUM_CLASSES, SIDE, Network, expected_scores, save
from userdiff.cli import main
from userdiff.judge import report

NUM_IMAGES = 23  # of each user: batches of 16 with ragged ends


@pytest.fixture(scope="module")
def pictures():
    """(user, image) -> pixels: of user u, most are what the judge takes for class u - 1."""
    weights = Network().weights.numpy().reshape(3, 4, 4, NUM_CLASSES)
    made = {}
    for user_id in range(1, NUM_CLASSES + 1):
        liked = np.kron(weights[..., user_id - 1], np.ones((1, SIDE // 4, SIDE // 4))).transpose(1, 2, 0)
        for index in range(NUM_IMAGES):
            noise = np.random.default_rng([user_id, index]).normal(size=(SIDE, SIDE, 3))
            made[user_id, index] = np.clip(128 + 8 * liked + 60 * noise * (index % 5), 0, 255).astype(np.uint8)
    return made


@pytest.fixture
def dataset(pictures, tmp_path):
    return write_dataset(tmp_path / "dataset", {item: png_of_pixels(pixels) for item, pixels in pictures.items()})


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judge") / "judge.pt2")


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({str(user_id): user_id - 1 for user_id in range(1, NUM_CLASSES + 1)}))
    return path


def figures(tmp_path, *flags):
    assert main(["judge", *map(str, flags), "--json", str(tmp_path / "figures.json")]) == 0
    return json.loads((tmp_path / "figures.json").read_text())


def test_figures_are_those_of_the_definitions(dataset, pictures, judge, classes, tmp_path):
    accept = ["confidence>=0.5", "margin>0.25"]
    found = figures(tmp_path, dataset, "--judge", judge, "--judge_classes", classes, "--accept", *accept,
                    "--num_images_per_user", 40)  # fmt: skip
    assert found["num_images"] == len(pictures)
    assert found["accept"] == accept
    rates = []
    for user in found["users"]:
        images = [pictures[user["user_id"], index] for index in range(NUM_IMAGES)]
        scores = [expected_scores(pixels, user["user_id"] - 1) for pixels in images]
        by_class = [[expected_scores(pixels, number)[0] for number in range(NUM_CLASSES)] for pixels in images]
        taken_for = [probabilities.index(max(probabilities)) for probabilities in by_class]
        assert user["right"] == taken_for.count(user["user_id"] - 1) / NUM_IMAGES
        assert user["predicted"] == {str(number): taken_for.count(number) for number in sorted(set(taken_for))}
        for at, name in enumerate(["confidence", "margin"]):
            values = sorted(score[at] for score in scores)
            assert user["quantiles"][name]["0.5"] == pytest.approx(values[NUM_IMAGES // 2], abs=1e-5)
            for step in user["thresholds"][name]:
                assert step["rate"] == sum(value >= step["at_least"] for value in values) / NUM_IMAGES
        rate = sum(confidence >= 0.5 and margin > 0.25 for confidence, margin in scores) / NUM_IMAGES
        assert user["accepted"] == {"rate": rate, "candidates": math.ceil(40 / rate) if rate else None}
        rates.append(rate)
    assert {0, 1} < set(rates)


def test_what_is_printed_says_the_same(dataset, judge, classes, tmp_path, capsys):
    found = figures(tmp_path, dataset, "--judge", judge, "--judge_classes", classes)
    said = capsys.readouterr().out
    assert said.startswith(f"{dataset}: {NUM_IMAGES * NUM_CLASSES} images of 5 users, judged by {judge}\n")
    assert "Accepted: margin>0." in said
    for user in found["users"]:
        assert f"\n{user['user_id']:>6} {NUM_IMAGES:>7} {user['right']:>6.0%} {user['accepted']['rate']:>9.0%}" in said
        assert user["accepted"]["rate"] == user["right"]  # that is what margin>0 means


def test_images_that_cannot_be_read_are_named_and_passed_over(dataset, judge, classes, tmp_path, capsys):
    (dataset / name_of(2, 3)).write_bytes(b"no picture")
    (dataset / name_of(4, 0)).write_bytes(png_of_pixels(np.zeros((8, 8, 3), np.uint8)))
    found = figures(tmp_path, dataset, "--judge", judge, "--judge_classes", classes)
    assert found["unread"] == [name_of(2, 3), name_of(4, 0)]
    assert [user["num_images"] for user in found["users"]] == [23, 22, 23, 22, 23]
    assert f"2 more cannot be read: {name_of(2, 3)}, {name_of(4, 0)}" in capsys.readouterr().out


def test_a_function_has_its_own_scores_and_no_classes(dataset, pictures, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FUNCTION)
    found = figures(tmp_path, dataset, "--judge", f"{tmp_path / 'mine.py'}:bright",                     "--accept", "brightness<0.5", "odd>=1")  # fmt: skip
    for user in found["users"]:
        dark = [pictures[user["user_id"], index].mean() / 255 < 0.5 for index in range(NUM_IMAGES)]
        assert user["accepted"]["rate"] == (sum(dark) / NUM_IMAGES if user["user_id"] % 2 else 0)
        assert user["right"] is None
    said = capsys.readouterr().out
    assert "none pass" in said
    assert "taken for" not in said


def test_a_function_without_a_condition_is_told_what_it_needs(dataset, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FUNCTION)
    assert main(["judge", str(dataset), "--judge", f"{tmp_path / 'mine.py'}:bright"]) == 2
    said = "--accept: missing; this judge gives brightness, odd, needed: a condition on one of them"
    assert capsys.readouterr().err == f"userdiff judge: error: {said}\n"


def test_a_judge_that_cannot_tell_is_right_about_nobody(dataset, classes, tmp_path, capsys):
    network = Network()
    network.weights[0] = torch.nan
    found = figures(tmp_path, dataset, "--judge", save(tmp_path / "nan.pt2", network), "--judge_classes", classes)
    for user in found["users"]:
        assert (user["right"], user["predicted"], user["num_not_finite"]) == (0, {}, NUM_IMAGES)
    assert "none pass" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_called_so(judge, capsys):
    assert main(["judge", "nowhere", "--judge", str(judge)]) == 2
    assert "nowhere holds no dataset: there is no such folder" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_work(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main(["judge", str(dataset), "--judge", "nowhere.pt2", "--plot", str(tmp_path / "scores.png")]) == 2
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err


def test_a_picture_of_the_scores(dataset, judge, classes, tmp_path):
    flags = ["judge", dataset, "--judge", judge, "--judge_classes", classes, "--plot", tmp_path / "scores.png"]
    assert main([str(flag) for flag in flags]) == 0
    with Image.open(tmp_path / "scores.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--judge", "nowhere.pt2"], "--judge: nowhere.pt2"),
        (["--accept", "blur>=1"], "--accept: blur>=1 "),
        (["--accept", "margin>0", "half"], "--accept: 'half'"),
        (["--judge_classes", "nowhere.json"], "--judge_classes: nowhere.json"),
        (["--plot", "DATASET/scores.png"], "--plot: "),
        (["--json", "DATASET/run.json"], "--json: "),
        (["--json", "nowhere/figures.json"], "--json: 'nowhere/figures.json' lies in no folder"),
        (["--plot", "nowhere/scores.png"], "--plot: 'nowhere/scores.png' lies in no folder"),
    ],
)
def test_what_is_refused_is_one_line(dataset, judge, classes, capsys, flags, flag):
    flags = [flag.replace("DATASET", str(dataset)) for flag in flags]
    status = main(["judge", str(dataset), "--judge", str(judge), "--judge_classes", str(classes), *flags])
    said = capsys.readouterr().err
    assert status == 2
    assert said.startswith(f"userdiff judge: error: {flag}")
    assert said.count("\n") == 1


def test_a_folder_whose_record_is_gone_needs_the_classes(dataset, judge, capsys):
    (dataset / "run.json").unlink(missing_ok=True)
    assert main(["judge", str(dataset), "--judge", str(judge)]) == 2
    assert "--judge_classes: missing" in capsys.readouterr().err
