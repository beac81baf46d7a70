"""Judges from files: what they say against the definition, and files that are none, or more than a network."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.judges import FUNCTION, KINDS, NUM_CLASSES, SIDE, Network, expected_scores, save
from userdiff.judge.network import load_network
from userdiff.judge.scores import load_judge

CPU = torch.device("cpu")
CLASSES = {user_id: user_id - 1 for user_id in range(1, NUM_CLASSES + 1)}
IMAGES = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8))
USERS = [1, 2, 3, 4, 5, 1]


@pytest.fixture(scope="module", params=KINDS)
def judge_file(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("judges") / request.param)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return save(tmp_path_factory.mktemp("exported") / "judge.pt2")


def test_scores_are_those_of_the_definition(judge_file):
    scores = load_judge(str(judge_file), CPU, CLASSES)(IMAGES, USERS)
    assert scores.names == ("confidence", "margin")
    expected = [expected_scores(image.numpy(), user_id - 1) for image, user_id in zip(IMAGES, USERS, strict=True)]
    np.testing.assert_allclose(scores.table.numpy(), expected, atol=1e-5)
    assert scores.predicted.tolist() == [
        max(range(NUM_CLASSES), key=lambda number: expected_scores(image.numpy(), number)) for image in IMAGES
    ]


def test_classes_may_be_others_than_the_rows(exported):
    swapped = {**CLASSES, 1: 4, 5: 0}
    scores = load_judge(str(exported), CPU, swapped)(IMAGES, USERS)
    np.testing.assert_allclose(scores.table[0].numpy(), expected_scores(IMAGES[0].numpy(), 4), atol=1e-5)


def test_a_function_of_the_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTION)
    scores = load_judge(f"{tmp_path / 'mine.py'}:bright", CPU, {})(IMAGES, USERS)
    assert scores.names == ("brightness", "odd")
    assert scores.predicted is None
    expected = [[image.numpy().mean() / 255, user_id % 2] for image, user_id in zip(IMAGES, USERS, strict=True)]
    np.testing.assert_allclose(scores.table.numpy(), expected, atol=1e-6)


def test_half_precision_around_a_judge_does_not_reach_it(exported):
    judge = load_judge(str(exported), CPU, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = judge(IMAGES, USERS).table
    assert torch.equal(table, judge(IMAGES, USERS).table)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_not_finite_in_the_judge_is_nan(kind, tmp_path):
    network = Network()
    network.weights[0] = torch.inf
    table = load_judge(str(save(tmp_path / kind, network)), CPU, CLASSES)(torch.zeros_like(IMAGES), USERS).table
    assert table.isnan().all()


# What is no judge


BROKEN_FUNCTIONS = {
    "import nowhere_at_all": "line 1: ModuleNotFoundError",
    "x = 1\ndef f(: pass": "SyntaxError",
    "def g(images, user_ids): pass": "has no function f",
    "f = 3": "has no function f",
    "def f(images, user_ids):\n    return 1 / 0": "line 2: ZeroDivisionError",
    "def f(images): return {}": "TypeError",
    "def f(images, user_ids): return None": "returns NoneType",
    "def f(images, user_ids): return {}": "returns dict",
    "def f(images, user_ids): return {'a b': [0.0] * len(images)}": "'a b'",
    "def f(images, user_ids): return {'a,b': [0.0] * len(images)}": "'a,b'",
    "def f(images, user_ids): return {'a': [0.0]}": "returns a of shape [1] for 6 images",
    "def f(images, user_ids): return {'a': 0.5}": "returns a of shape [] for 6 images",
    "def f(images, user_ids): return {'a': 'high'}": "no numbers",
    "def f(images, user_ids): return {f'a{i}': [0.0] * 6 for i in range(17)}": "up to 16",
}


@pytest.mark.parametrize("source", BROKEN_FUNCTIONS)
def test_a_broken_function_is_told_with_its_line(source, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=r"mine\.py") as caught:
        load_judge(f"{path}:f", CPU, {})(IMAGES, USERS)
    assert BROKEN_FUNCTIONS[source] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["judge.pt2", "judge.pt", "judge.onnx", "judge.bin", "judge", "judge.py"])
@pytest.mark.parametrize("content", [b"", b"no network at all", b"PK\x03\x04", pickle.dumps({"weight": 1})])
def test_a_file_that_is_no_network(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"judge.* (needed|cannot be loaded)") as caught:
        load_judge(str(path), CPU, CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["judge.pt2", "judge.pt", "judge.onnx", "judge.py:f"])
def test_a_file_that_is_not_there(name, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_judge(str(tmp_path / name), CPU, CLASSES)


def test_a_checkpoint_of_weights_is_no_judge(tmp_path):
    path = tmp_path / "best.pt"
    torch.save({"state_dict": Network().state_dict()}, path)
    with pytest.raises(ValueError, match=r"torch\.export\.save") as caught:
        load_network(path, CPU)
    # What it advises makes a judge.
    advice = "torch.export.save" + str(caught.value).partition("torch.export.save")[2]
    judge = tmp_path / "judge.pt2"
    exec(
        advice.replace("judge.pt2", str(judge)),
        {"torch": torch, "model": Network(), "images": torch.zeros(2, 3, SIDE, SIDE)},
    )
    assert load_network(judge, CPU)(torch.zeros(5, 3, SIDE, SIDE)).shape == (5, NUM_CLASSES)


@pytest.mark.parametrize(
    ("images", "users", "what"),
    [
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [1, 1], "takes no images of 2 x 3 x 8 x 8"),
        (torch.zeros(2, SIDE, SIDE, 1, dtype=torch.uint8), [1, 1], "takes no images of 2 x 1 x 16 x 16"),
        (torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8), [6], "has 5 classes, user 6 has class 5"),
        (torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8), [77], "has 5 classes, user 77 has no class"),
    ],
)
def test_images_that_do_not_fit_a_judge(images, users, what, exported):
    with pytest.raises(ValueError, match="judge") as caught:
        load_judge(str(exported), CPU, {**CLASSES, 6: 5})(images, users)
    assert what in str(caught.value)


def test_a_judge_for_batches_of_one_size_says_so(tmp_path):
    path = save(tmp_path / "judge.pt2", batch_size=4)
    judge = load_judge(str(path), CPU, CLASSES)
    assert judge(IMAGES[:4], USERS[:4]).table.shape == (4, 2)
    with pytest.raises(ValueError, match=r"takes no images of 6 x 3 x 16 x 16"):
        judge(IMAGES, USERS)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (3, 5), (6, 5, 1)])
def test_an_output_of_another_shape(shape, tmp_path):
    class Wrong(torch.nn.Module):
        def forward(self, images):
            return images.sum() + torch.zeros(shape)

    path = tmp_path / "judge.pt"
    torch.jit.trace(Wrong(), torch.zeros(6, 3, SIDE, SIDE)).save(path)
    with pytest.raises(ValueError, match=rf"returns \[{', '.join(map(str, shape))}\] for 6 images"):
        load_judge(str(path), CPU, CLASSES)(IMAGES, USERS)


# Files that would run code


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewritten(source: Path, target: Path, change) -> Path:
    """Copy a .pt2 file, with `change(name, data)` in place of each member; None leaves one out."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            data = change(name.partition("/")[2], archive.read(name))
            if data is not None:
                copy.writestr(name, data)
    return target


