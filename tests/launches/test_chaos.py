"""The short form of `make chaos`, and whether the harness would see what it looks for."""

import shutil
from random import Random

import pytest

from tests import chaos
from tests.checkpoints import model_flags
from tests.damage import DAMAGES, Dataset, Failure
from tests.jobs import run_job
from tests.processes import our_tracebacks

SEED = 72522  # the launcher of two processes is killed, a plain process, then the first of two machines; two damages


@pytest.fixture(scope="module")
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_images_per_user", "5", "--num_inference_steps", "1", "--batch_size", "5"]


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert run_job(*flags, "--output_dir", folder) == 0
    return folder


@pytest.mark.parametrize("kind", DAMAGES, ids=lambda kind: kind.__name__)
def test_damage_is_seen_and_the_next_run_makes_up_for_it(kind, flags, reference, tmp_path):
    dataset = Dataset(tmp_path / "out", flags, reference)
    for choice in range(3):
        shutil.copytree(reference, dataset.folder)
        dataset.check_done()
        shutil.copy(reference / "manifest.csv", dataset.folder / "manifest.part-00000.csv")  # as a killed job leaves it
        kind(Random(choice), dataset.folder, reference)
        with pytest.raises(Failure):
            dataset.check_done()
        assert run_job(*dataset.flags) == 0
        dataset.check_done()
        shutil.rmtree(dataset.folder)


def test_only_the_jobs_own_tracebacks_count():
    launchers = """Traceback (most recent call last):
  File "/venv/lib/python3.12/site-packages/accelerate/commands/launch.py", line 1281, in main
    launch_command(args)
  File "/venv/lib/python3.12/site-packages/torch/distributed/run.py", line 9, in run
torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15
"""
    ours = """[rank1]: Traceback (most recent call last):
[rank1]:   File "/somewhere/userdiff/runner.py", line 3, in save
[rank1]:     raise ValueError("wrong")
[rank1]: ValueError: wrong
"""
    assert our_tracebacks(launchers) == []
    assert our_tracebacks("terminate called without an active exception\n" + launchers) != []
    assert our_tracebacks(f" 12%|# | 7/60\r{ours}{launchers}") == [ours.removeprefix("[rank1]: ").rstrip("\n")]


def test_jobs_that_are_killed_and_damaged_leave_the_bytes_of_one_that_was_not(capsys):
    assert chaos.main(["--kills", "3", "--two_machines_every", "3", "--seed", str(SEED)]) == 0, capsys.readouterr()
