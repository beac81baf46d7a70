"""`userdiff inspect --features`: the figures against plain definitions and the paper's own library."""

import json
import math

import numpy as np
import prdc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.definitions import name_of, png_of_pixels, write_dataset
from tests.judges import SIDE, Network, save
from userdiff.cli import main
from userdiff.judge import features as module

FUNCTION = """
def means(images, user_ids):
    return images.float().mean(dim=(1, 2))
"""


def vectors_of(seed, number, d):
    return np.random.default_rng(seed).normal(size=(number, d))


@given(st.integers(0, 10**6), st.integers(7, 30), st.integers(7, 30), st.integers(2, 5), st.sampled_from([0, 0.5, 2]))
@settings(max_examples=30, deadline=None)
def test_four_figures_are_those_of_the_papers_library(seed, num_real, num_generated, d, shift):
    real, generated = vectors_of(seed, num_real, d), vectors_of(seed + 1, num_generated, d) + shift
    found = module.precision_recall_density_coverage(torch.from_numpy(real), torch.from_numpy(generated))
    for k, names in ((3, ("precision", "recall")), (5, ("density", "coverage"))):
        expected = prdc.compute_prdc(real, generated, nearest_k=k)
        assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names})


def test_diversity_is_the_mean_cosine_distance_of_two():
    vectors = vectors_of(3, 9, 4)
    distances = [
        1 - a @ b / math.sqrt((a @ a) * (b @ b)) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j
    ]
    assert module.diversity(torch.from_numpy(vectors)) == pytest.approx(sum(distances) / len(distances))
    assert module.diversity(torch.from_numpy(vectors[:1])) is None
    assert module.diversity(torch.from_numpy(np.repeat(vectors[:1], 3, axis=0))) == pytest.approx(0, abs=1e-12)


def test_kid_is_the_unbiased_discrepancy_of_the_definition():
    real, generated, d = vectors_of(4, 8, 3), vectors_of(5, 6, 3) + 0.3, 3

    def kernel(a, b):
        return (a @ b / d + 1) ** 3

    def within(some):
        pairs = [kernel(a, b) for i, a in enumerate(some) for j, b in enumerate(some) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(a, b) for a in real for b in generated]
    expected = within(real) + within(generated) - 2 * sum(between) / len(between)
    assert module.kid(torch.from_numpy(real), torch.from_numpy(generated)) == pytest.approx(expected)


def test_the_way_to_a_real_image_is_measured_by_those_between_real_ones():
    real, generated = vectors_of(6, 9, 3), vectors_of(7, 7, 3)
    ways = sorted(min(math.dist(a, b) for j, b in enumerate(real) if i != j) for i, a in enumerate(real))
    nearest = sorted(min(math.dist(a, b) for b in real) for a in generated)
    names = [[f"{kind}{i}" for i in range(number)] for kind, number in (("g", 7), ("r", 9))]
    both = (module.Features(n, torch.from_numpy(v)) for n, v in zip(names, (generated, real), strict=True))
    figures, pairs = module.compare(1, *both)
    assert [way for way, *_ in pairs] == pytest.approx([way / ways[4] for way in nearest[:5]])
    assert figures.nearest_real == pairs[0][0]


@pytest.fixture
def folders(tmp_path):
    """A dataset of two users, and real images: of user 1 some, one of them copied, of user 2 too few."""
    rng = np.random.default_rng(8)
    pictures = {(user, i): rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for user in (1, 2) for i in range(9)}
    for user, number in ((1, 12), (2, 3)):
        folder = tmp_path / "real" / f"user_{user:02d}"
        folder.mkdir(parents=True)
        for i in range(number):
            pixels = pictures[1, 4] if (user, i) == (1, 7) else rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            (folder / f"{i:02d}.png").write_bytes(png_of_pixels(pixels))
    dataset = write_dataset(tmp_path / "dataset", {item: png_of_pixels(pixels) for item, pixels in pictures.items()})
    return dataset, tmp_path / "real", pictures


def figures(tmp_path, *flags):
    assert main(["inspect", *map(str, flags), "--json", str(tmp_path / "figures.json")]) == 0
    return json.loads((tmp_path / "figures.json").read_text())["features"]


@pytest.mark.parametrize("kind", ["a network", "a function"])
def test_features_of_a_dataset_and_of_real_images(folders, tmp_path, capsys, kind):
    dataset, real, pictures = folders
    if kind == "a network":
        source = save(tmp_path / "net.pt2")
        images = torch.from_numpy(np.stack([pictures[1, i] for i in range(9)])).permute(0, 3, 1, 2).float() / 255
        expected = Network()(images).double()
    else:
        (tmp_path / "mine.py").write_text(FUNCTION)
        source = f"{tmp_path / 'mine.py'}:means"
        expected = torch.from_numpy(np.stack([pictures[1, i].mean(axis=(0, 1)) for i in range(9)]))
    found = figures(tmp_path, dataset, "--features", source, "--real", real)
    first, second = found["users"]
    assert found["dimensions"] == expected.shape[1]
    assert first["diversity"] == pytest.approx(module.diversity(expected), abs=1e-5)
    assert (first["num_images"], first["num_real"], second["num_real"]) == (9, 12, 3)
    assert first["nearest_real"] == pytest.approx(0, abs=1e-6)
    assert found["closest_to_real"][0][1:] == [name_of(1, 4), str(real / "user_01" / "07.png")]
    assert second["precision"] is second["kid"] is second["nearest_real"] is None  # of too few nothing is said
    assert f"{name_of(1, 4)}  {real / 'user_01' / '07.png'}" in capsys.readouterr().out


def test_without_real_images_there_is_variety_alone(folders, tmp_path, capsys):
    dataset, *_ = folders
    found = figures(tmp_path, dataset, "--features", save(tmp_path / "net.pt2"))
    assert all(user["diversity"] > 0 and user["precision"] is None for user in found["users"])
    said = capsys.readouterr().out
    assert "diversity" in said
    assert "coverage" not in said


def test_real_images_of_another_size_or_mode_are_brought_to_the_datasets(folders, tmp_path):
    from PIL import Image

    dataset, real, _ = folders
    for path in (real / "user_01").iterdir():
        with Image.open(path) as image:
            image.convert("L").resize((40, 24)).save(path)
    (real / "user_02" / "00.png").write_bytes(b"nothing")
    found = figures(tmp_path, dataset, "--features", save(tmp_path / "net.pt2"), "--real", real)
    assert found["users"][0]["num_real"] == 12
    assert found["unread"] == [str(real / "user_02" / "00.png")]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def f(images, user_ids): return [0.0] * len(images)", "needed: [16, d]"),
        ("def f(images, user_ids): return [[float('nan')] * 3] * len(images)", "not finite"),
        ("def f(images, user_ids): return images[0, 0, 0, 99]", "line 1: IndexError"),
    ],
)
def test_features_that_are_none_are_refused_in_one_line(folders, tmp_path, capsys, source, what):
    dataset, *_ = folders
    (tmp_path / "mine.py").write_text(source)
    assert main(["inspect", str(dataset), "--features", f"{tmp_path / 'mine.py'}:f"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("userdiff inspect: error: --features: ")
    assert what in said
    assert said.count("\n") == 1
