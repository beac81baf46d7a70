"""A job killed at every instant at which it changes the disk, and whatever else may happen to its folder."""

import gc
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from tests.checkpoints import model_flags
from tests.jobs import tree
from userdiff.config import UsageError, parse_args
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import read_lines
from userdiff.dataset.run_record import RunRecord
from userdiff.dataset.scan import find_finished
from userdiff.diffusion.model import load_model
from userdiff.job.run import run_process
from userdiff.job.store import Coordinator
from userdiff.tools.merge import merge

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Killed(BaseException):
    """What SIGKILL is to a process: from here on it changes nothing."""


class Death:
    """Raises Killed at the n-th change of a folder, and at every later one: nothing is tidied up."""

    def __init__(self):
        self.folder, self.changes_left, self.changes = None, 0, 0
        sys.addaudithook(self._hook)  # there is no taking it away: without a folder it does nothing

    def _hook(self, event, args):
        if self.folder is None or (event != "open" and event not in CHANGES):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        if str(args[0]).startswith(self.folder) and ".userdiff.lock" not in str(args[0]):
            self.changes += 1
            if self.changes > self.changes_left:
                raise Killed

    def __call__(self, folder, changes_left):
        self.folder, self.changes_left, self.changes = str(folder), changes_left, 0
        return self

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.folder = None
        return kind is Killed


@pytest.fixture(scope="module")
def death():
    gc.collect()
    gc.freeze()  # what is there by now is not looked through again by each `gc.collect`
    yield Death()
    gc.unfreeze()


@pytest.fixture(scope="module")
def job(checkpoint):
    """A small job with its model loaded once: `job(folder)` runs it as one process."""
    flags = [*model_flags(checkpoint), "--num_inference_steps", "1", "--num_images_per_user", "3", "--user_ids", "1-2"]
    flags += ["--batch_size", "4", "--device", "cpu"]
    model = load_model(parse_args(flags), torch.device("cpu"), "no")

    def run(folder, *more):
        config = parse_args([*flags, "--output_dir", str(folder), *map(str, more)])
        with Coordinator(HashStore, 0, 1) as coordinator:
            other = replace(model, identity={**model.identity, "seed": config.seed})
            return run_process(config, other, coordinator)

    return run


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert job(folder) == 0
    return folder


def assert_same(folder, undisturbed):
    assert tree(folder) == tree(undisturbed)
    names = {path.name for path in folder.iterdir()}
    assert names - {".userdiff.lock"} == {"user_01", "user_02", "manifest.csv", "run.json", "preview.html"}
    assert json.loads((folder / "run.json").read_text())["history"][-1]["state"] == "ended"


def kill_at_every_change(death, folder, act):
    """Kill `act` at its first change, its second, ... until it gets through; it is called on after each kill."""
    for changes_left in range(10_000):
        with death(folder, changes_left):
            act()
            return changes_left
        gc.collect()  # the lock of a process that is gone goes with it
        yield changes_left


def test_killed_at_any_change_of_the_disk_and_run_again(job, undisturbed, death, tmp_path):
    for number in kill_at_every_change(death, tmp_path, lambda: job(tmp_path / "out")):
        for name, image in whole_images(tmp_path / "out").items():
            assert image == (undisturbed / name).read_bytes()  # nothing half under a final name
        copy = shutil.copytree(tmp_path / "out", tmp_path / f"again_{number}") if number else tmp_path / "again_0"
        assert job(copy) == 0
        assert_same(copy, undisturbed)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert number > 25  # two changes an image, and what comes before and after


def whole_images(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("user_*/generated_*.png")}


def test_killed_again_and_again_one_change_further_each_time(job, undisturbed, death, tmp_path):
    """Each run goes on from what the one before left, and gets a little further."""
    for _ in kill_at_every_change(death, tmp_path, lambda: job(tmp_path / "out")):
        pass
    assert_same(tmp_path / "out", undisturbed)


def test_a_merge_killed_at_any_change_is_made_up_for(job, undisturbed, death, tmp_path):
    begun = tmp_path / "begun"
    with death(begun, 25):
        job(begun)
    gc.collect()
    assert list(begun.glob("manifest.part-*"))
    for _ in kill_at_every_change(death, tmp_path, lambda: merge(begun)):
        pass
    assert not list(begun.glob("manifest.part-*"))
    assert 0 < len(list(read_lines(begun / "manifest.csv"))) == len(whole_images(begun)) < 6
    assert job(begun) == 0
    assert_same(begun, undisturbed)