def in_json(member, edit):
    """Return a change that edits the parsed JSON of one member."""

    def change(name, data):
        if name != member:
            return data
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return change


def pickled(path):
    buffer = io.BytesIO()
    torch.save({"x": Touch(path)}, buffer)
    return buffer.getvalue()


def test_a_copy_of_a_program_loads(exported, tmp_path):
    copy = rewritten(exported, tmp_path / "copy.pt2", in_json("models/model.json", lambda content: None))
    assert load_network(copy, CPU)(torch.zeros(3, 3, SIDE, SIDE)).shape == (3, NUM_CLASSES)


def _nodes(content):
    return content["graph_module"]["graph"]["nodes"]


def _set_size(text):
    def edit(content):
        for value in content["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text
                elif "as_int" in size:
                    size.clear()
                    size["as_expr"] = {"expr_str": text, "hint": None}

    return edit


def malicious(kind, exported, target):
    """Write a program that would make the file `target.mark` if it were trusted."""
    mark = target.with_suffix(".mark")
    evil = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    edits = {
        "a size": _set_size(evil),
        "a size without quotes": _set_size("exit()"),
        "an operator": lambda content: _nodes(content)[0].update(target="torch.os.system"),
        "an operator's name": lambda content: _nodes(content)[0].update(name=f"x = {evil}\n    y"),
        "a class": lambda content: content["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec=json.dumps(
                [
                    1,
                    {
                        "type": "builtins.tuple",
                        "context": '{"__enum__": true, "fqn": "antigravity:x"}',
                        "children_spec": [],
                    },
                ]
            )
        ),
    }
    if kind in edits:
        return rewritten(exported, target, in_json("models/model.json", edits[kind]))
    if kind == "example inputs":
        return rewritten(exported, target, lambda name, data: pickled(mark) if name.endswith("model.pt") else data)
    if kind in ("pickled weights", "pickled constants"):
        what = kind.partition(" ")[2]
        member = f"data/{what}/model_{what}_config.json"

        def make_pickle(content):
            entry = {
                "path_name": "tensor_0" if what == "constants" else "weight_0",
                "is_param": False,
                "use_pickle": True,
            }
            content["config"]["weights"] = {**entry, "tensor_meta": None}

        rewritten(exported, target, in_json(member, make_pickle))
        with zipfile.ZipFile(target, "a") as archive:
            archive.writestr(f"judge/data/{what}/{'tensor_0' if what == 'constants' else 'weight_9'}", pickled(mark))
        return target
    rewritten(exported, target, lambda name, data: data)
    members = {
        "a compiled library": "data/aotinductor/model/model.so",
        "an object": "data/constants/opaque_obj_0",
        "old weights": "data/weights/model.pt",
    }
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(f"judge/{members[kind]}", pickled(mark))
    return target


