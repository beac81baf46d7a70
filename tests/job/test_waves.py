"""Processes that die, leave, come late or come back: what they leave undone is made by the others."""

import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed import HashStore

from tests.checkpoints import model_flags
from tests.definitions import files_in, png_of
from tests.jobs import last_run, tree
from userdiff.config import UsageError, parse_args
from userdiff.dataset import layout, scan
from userdiff.dataset.manifest import PartWriter
from userdiff.dataset.rows import read_lines
from userdiff.diffusion.model import load_model
from userdiff.job import group, run, store_client
from userdiff.job.run import run_process
from userdiff.job.store import Coordinator
from userdiff.shutdown import Halted, Shutdown, Stopped
from userdiff.tools.status import read_status
from userdiff.tools.verify import verify


class Killed(BaseException):
    """What SIGKILL is to a process: from here on it does nothing, and tells nobody."""


class Process(Coordinator):
    """A process that is on a machine of its own, and comes to its end at a claim or a row of a certain number."""

    def __init__(self, store, process_index, num_processes, end, has_come):
        self.has_ended_early = False
        self.end, self.has_come, self.counts = end, has_come, {"claim": 0, "row": 0}
        place = {"machine_index": process_index, "num_machines": num_processes, "shutdown": Shutdown()}
        super().__init__(lambda: store, process_index, num_processes, **place)

    def reach(self, point):
        """Count a claim or a row, and come to the end if it is this one."""
        if self.end is None:
            return
        where, number, how = self.end
        self.counts[point] += 1
        if point == where and self.counts[point] > number:
            self.has_ended_early = True
            self.has_come.set()
            if how == "stopped":
                self.shutdown.set(Stopped(signal.SIGTERM))
            else:
                self._client.close()
                raise Killed

    def next_batch(self):
        if self.is_main_process:
            self.has_come.wait(30)
        number = super().next_batch()
        self.reach("claim")  # whatever it has claimed by now, it does not make
        return number


@pytest.fixture(scope="module")
def job(checkpoint):
    """A job with its model loaded once: `job(folder, 3, {1: ("row", 4, "killed")})` plays three processes of it."""
    flags = [*model_flags(checkpoint), "--num_inference_steps", "1", "--num_images_per_user", "9", "--batch_size", "4"]
    model = load_model(parse_args(flags), torch.device("cpu"), "no")

    def play_all(folder, num_processes, ends, *, is_certain=False):
        """With `is_certain`, the main process claims nothing before an end has come."""
        config = parse_args([*flags, "--output_dir", str(folder)])
        store, players, has_come = HashStore(), {}, threading.Event()
        if not is_certain:
            has_come.set()

        def append(part, row):
            number = int(part._path.stem[-5:])
            players[number % num_processes].reach("row")
            append_row(part, row)

        def play(process_index):
            player = Process(store, process_index, num_processes, ends.get(process_index), has_come)
            players[process_index] = player
            try:
                with player:
                    return run_process(config, model, player)
            except (Killed, Halted):
                if not player.has_ended_early:
                    raise

        append_row, PartWriter.append = PartWriter.append, append
        try:
            with ThreadPoolExecutor(num_processes) as threads:
                return list(threads.map(play, range(num_processes)))
        finally:
            PartWriter.append = append_row

    return play_all


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert job(folder, 1, {}) == [0]
    return folder