def test_starting_again_killed_at_any_change_mixes_nothing(job, undisturbed, death, tmp_path):
    """Killed while it removes or while it makes: the next run refuses what is half removed, or ends with the new alone."""
    old, out = tmp_path / "old", tmp_path / "out"
    assert job(old, "--seed", 7, "--num_images_per_user", 4) == 0
    shutil.copytree(old, out)
    refused = 0
    for number in kill_at_every_change(death, out, lambda: job(out, "--overwrite")):
        try:
            assert job(out) == 0
            assert_same(out, undisturbed)
        except UsageError:  # it still has the old record
            assert json.loads((out / "run.json").read_text())["identity"]["seed"] == 7
            refused += 1
        if number % 9 == 0:
            assert job(out, "--overwrite") == 0
            assert_same(out, undisturbed)
        shutil.rmtree(out)
        shutil.copytree(old, out)
    assert 8 < refused < number  # it is the record that goes last
    assert_same(out, undisturbed)


# Any damage


DAMAGE = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
}
UNBELIEVED_DAMAGE = {**DAMAGE, "zeros": lambda data: bytes(len(data))}
IMAGES = [f"user_{user_id:02d}/generated_{image_index:03d}.png" for user_id in (1, 2) for image_index in range(3)]


def apply(damage, path):
    data = damage(path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def finished(folder):
    record = RunRecord.read(folder)
    recipe = Recipe.of(record.identity, record.run)
    return list(find_finished(folder, recipe, record.manifest_sha256).rows)


@st.composite
def mangled(draw, data):
    """Any prefix, any bytes in the midst, any lines twice or in another order."""
    lines = data.splitlines(keepends=True)
    lines = draw(st.lists(st.sampled_from(lines), max_size=2 * len(lines))) if draw(st.booleans()) else lines
    data = b"".join(lines)
    at = draw(st.integers(0, len(data)))
    data = data[:at] + draw(st.binary(max_size=12)) + data[at + draw(st.integers(0, 12)) :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_to_the_folder_no_bad_image_counts_and_no_good_one_is_lost(undisturbed, tmp_path, data):
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(undisturbed, folder)
    truth = {row.file_name: row for row in read_lines(undisturbed / "manifest.csv")}
    content = (undisturbed / "manifest.csv").read_bytes()
    is_believed = data.draw(st.booleans(), label="manifest untouched")
    if not is_believed:
        (folder / "manifest.csv").unlink()
        for name in data.draw(st.lists(st.sampled_from(["manifest.csv", "manifest.part-00000.csv"]), unique=True)):
            (folder / name).write_bytes(data.draw(mangled(content)))
    unchanged = (folder / "manifest.csv").exists() and (folder / "manifest.csv").read_bytes() == content
    kinds = DAMAGE if unchanged else UNBELIEVED_DAMAGE
    damaged = data.draw(st.dictionaries(st.sampled_from(IMAGES), st.sampled_from(list(kinds))), label="damaged")
    for name, kind in damaged.items():
        apply(kinds[kind], folder / name)
    assert finished(folder) == [truth[name] for name in IMAGES if name not in damaged]


@given(damaged=st.dictionaries(st.sampled_from(IMAGES), st.sampled_from(list(DAMAGE)), min_size=1), lose=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_next_run_repairs_any_damage(job, undisturbed, tmp_path, damaged, lose):
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(undisturbed, folder)
    for name, kind in damaged.items():
        apply(DAMAGE[kind], folder / name)
    if lose:
        (folder / "manifest.csv").unlink()
    assert job(folder) == 0
    assert_same(folder, undisturbed)


def test_a_lost_record_is_made_again_where_every_image_is_this_runs(job, undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed, tmp_path / "out")
    (folder / "run.json").unlink()
    (folder / "manifest.csv").unlink()
    assert job(folder) == 0
    assert "6 already there, 0 to make" in capsys.readouterr().out
    assert_same(folder, undisturbed)
