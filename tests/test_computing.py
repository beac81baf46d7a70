"""A batch on the device: what a job does when it does not fit, cannot be compiled, or comes later than it was begun."""

import threading
from dataclasses import dataclass, field

import pytest
import torch

from tests.checkpoints import model_flags
from tests.jobs import play_processes, run_job, tree
from userdiff import computing, runner


@pytest.fixture
def job(checkpoint, tmp_path):
    flags = [*model_flags(checkpoint), "--num_inference_steps", 1, "--num_images_per_user", 4, "--device", "cpu"]
    return [*flags, "--output_dir", tmp_path / "out"]


@pytest.fixture
def memory(monkeypatch):
    """Let batches of no more than so many images fit into memory."""
    start = computing._start

    def limit(largest, error):
        def limited(config, model, items, *args):
            if len(items) > largest:
                raise error
            return start(config, model, items, *args)

        monkeypatch.setattr(computing, "_start", limited)

    return limit


OUT_OF_MEMORY = {
    "a GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "torch's, on a CPU": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    "another library's": MemoryError("std::bad_alloc"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_out_of_memory_names_a_batch_size_that_would_do(job, tmp_path, memory, capsys, error):
    assert run_job(*job, "--num_images_per_user", 1, "--batch_size", 3) == 0
    memory(3, error)
    capsys.readouterr()
    assert run_job(*job, "--batch_size", 16) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("batch_generate.py: error: --batch_size: 16 images at a time do not fit into the memory of ")
    assert ", --batch_size 2 would do; 5 of 20 images are in " in line
    assert run_job(*job, "--batch_size", 2) == 0
    assert len(tree(tmp_path / "out")) == 20 + 1


def test_a_model_too_large_for_a_single_image_says_so(job, memory, capsys):
    memory(0, OUT_OF_MEMORY["a GPU's"])
    assert run_job(*job) == 1
    assert "do not fit into the memory of " in (error := capsys.readouterr().err)
    assert ", nor does one alone (CUDA out of memory. Tried to allocate 2.00 GiB.); " in error


def test_another_runtime_error_is_not_taken_for_memory(job, memory):
    memory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_job(*job)


def test_without_a_compiler_one_line_says_how_to_do_without(job, capsys, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")  # fails the same, in less time
    with config.patch({"cpp.cxx": ("no-such-compiler",), "freezing": False}):  # the second is set by the job
        assert run_job(*job) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("batch_generate.py: error: the models cannot be compiled (")
    assert "--dynamo_backend no does without; 0 of 20 images are in " in error


@dataclass
class Device:
    """Computes like a GPU: what was begun is done when the next but one is begun, or when somebody waits for it."""

    begun: int = 0
    under_way: list = field(default_factory=list)
    most_under_way: int = 0
    waited: int = 0

    def start(self, compute):
        def start(*args):
            self.begun += 1
            arrival = Arrival(self, self.begun)
            self.under_way.append(arrival)
            self.most_under_way = max(self.most_under_way, len(self.under_way))
            batch = compute(*args)
            return computing.Batch(**{**vars(batch), "arrival": arrival})

        return start


@dataclass
class Arrival:
    device: Device
    number: int
    asked: int = 0

    def query(self):
        self.asked += 1
        is_there = self.asked > 3
        if is_there and self in self.device.under_way:
            self.device.under_way.remove(self)
        return is_there


@pytest.mark.parametrize("num_processes", [1, 3])
def test_batches_that_arrive_late_are_all_written(job, tmp_path, monkeypatch, num_processes):
    flags = [*job, "--batch_size", 3]
    assert run_job(*flags, "--output_dir", tmp_path / "expected") == 0
    devices = threading.local()
    seen = []
    compute = computing.start

    def start(*args):
        if not hasattr(devices, "mine"):
            devices.mine = Device()
            seen.append(devices.mine)
        return devices.mine.start(compute)(*args)

    monkeypatch.setattr(computing, "start", start)
    assert play_processes(num_processes, *flags) == [0] * num_processes
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert max(device.most_under_way for device in seen) == 2
    assert not any(device.under_way for device in seen)


def test_what_has_arrived_when_a_job_ends_is_written(job, tmp_path, monkeypatch):
    compute = computing.start
    device = Device()
    ended = []

    def start(*args):
        if device.begun == 2:
            ended.append(True)
            raise runner.Halted("enough")
        return device.start(compute)(*args)

    monkeypatch.setattr(computing, "start", start)
    monkeypatch.setattr(Arrival, "query", lambda arrival: arrival.number < device.begun or bool(ended))
    assert run_job(*job, "--batch_size", 3) == 1
    assert len([*(tmp_path / "out").glob("user_*/*.png")]) == 6  # the second came just when the job ended
