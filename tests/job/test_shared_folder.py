"""Several machines played in one process: do all see the folder that the main process writes to?"""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from tests.checkpoints import model_flags
from tests.definitions import files_in
from tests.jobs import run_job, tree, wait_for
from userdiff.config import UsageError, parse_args
from userdiff.diffusion.model import load_model
from userdiff.job import output_folder, store_client
from userdiff.job.run import run_process
from userdiff.job.store import Coordinator
from userdiff.shutdown import Failed, Shutdown
from userdiff.tools.verify import verify

LEFT_BY_A_KILL = ".userdiff.shared-0123456789abcdef"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(store_client, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(output_folder, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(output_folder, "NUM_LOOKS", 200)


@pytest.fixture
def processes():
    """Make the processes of one job, each on the machine of that number."""
    made: list[Coordinator] = []
    patience = threading.Timer(30, lambda: [coordinator.shutdown.set(Failed("no end")) for coordinator in made])
    patience.start()

    def make(*machines):
        store = HashStore()
        place = {"num_processes": len(machines), "num_machines": max(machines) + 1}
        made.extend(Coordinator(lambda: store, i, machine_index=machine, **place) for i, machine in enumerate(machines))
        return made[-len(machines) :]

    yield make
    patience.cancel()
    for coordinator in made:
        coordinator.__exit__(None, None, None)


@pytest.fixture
def threads():
    pool = ThreadPoolExecutor(8)
    yield pool
    pool.shutdown(wait=False)  # those that still wait learn of the end from their processes


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_main(folder, main, events):
    with output_folder.shown(folder, main):
        events.append(names(folder))


def test_machines_that_see_the_folder_go_on_and_nothing_is_left_there(processes, threads, tmp_path):
    during = []
    for _ in range(2):
        main, *others = processes(0, 1, 2)
        job = threads.submit(run_main, tmp_path, main, during)
        for other in others:
            threads.submit(output_folder.look, tmp_path, other).result(60)
        job.result(60)
        assert names(tmp_path) == []
    (first,), (second,) = during
    assert first.startswith(".userdiff.shared-")
    assert first != second  # every job shows a new name


def test_a_folder_that_appears_late_is_waited_for(processes, threads, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    main, other = processes(0, 1)
    events = []
    job = threads.submit(run_main, here, main, events)
    look = threads.submit(output_folder.look, there, other)
    wait_for(lambda: names(here))
    time.sleep(5 * output_folder.LOOK_SECONDS)
    assert not look.done()
    assert not events
    there.symlink_to(here)
    look.result(60)
    job.result(60)
    assert events


def test_one_process_of_each_machine_is_waited_for_and_the_others_may_come_late(processes, threads, tmp_path):
    main, one, late, two = processes(0, 1, 1, 2)
    is_over = threading.Event()

    def run():
        with output_folder.shown(tmp_path, main):
            begun.set()
            assert is_over.wait(60)

    begun = threading.Event()
    job = threads.submit(run)
    output_folder.look(tmp_path, one)
    assert not begun.wait(0.3)
    output_folder.look(tmp_path, two)
    assert begun.wait(10)
    output_folder.look(tmp_path, late)
    is_over.set()
    job.result(60)


def test_one_machine_shows_and_looks_for_nothing_and_who_loads_its_models_looks_meanwhile(processes, tmp_path):
    main, other = processes(0, 0)
    during = []
    run_main(tmp_path, main, during)
    assert during == [[]]
    output_folder.look(tmp_path / "elsewhere", other)
    main, loading = processes(0, 1)
    output_folder.look_meanwhile(tmp_path, loading)
    run_main(tmp_path, main, during)
    assert len(during) == 2


# Whole jobs


@pytest.fixture(scope="module")
def job(checkpoint):
    """A small job with its model loaded once: the outcome of each process, on a machine and with a folder of its own."""
    flags = [*model_flags(checkpoint), "--num_inference_steps", "1", "--num_images_per_user", "2", "--batch_size", "4"]
    model = load_model(parse_args(flags), torch.device("cpu"), "no")

    def run(*folders, more=()):
        store, number, shutdowns = HashStore(), len(folders), [Shutdown() for _ in folders]

        def play(machine):
            config = parse_args([*flags, "--output_dir", str(folders[machine]), *more])
            place = {"shutdown": shutdowns[machine], "machine_index": machine, "num_machines": number}
            try:
                with Coordinator(lambda: store, machine, number, **place) as coordinator:
                    return run_process(config, model, coordinator)
            except (UsageError, Failed) as error:
                return error

        patience = threading.Timer(60, lambda: [shutdown.set(Failed("no end")) for shutdown in shutdowns])
        patience.start()
        with ThreadPoolExecutor(number) as pool:
            outcomes = list(pool.map(play, range(number)))
        patience.cancel()
        return outcomes

    run.flags = flags
    return run


def test_machines_that_share_a_folder_make_the_bytes_of_one(job, tmp_path):
    assert job(*[tmp_path / "out"] * 3) == [0, 0, 0]
    assert run_job(*job.flags, "--output_dir", tmp_path / "plain") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    assert names(tmp_path / "out") == names(tmp_path / "plain")


@pytest.mark.parametrize("blind", [1, 2])
@pytest.mark.parametrize("is_anew", [False, True])
def test_a_machine_that_does_not_see_the_folder_is_named_and_nothing_changes(
    job, blind, is_anew, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(output_folder, "NUM_LOOKS", 5)
    folders = [tmp_path / "new" / "out"] * 3
    folders[blind] = tmp_path / "elsewhere"
    if is_anew:
        assert job(folders[0]) == [0]
        capsys.readouterr()
    before = files_in(tmp_path)
    outcomes = job(*folders, more=["--overwrite"] if is_anew else [])
    host = socket.gethostname()
    for outcome in outcomes:
        assert outcome.exit_status == 2
        assert str(outcome) == (
            f"--output_dir: {host} does not see what {host} wrote to {folders[0]}; needed: a folder that all machines share"
        )
    assert files_in(tmp_path) == before
    assert names(tmp_path) == (["new"] if is_anew else [])
    assert capsys.readouterr().out == ""


def test_a_dry_run_shows_nothing_and_waits_for_nobody(job, tmp_path):
    assert job(tmp_path / "out", tmp_path / "elsewhere", more=["--dry_run"]) == [0, 0]
    assert names(tmp_path) == []


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_a_killed_job_showed_is_no_damage_and_goes_with_the_next_one(job, more, tmp_path):
    out = tmp_path / "out"
    assert job(out) == [0]
    for name in (LEFT_BY_A_KILL, ".userdiff.shared-notes"):
        (out / name).touch()
    assert verify(out, deep=True) == []
    assert job(out, more=more) == [0]
    assert [name for name in names(out) if name.startswith(".")] == [".userdiff.shared-notes"]