MALICIOUS = (
    *("a size", "a size without quotes", "an operator", "an operator's name", "a class", "example inputs"),
    *("pickled weights", "pickled constants", "a compiled library", "an object", "old weights"),
)


@pytest.mark.parametrize("kind", MALICIOUS)
def test_nothing_in_a_program_is_run(kind, exported, tmp_path):
    path = malicious(kind, exported, tmp_path / "evil.pt2")
    with pytest.raises(ValueError, match=r"evil\.pt2"):
        load_network(path, CPU)
    assert not path.with_suffix(".mark").exists()


@pytest.mark.parametrize("kind", ["a size", "example inputs"])
def test_torch_itself_would_run_it(kind, exported, tmp_path):
    """Hold the test above to its word: these files do what they are refused for."""
    path = malicious(kind, exported, tmp_path / "evil.pt2")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch makes of the rest
        torch.export.load(path)
    assert path.with_suffix(".mark").exists()


@pytest.mark.parametrize("name", ["judge.pt", "judge.torchscript"])
def test_no_pickle_is_run_as_torchscript(name, tmp_path):
    path = tmp_path / name
    torch.save(Touch(tmp_path / "mark"), path)
    with pytest.raises(ValueError, match="judge"):
        load_network(path, CPU)
    script = tmp_path / "script.pt"
    save(script)
    with zipfile.ZipFile(script) as archive, zipfile.ZipFile(path, "w") as copy:
        for member in archive.namelist():
            is_data = member.endswith(("data.pkl", "constants.pkl"))
            copy.writestr(member, pickle.dumps(Touch(tmp_path / "mark")) if is_data else archive.read(member))
    with pytest.raises(ValueError, match="judge"):
        load_network(path, CPU)
    assert not (tmp_path / "mark").exists()
