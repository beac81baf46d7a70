"""Every python block of the README, run as it would be pasted after `make demo`; blocks of a section share their names."""

import csv
import importlib.util
import os
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.jobs import ROOT, run_job
from tests.oracle import assert_parity

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {section.partition("\n")[0]: section for section in README.split("\n## ")}
BLOCKS = [
    pytest.param(title, number, id=f"{title} {number}")
    for title, section in SECTIONS.items()
    for number in range(len(BLOCK.findall(section)))
]
PACKAGES = ("datasets", "pandas", "transformers")  # that the job does without


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` leaves behind: the folder it ran in, with the dataset in out/demo. No block may change that."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "userdiff").symlink_to(ROOT / "userdiff")
    assert run_job("--device", "cpu", "--output_dir", folder / "out" / "demo") == 0
    before = contents(folder / "out" / "demo")
    yield folder
    assert contents(folder / "out" / "demo") == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def rows(demo):
    with open(demo / "out" / "demo" / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def there(demo, monkeypatch):
    """Be in that folder; what a block changes of the process is changed back."""
    monkeypatch.chdir(demo)
    if importlib.util.find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", demo / "cache")
    threads = torch.get_num_threads()
    yield demo
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def require(package, code):
    """Skip where a block needs a package that is not there; transformers is needed by a pipeline alone."""
    needs = "StableDiffusionPipeline" if package == "transformers" else rf"^(from|import) {package}\b"
    if re.search(needs, code, re.MULTILINE) and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")


@cache
def run_block(title, number):
    """Run a block after those before it in its section, once, and give the names it leaves."""
    names = dict(run_block(title, number - 1)) if number else {"__name__": "__main__"}
    code = BLOCK.findall(SECTIONS[title])[number]
    for package in PACKAGES:
        require(package, code)
    exec(compile(code, f"README.md, {title}", "exec"), names)
    return names


def block_of(text):
    """Which block this text is in: (section, number)."""
    (place,) = [
        (title, number)
        for title, section in SECTIONS.items()
        for number, code in enumerate(BLOCK.findall(section))
        if text in code
    ]
    return place


def test_every_block_of_python_is_found():
    assert len(BLOCKS) == len(re.findall(r"^```py", README, re.MULTILINE)) >= 7


@pytest.mark.parametrize(("title", "number"), BLOCKS)
def test_a_block_runs_as_pasted(title, number, there):
    run_block(title, number)


def test_imagefolder_labels_are_the_users(there, rows):
    dataset = run_block(*block_of('load_dataset("imagefolder"'))["dataset"]
    labels = Counter(dataset.features["label"].int2str(example["label"]) for example in dataset)
    assert labels == {f"user_{user_id:02d}": 5 for user_id in range(1, 11)}
    for example, row in zip(dataset, rows, strict=True):
        assert dataset.features["label"].int2str(example["label"]) == f"user_{int(row['user_id']):02d}"
        assert example["image"].text["seed"] == row["seed"]


def test_a_dataset_has_every_column_and_its_own_image(there, rows):
    dataset = run_block(*block_of("Dataset.from_csv"))["dataset"]
    assert dataset.column_names == [*rows[0], "image"]
    for example, row in zip(dataset, rows, strict=True):
        assert {name: str(example[name]) for name in row} == row
        assert example["image"].text["seed"] == row["seed"]
        assert example["image"].size == (32, 32)


def test_pandas_reads_numbers_as_numbers(there, rows):
    manifest = run_block(*block_of("pd.read_csv"))["manifest"]
    assert manifest.astype(str).to_dict("records") == rows
    texts = {"file_name", "conditioning", "sha256"}
    assert {name for name in manifest if manifest[name].dtype.kind != "i"} == texts


def test_the_torch_dataset_gives_images_with_their_users(there, rows):
    names = run_block(*block_of("class UserImages"))
    assert names["images"].shape == (16, 3, 32, 32)
    assert names["images"].dtype == torch.float32
    dataset = names["UserImages"]("out/demo")
    assert [user_id for _, user_id in dataset] == [int(row["user_id"]) for row in rows]
    from PIL import Image

    image = np.asarray(Image.open(there / "out" / "demo" / rows[23]["file_name"]))
    assert (dataset[23][0].permute(1, 2, 0).numpy() * 255).round().astype(int).tolist() == image.tolist()


def test_the_folder_keeps_the_rules_of_torchvisions_imagefolder(demo, rows):
    """As torchvision writes them: every folder is a class, and every class holds an image, by its extension."""
    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    root = demo / "out" / "demo"
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    samples = [
        (f"{folder}/{name}", index)
        for index, name_of_class in enumerate(classes)
        for folder, _, names in sorted(os.walk(root / name_of_class, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(extensions)
    ]
    assert {index for _, index in samples} == set(range(len(classes)))
    assert [(str(root / row["file_name"]), int(row["user_id"]) - 1) for row in rows] == samples


def test_the_pipeline_makes_the_jobs_images(there, rows):
    pipeline_image = run_block(*block_of("def pipeline_image"))["pipeline_image"]
    chosen = rows[2::9]
    assert len({row["user_id"] for row in chosen}) == 6
    assert_parity(
        there / "out" / "demo",
        {(int(row["user_id"]), int(row["image_index"])): pipeline_image(row) for row in chosen},
    )


def test_the_training_loop_leaves_its_samples(there):
    names = run_block(*block_of("generate_samples("))
    assert names["images"].shape == (12, 32, 32, 3)
    assert sorted(path.name for path in (there / "out").glob("samples_*.png")) == ["samples_2.png", "samples_4.png"]
    assert names["unet"].training
