"""A batch on the device: what a job does when it does not fit, cannot be compiled, or comes later than it was begun."""

import threading
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InductorError

from tests.checkpoints import model_flags
from tests.jobs import play_processes, run_job, tree
from userdiff import load_model, parse_args
from userdiff.diffusion import generate, gpu_errors
from userdiff.job import run as runner
from userdiff.shutdown import Failed, Halted


@pytest.fixture
def job(checkpoint, tmp_path):
    flags = [*model_flags(checkpoint), "--num_inference_steps", 1, "--num_images_per_user", 4, "--device", "cpu"]
    return [*flags, "--output_dir", tmp_path / "out"]


@pytest.fixture
def memory(monkeypatch):
    """Let batches above a size fail; those below leave so many bytes free."""
    start = generate._compute

    def limit(largest, error, free_bytes=lambda size: 2**40):
        last = []

        def limited(config, model, items, *args):
            last[:] = [len(items)]
            if len(items) > largest:
                raise error
            return start(config, model, items, *args)

        monkeypatch.setattr(generate, "_compute", limited)
        monkeypatch.setattr(gpu_errors, "free_memory", lambda device: free_bytes(*last))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    return limit


def recorded():
    """What torch makes of a lack of memory while a CUDA graph is recorded."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    return error


def error_line(capsys):
    """The one line of a job that failed; beside it, a progress bar."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error" in line]
    return line


TOO_SMALL = {
    "torch's, on a CPU": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    "another library's": MemoryError("std::bad_alloc"),
    "torch's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CUDA runtime's": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),
    "cuBLAS's": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN's": RuntimeError("GET was unable to find an engine to execute this computation"),
    "cuDNN's own": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "the driver's": RuntimeError("CUDA driver error: out of memory"),
    "HIP's": RuntimeError("HIP error: out of memory"),
    "Triton's": RuntimeError("Triton Error [CUDA]: out of memory"),
    "a compiler's": InductorError(torch.OutOfMemoryError("CUDA out of memory."), None),
    "a recording's": recorded(),
}


@pytest.mark.parametrize("error", TOO_SMALL.values(), ids=TOO_SMALL)
def test_every_lack_of_memory_ends_in_a_size_that_does(job, memory, capsys, error):
    memory(5, error)
    assert run_job(*job, "--batch_size", 32) == 1
    line = error_line(capsys)
    assert line.startswith("batch_generate.py: error: --batch_size: 32 images at a time do not fit into the memory of ")
    assert ", --batch_size 4 would do; 0 of 20 images" in line


def test_with_the_size_that_does_the_job_goes_on(job, tmp_path, memory, capsys):
    assert run_job(*job, "--num_images_per_user", 1, "--batch_size", 3) == 0
    memory(3, TOO_SMALL["torch's"])
    capsys.readouterr()
    assert run_job(*job, "--batch_size", 16) == 1
    assert ", --batch_size 2 would do; 5 of 20 images are in " in error_line(capsys)
    assert run_job(*job, "--batch_size", 2) == 0
    assert len(tree(tmp_path / "out")) == 20 + 1


def test_the_size_that_does_leaves_headroom(job, memory, capsys):
    """With less, cuDNN silently takes another engine where its workspace does not fit."""
    memory(20, TOO_SMALL["torch's"], lambda size: gpu_errors.HEADROOM if size <= 4 else gpu_errors.HEADROOM - 1)
    assert run_job(*job, "--batch_size", 32) == 1
    assert ", --batch_size 4 would do; " in capsys.readouterr().err


def test_what_a_try_that_failed_held_counts_against_no_other(job, monkeypatch):
    """A card of 80 GiB: an image takes 1 GiB in a pass, and a recording would hold as much again."""
    asked = parse_args([str(flag) for flag in job])
    model = replace(load_model(asked), device=torch.device("cuda", 0))
    total, peak, tried = 80 * 2**30, [0], []

    def start(config, model, items):
        tried.append(len(items))
        peak[0] = max(peak[0], min(len(items) * 2**30, total))
        if len(items) * 2**30 > total:
            raise TOO_SMALL["torch's"]
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(generate, "_compute", start)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - tried[-1] * 2**30, total))
    assert generate._fitting_batch_size(asked, model, 256) == 32
    assert tried == [128, 64, 32]