@pytest.fixture(autouse=True, scope="module")
def impatient():
    """A process that is silent for two seconds is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_client, "PULSE_SECONDS", 0.05)
        patch.setattr(store_client, "LOST_AFTER_PULSES", 40)
        yield


ENDS = st.tuples(st.sampled_from(["claim", "row"]), st.integers(0, 6), st.sampled_from(["killed", "stopped"]))


@given(num_processes=st.integers(2, 8), ends=st.dictionaries(st.integers(1, 7), ENDS))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whoever_dies_or_leaves_the_others_make_every_image_once(job, reference, tmp_path_factory, num_processes, ends):
    out = tmp_path_factory.mktemp("out")
    assert job(out, num_processes, ends)[0] == 0
    assert tree(out) == tree(reference)
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}
    entry = last_run(out)
    assert (entry["state"], entry["published"], entry["failed"]) == ("ended", 45, [])
    assert len(entry.get("lost", [])) <= len(ends)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (("claim", 1, "killed"), "no sign of life"),
        (("row", 2, "killed"), "no sign of life"),
        (("row", 2, "stopped"), "stopped by SIGTERM"),
    ],
)
def test_a_loss_is_told_of_and_recorded(job, reference, tmp_path, capsys, end, how):
    out = tmp_path / "out"
    assert job(out, 3, {1: end}, is_certain=True)[0] == 0
    assert tree(out) == tree(reference)
    which = f"process 1 on {socket.gethostname()}, {how}"
    said = capsys.readouterr()
    assert f"Warning: {which}: lost, the others make what it leaves\n" in said.err
    assert f"Lost: 1 of 3 processes was lost ({which}); the others made what was left\n" in said.out
    if end[0] == "claim":  # of what it has computed, more or less may have come to the disk
        assert "Note: 4 images missing, made in another wave\n" in said.out
    assert last_run(out)["lost"] == [which]
    assert f"The others made what was left in the last run by {which}." in (out / "preview.html").read_text()
    assert (read_status(out).state, verify(out, deep=True)) == ("complete", [])


def test_what_a_lost_machine_noted_is_read_before_it_is_believed(job, reference, tmp_path, monkeypatch):
    """Its rows may name files that its power cut has emptied: here, of the right size."""
    out, find_finished = tmp_path / "out", run.find_finished

    def cut_power_and_find(output_dir, *args, **options):
        for row in read_lines(layout.part_path(output_dir, 1)):
            path = output_dir / row.file_name
            path.write_bytes(bytes(path.stat().st_size))
            emptied.append(row.file_name)
        return find_finished(output_dir, *args, **options)

    emptied = []
    monkeypatch.setattr(run, "find_finished", cut_power_and_find)
    assert job(out, 3, {1: ("row", 3, "killed")}, is_certain=True)[0] == 0
    assert emptied
    assert tree(out) == tree(reference)


def test_whoever_comes_when_all_is_claimed_leaves_no_file_behind(job, tmp_path, monkeypatch):
    """The main process may have merged already, and would not remove it."""
    out, make_images, calls = tmp_path / "out", run.make_images, []

    def make_and_note(config, model, plan, coordinator, **options):
        calls.append((config, model, plan, options))
        make_images(config, model, plan, coordinator, **options)

    monkeypatch.setattr(run, "make_images", make_and_note)
    assert job(out, 1, {}) == [0]
    ((config, model, plan, options),) = calls
    before = files_in(out)
    late = SimpleNamespace(next_batch=lambda: len(plan.batches), part_number=1, check=lambda: None)
    make_images(config, model, plan, late, **options)
    assert files_in(out) == before


def test_images_that_go_while_the_job_runs_are_made_again_by_it(job, reference, tmp_path, monkeypatch, capsys):
    out, make_images, calls = tmp_path / "out", run.make_images, []

    def make_and_lose(*args, **options):
        make_images(*args, **options)
        calls.append(args)
        if len(calls) == 1:
            shutil.rmtree(out / "user_02")

    monkeypatch.setattr(run, "make_images", make_and_lose)
    assert job(out, 1, {}) == [0]
    assert tree(out) == tree(reference)
    assert last_run(out)["published"] == 45
    assert capsys.readouterr().err.count("Warning: the decoded images contradict") == 1


@pytest.mark.parametrize("what", ["the image as an editor saves it", "a folder"])
def test_what_somebody_puts_in_an_images_place_meanwhile_is_left_to_the_next_run(
    job, tmp_path, monkeypatch, capsys, what
):
    out, make_images, calls = tmp_path / "out", run.make_images, []
    path = out / "user_02" / "generated_003.png"

    def make_and_replace(*args, **options):
        make_images(*args, **options)
        calls.append(args)
        if what == "a folder":
            path.unlink()
            path.mkdir()
        else:
            with Image.open(path) as image:
                path.write_bytes(png_of(image.text, image.size, "white"))
            calls.append(path.read_bytes())

    monkeypatch.setattr(run, "make_images", make_and_replace)
    assert job(out, 1, {}) == [1]
    assert len(calls) == 1 if path.is_dir() else calls[1:] == [path.read_bytes()]
    assert last_run(out)["failed"] == [[2, 3]]
    assert "Failed: 1 image is not written, or gone or changed since" in capsys.readouterr().out


def test_what_goes_again_and_again_is_given_up(job, tmp_path, monkeypatch, capsys):
    out, make_images, calls = tmp_path / "out", run.make_images, []

    def make_and_lose(*args, **options):
        make_images(*args, **options)
        calls.append(args)
        (out / "user_02" / "generated_003.png").unlink()

    monkeypatch.setattr(run, "make_images", make_and_lose)
    assert job(out, 1, {}) == [1]
    assert len(calls) == 1 + run.WAVES_IN_VAIN
    assert "Failed: 1 image is not written, or gone or changed since" in capsys.readouterr().out
    assert last_run(out)["failed"] == [[2, 3]]


@pytest.mark.parametrize("how", ["edited", "killed in the second wave"])
def test_what_a_run_made_is_counted_of_what_it_was_to_make(job, tmp_path, monkeypatch, how):
    """A resumed run may lose more finished images than it has to make; the record would not take a number below zero."""
    out, make_images, calls = tmp_path / "out", run.make_images, []
    assert job(out, 1, {}) == [0]
    for index in (7, 8):
        (out / "user_01" / f"generated_{index:03d}.png").unlink()

    def make_and_lose(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        make_images(*args, **options)
        if how != "edited":
            shutil.rmtree(out / "user_02")
            return
        for index in range(5):
            path = out / "user_02" / f"generated_{index:03d}.png"
            with Image.open(path) as image:
                path.write_bytes(png_of(image.text, image.size, "white"))

    monkeypatch.setattr(run, "make_images", make_and_lose)
    if how == "edited":
        assert job(out, 1, {}) == [1]
    else:
        with pytest.raises(Killed):
            job(out, 1, {})
    assert last_run(out)["published"] == 2
    read_status(out)  # takes the record for one of ours


def test_a_wave_that_lost_somebody_is_not_in_vain(job, reference, tmp_path, monkeypatch):
    """Its images may be made very well, by others: here, the one that is left is claimed by two who die of nothing else."""
    out, claim = tmp_path / "out", Process.next_batch
    assert job(out, 1, {}) == [0]
    (out / "user_01" / "generated_007.png").unlink()
    claimed = {1: threading.Event(), 2: threading.Event()}

    def next_batch(process):
        if process.process_index == process._wave:  # process 1 in wave 1, process 2 in wave 2
            Coordinator.next_batch(process)
            claimed[process._wave].set()
            process.has_ended_early = True
            process._client.close()
            raise Killed
        if process._wave in claimed:
            claimed[process._wave].wait(20)
        return claim(process)

    monkeypatch.setattr(Process, "next_batch", next_batch)
    assert job(out, 3, {})[0] == 0
    assert tree(out) == tree(reference)
    assert len(last_run(out)["lost"]) == 2


def test_a_signal_between_waves_is_heard(job, tmp_path, monkeypatch):
    """What a lost machine noted is read then, maybe for minutes."""
    out, read = tmp_path / "out", scan._prove
    num_read = []

    def prove(*args, **options):
        num_read.append(1)
        players[0].shutdown.set(Stopped(signal.SIGTERM))
        return read(*args, **options)

    def begin_wave(process, plan):
        players.append(process)
        process._lost[0] = "as if it were lost"  # so that its part is read
        begin(process, plan)

    players, begin = [], Coordinator.begin_wave
    monkeypatch.setattr(Process, "begin_wave", begin_wave)
    monkeypatch.setattr(scan, "_prove", prove)
    with pytest.raises(Stopped):
        job(out, 1, {})
    assert num_read
    assert last_run(out)["state"] == "stopped by signal 15"
    assert last_run(out)["lost"] == ["as if it were lost"]  # though it ended early


def test_a_main_process_that_the_others_have_given_up_says_so(job, tmp_path, monkeypatch):
    """After a suspension, its launcher ends it with nothing but a signal."""
    out, make_images = tmp_path / "out", run.make_images

    def wake_and_make(config, model, plan, coordinator, **options):
        coordinator._client._pulse = lambda store: None
        coordinator._ask(lambda store: group.set_reason(store, "process 0 has given no sign of life for 60 s"))
        coordinator.shutdown.set(Stopped(signal.SIGTERM))
        make_images(config, model, plan, coordinator, **options)

    monkeypatch.setattr(run, "make_images", wake_and_make)
    with pytest.raises(Stopped):
        job(out, 1, {})
    assert last_run(out)["cause"] == "process 0 has given no sign of life for 60 s"


def test_a_process_with_the_folder_of_another_job_makes_nothing_in_it(checkpoint, tmp_path, monkeypatch):
    """One that is late for a first job of a launch may meet the second one's."""
    flags = [*model_flags(checkpoint), "--num_inference_steps", "1"]
    configs = [parse_args([*flags, "--output_dir", str(tmp_path / name)]) for name in "BA"]
    model, store = load_model(configs[0], torch.device("cpu"), "no"), HashStore()

    monkeypatch.setattr(run, "make_images", lambda *args, on_step, **options: [on_step() for _ in iter(int, 1)])

    def play(process_index):
        with Coordinator(lambda: store, process_index, 2) as coordinator:
            return run_process(configs[process_index], model, coordinator)

    with ThreadPoolExecutor(2) as threads:
        main, late = (threads.submit(play, process_index) for process_index in range(2))
        with pytest.raises(UsageError, match=r"--output_dir: .*A in process 1"):
            late.result(60)
        with pytest.raises(Halted):
            main.result(60)
    assert not (tmp_path / "A").exists()