def test_one_image_needs_none(job, memory, capsys):
    memory(20, TOO_SMALL["torch's"], lambda size: 0)
    assert run_job(*job, "--batch_size", 32) == 1
    assert ", --batch_size 1 would do; " in capsys.readouterr().err


def test_a_card_that_is_nearly_full_is_told_of_once(job, tmp_path, monkeypatch, capsys):
    assert run_job(*job, "--output_dir", tmp_path / "roomy") == 0
    assert "memory free" not in capsys.readouterr().err
    monkeypatch.setattr(gpu_errors, "free_memory", lambda device: gpu_errors.HEADROOM // 2)
    assert run_job(*job, "--batch_size", 3) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "memory free" in line]
    assert "batches of 3 leave 537MB" in line
    assert "smaller --batch_size" in line
    assert len(tree(tmp_path / "out")) == 21


def test_what_no_size_helps_against_is_said_in_its_own_words(job, memory, capsys):
    """cuDNN has no engine for other reasons, too."""
    memory(0, TOO_SMALL["cuDNN's"])
    assert run_job(*job, "--batch_size", 2) == 1
    assert "nor does one alone (GET was unable to find an engine to execute this computation); " in error_line(capsys)


def test_models_that_do_not_fit_are_one_line(job, monkeypatch, capsys):
    def load_model(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(runner, "load_model", load_model)
    assert run_job(*job) == 1
    line = error_line(capsys)
    assert line.startswith(
        "batch_generate.py: error: --device: the models do not fit into the memory that cpu has free (CUDA "
    )


BROKEN = {
    "in use": RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore"),
    "the driver": RuntimeError("CUDA driver error: unknown error"),
    "Triton": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "launched": RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
}


@pytest.mark.parametrize("error", BROKEN.values(), ids=BROKEN)
def test_a_card_that_fails_is_one_line(job, memory, capsys, error):
    memory(0, error)
    assert run_job(*job) == 1
    line = error_line(capsys)
    assert line.startswith(
        f"batch_generate.py: error: --device: the GPU failed ({str(error).splitlines()[0]}); 0 of 20"
    )


def test_a_card_that_fails_later_is_too(job, monkeypatch, capsys):
    """Kernels run while the host is elsewhere: it hears of their failure when it asks for the images."""

    class Event:
        def query(self):
            raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    start = generate._compute
    monkeypatch.setattr(generate, "_compute", lambda *args: replace(start(*args), arrival=Event()))
    assert run_job(*job, "--batch_size", 2) == 1
    line = error_line(capsys)
    assert line.startswith(
        "batch_generate.py: error: --device: the GPU failed (CUDA error: unspecified launch failure); "
    )


def test_a_fault_of_ours_is_not_taken_for_the_cards(job, memory):
    memory(0, RuntimeError("shape '[2, 3]' is invalid for input of size 5"))
    with pytest.raises(RuntimeError, match="is invalid for input"):
        run_job(*job)


def test_failed_is_what_a_gpu_error_becomes():
    with pytest.raises(Failed) as raised, gpu_errors.as_failed():
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert raised.value.exit_status == 1
    assert isinstance(raised.value.__cause__, RuntimeError)


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
            return generate.Batch(**{**vars(batch), "arrival": arrival})

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
    compute = generate.start

    def start(*args):
        if not hasattr(devices, "mine"):
            devices.mine = Device()
            seen.append(devices.mine)
        return devices.mine.start(compute)(*args)

    monkeypatch.setattr(generate, "start", start)
    assert play_processes(num_processes, *flags) == [0] * num_processes
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert max(device.most_under_way for device in seen) == 2
    assert not any(device.under_way for device in seen)


def test_what_has_arrived_when_a_job_ends_is_written(job, tmp_path, monkeypatch):
    compute = generate.start
    device = Device()
    ended = []

    def start(*args):
        if device.begun == 2:
            ended.append(True)
            raise Halted("enough")
        return device.start(compute)(*args)

    monkeypatch.setattr(generate, "start", start)
    monkeypatch.setattr(Arrival, "query", lambda arrival: arrival.number < device.begun or bool(ended))
    assert run_job(*job, "--batch_size", 3) == 1
    assert len([*(tmp_path / "out").glob("user_*/*.png")]) == 6  # the second came just when the job ended
