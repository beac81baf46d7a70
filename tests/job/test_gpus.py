"""What a job decides because of GPUs, as far as it can be known without one: a card is played where one is needed."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from tests.checkpoints import model_flags
from tests.jobs import images_in, last_run, play_processes, run_job, tree
from userdiff import config, make_image
from userdiff.cli import main
from userdiff.config import UsageError, parse_args
from userdiff.diffusion import acceleration
from userdiff.diffusion import model as loading
from userdiff.diffusion import sampler as sampling
from userdiff.diffusion.acceleration import Compilation
from userdiff.diffusion.model import load_model
from userdiff.job import run as runner
from userdiff.job.store import Coordinator

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INDUCTOR = Compilation(options={"backend": "inductor"})


@pytest.fixture
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", "1", "--num_images_per_user", "2"]


@pytest.fixture
def job(flags, tmp_path):
    return [*flags, "--device", "cpu", "--output_dir", str(tmp_path / "out")]


@pytest.fixture
def card(monkeypatch):
    """A machine with GPUs of a kind, as torch tells of it."""

    def play(number=1, *, has_bf16=True, free=2**40):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 2**40))
        monkeypatch.setattr(torch.cuda, "device", lambda device: memoryview(b""))  # any context will do
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

    return play


@pytest.fixture
def alone():
    with Coordinator(HashStore, 0, 1) as coordinator:
        yield coordinator


# Devices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "requested", "device"),
    [
        ({}, "auto", "cuda:0"),
        ({"LOCAL_RANK": "3"}, "auto", "cuda:0"),  # left over: no launcher started this process
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1"}, "auto", "cuda:1"),
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "3"}, "cuda", "cuda:1"),  # more processes than GPUs
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "3"}, "cpu", "cpu"),
        ({"ACCELERATE_USE_CPU": "true"}, "auto", "cpu"),
        ({"ACCELERATE_USE_CPU": "true"}, "cuda", "cuda:0"),
    ],
)
def test_each_process_of_a_machine_has_the_gpu_that_accelerate_would_give_it(
    card, monkeypatch, environment, requested, device
):
    card(2)
    current = [0]
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runner.choose_device(requested) == torch.device(device)


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "launcher", "has_bf16", "precision"),
    [
        (None, "bf16", True, "bf16"),
        (None, "bf16", False, "fp16"),
        (None, "no", False, "no"),
        (None, "fp16", True, "fp16"),
        ("no", "bf16", False, "no"),
        ("fp16", "bf16", True, "fp16"),
        ("bf16", "no", True, "bf16"),
    ],
)
def test_the_launchers_bf16_is_fp16_on_a_card_without(
    flags, card, alone, monkeypatch, capsys, flag, launcher, has_bf16, precision
):
    card(has_bf16=has_bf16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    asked = parse_args([*flags, *(["--mixed_precision", flag] if flag else [])])
    assert runner._precision(asked, GPU, alone) == precision
    assert runner._precision(asked, CPU, alone) == (flag or launcher)
    said = capsys.readouterr().out
    assert ("Tesla T4" in said and "fp16" in said) == (launcher == "bf16" and not has_bf16 and flag is None)


def test_bf16_that_was_asked_for_is_refused_where_there_is_none(card):
    card(has_bf16=False)
    with pytest.raises(UsageError, match=r"^--mixed_precision: Tesla T4 has no bf16, use fp16$"):
        loading._check_precision("bf16", GPU)
    loading._check_precision("bf16", CPU)


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "force_upcast", "expected"),
    [
        ("fp16", GPU, True, True, "bf16"),
        ("fp16", GPU, False, True, "no"),
        ("fp16", CPU, True, True, "no"),
        ("fp16", GPU, True, False, "fp16"),
        ("bf16", GPU, True, True, "bf16"),
        ("no", GPU, True, True, "no"),
    ],
)
def test_the_vae_is_kept_from_overflow(flags, card, precision, device, has_bf16, force_upcast, expected):
    card(has_bf16=has_bf16)
    vae = load_model(parse_args(flags)).vae
    vae.register_to_config(force_upcast=force_upcast)
    assert loading._vae_precision(vae, device, precision) == expected


def test_the_identity_names_a_vae_in_bf16_and_no_other(flags):
    asked = parse_args(flags)

    def identity(precision, vae_precision):
        return loading._identity(asked, {}, precision, vae_precision, "trained", shifts_latents=False)

    assert identity("fp16", "bf16")["vae_precision"] == "bf16"
    for precision, vae_precision in [("no", "no"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "no")]:
        assert "vae_precision" not in identity(precision, vae_precision)


# Sizes and layouts ---------------------------------------------------------------------------------------------------


def test_a_new_folder_has_batches_of_its_devices_size_and_an_old_one_keeps_its_own(job, tmp_path, monkeypatch):
    assert config.DEFAULT_BATCH_SIZE == {"cpu": 16, "cuda": 64}
    asked = parse_args(job)
    model = load_model(asked)
    seen = []
    monkeypatch.setattr(runner, "WAVES_IN_VAIN", 1)
    monkeypatch.setattr(runner, "make_images", lambda config, model, plan, *_, **__: seen.append(plan.batch_size))
    for device, folder in ((CPU, "cpu"), (GPU, "gpu"), (CPU, "gpu")):
        with Coordinator(HashStore, 0, 1) as coordinator:
            monkeypatch.setattr(loading.JobModel, "device_name", "a card")
            runner.run_process(replace(asked, output_dir=tmp_path / folder), replace(model, device=device), coordinator)
    assert seen == [16, 64, 64]


@pytest.mark.parametrize(
    ("num_images", "parts"), [(64, [16] * 4), (16, [16]), (24, [12] * 2), (7, [7]), (17, [1] * 17)]
)
def test_a_gpu_decodes_sixteen_at_once(num_images, parts):
    with torch.device("meta"):
        decoded = []
        vae = torch.nn.Linear(1, 1)
        vae.config = type("Config", (), {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None})
        vae.decode = lambda part, return_dict: (decoded.append(len(part)), (part,))[1]
    latents = torch.zeros(num_images, 4, 2, 2)
    sampling.decode(vae, OnGpu(latents))
    assert decoded == parts
    decoded.clear()
    sampling.decode(vae, latents)
    assert max(decoded) <= 4


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = GPU


def test_channels_lie_side_by_side_only_where_that_pays():
    regional = replace(INDUCTOR, is_regional=True)
    assert acceleration.memory_format(CPU, None) is torch.channels_last
    assert acceleration.memory_format(CPU, INDUCTOR) is torch.channels_last
    assert acceleration.memory_format(GPU, INDUCTOR) is torch.channels_last
    assert acceleration.memory_format(GPU, None) is torch.contiguous_format
    assert acceleration.memory_format(GPU, regional) is torch.contiguous_format


# Kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "version", "device", "refusal"),
    [
        ("inductor", "2.6.0", GPU, r"^--dynamo_backend: torch 2\.6\.0.* needed: torch 2.10 or later"),
        ("inductor", "2.9.1+cu128", GPU, r"^--dynamo_backend: torch 2\.9\.1.* needed: torch 2.10 or later"),
        ("inductor", "2.6.0", CPU, None),
        ("inductor", "2.10.0+cu130", GPU, None),
        ("inductor", "2.13.0", GPU, None),
        ("inductor", "3.0.0a0", GPU, None),
        # A job records its passes in any case; inside a recording, Inductor's would fail.
        ("cudagraphs", "3.0.0a0", GPU, r"^--dynamo_backend: cudagraphs compiles nothing .* needed: inductor or no$"),
    ],
)
def test_kernels_that_an_old_torch_would_time_are_refused(flags, card, monkeypatch, backend, version, device, refusal):
    card()
    monkeypatch.setattr(torch, "__version__", version)
    compilation = Compilation(options={"backend": backend})
    if refusal is None:
        compilation.check(device)
    else:
        with pytest.raises(UsageError, match=refusal):
            load_model(parse_args(flags), device, "no", compilation)


def test_numerics_note_what_chooses_the_kernels(job, card, monkeypatch):
    asked = parse_args(job)
    model = load_model(asked)

    def numerics(model):
        return runner.numerics_of(asked, model, *asked.batch_size_and_level({}, model.device.type))

    on_cpu = numerics(model)
    assert on_cpu["threads_per_process"] == torch.get_num_threads()
    assert not {"cuda", "cudnn", "triton", "zlib"} & set(on_cpu)
    card()
    monkeypatch.setattr(runner, "version", lambda package: f"{package} 3.6.0")
    on_gpu = numerics(replace(model, device=GPU))
    assert on_gpu == {
        **{
            name: on_cpu[name]
            for name in on_cpu.keys() - {"threads_per_process", "cpu", "cpu_capability", "cpu_settings"}
        },
        "batch_size": 64,
        "device": "Tesla T4",
        "cuda": "13.0",
        "cudnn": 91900,
    }
    assert numerics(replace(model, device=GPU, compiled="inductor"))["triton"] == "triton 3.6.0"


def test_a_folder_begun_by_an_earlier_version_does_not_warn_of_what_it_could_not_note(job, tmp_path, capsys):
    assert run_job(*job) == 0
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text())
    del record["numerics"]["png_compress_level"]
    record["numerics"] |= {"cudnn": 1}  # of a device that this one is not
    path.write_text(json.dumps(record))
    assert run_job(*job, "--num_images_per_user", 3) == 0
    assert "when this folder was begun" not in capsys.readouterr().err
    assert run_job(*job, "--num_images_per_user", 4, "--png_compress_level", 1) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "when this folder was begun" in line]
    assert "png_compress_level was 6" in line
    assert "--png_compress_level 6 keeps it" in line


# Processes and cards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uuids", "num_visible", "warns"),
    [
        ("aaa", 1, True),
        ("ababab", 2, True),
        ("ab", 2, False),
        ("a", 8, False),
        ("abcdefgh", 1, False),  # a wrapper shows each process its own
    ],
)
def test_processes_that_share_a_card_are_told_of(flags, card, monkeypatch, capsys, uuids, num_visible, warns):
    card(num_visible)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(uuids)))
    store = HashStore()
    for process_index, uuid in enumerate(uuids):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid))
        with Coordinator(lambda: store, process_index, len(uuids)) as coordinator:
            runner._look_at_gpus(parse_args(flags), GPU, coordinator)
    said = capsys.readouterr().err
    assert said.count("Warning") == warns
    if warns:
        assert f"{len(uuids)} processes" in said
        assert f"{num_visible} GPU" in said
        assert f"--num_processes {num_visible}" in said


@pytest.mark.parametrize(
    ("in_dev", "environment", "device", "warns"),
    [
        (1, {}, "auto", True),  # a broken driver, or a build of torch without CUDA
        (2, {"ACCELERATE_USE_CPU": "true"}, "auto", False),
        (2, {}, "cpu", False),
        (0, {}, "auto", False),
        (0, {"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_WORLD_SIZE": "8"}, "auto", True),  # multi_gpu.yaml, no GPU
        (0, {"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_WORLD_SIZE": "8"}, "cpu", False),
        (0, {"ACCELERATE_USE_CPU": "False"}, "auto", True),  # single_gpu.yaml, no GPU
        (0, {"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "8"}, "auto", False),  # cpu.yaml
    ],
)
def test_a_job_for_gpus_that_runs_on_the_cpu_says_so(
    flags, card, alone, monkeypatch, capsys, in_dev, environment, device, warns
):
    card(0)
    glob = Path.glob
    nodes = [Path(f"/dev/nvidia{number}") for number in range(in_dev)]
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(nodes) if str(path) == "/dev" else glob(path, pattern))
    for name, value in {**environment, **({"TORCHELASTIC_RUN_ID": "none"} if len(environment) == 2 else {})}.items():
        monkeypatch.setenv(name, value)
    runner._look_at_gpus(parse_args([*flags, "--device", device]), CPU, alone)
    said = capsys.readouterr().err
    assert ("torch finds no GPU" in said) == warns
    if warns:
        assert f"({in_dev} " in said
        assert f"{os.environ.get('LOCAL_WORLD_SIZE', '1')} process" in said


# Encoding ------------------------------------------------------------------------------------------------------------


def test_a_fast_level_makes_the_same_pixels_is_noted_and_kept(job, tmp_path, capsys):
    plain, fast, grown = (tmp_path / name for name in ("plain", "fast", "grown"))
    assert run_job(*job, "--output_dir", plain) == 0
    assert run_job(*job, "--output_dir", fast, "--png_compress_level", 1) == 0
    for path in images_in(plain):
        with Image.open(path) as image, Image.open(fast / path.relative_to(plain)) as twin:
            assert image.tobytes() == twin.tobytes()
            assert image.text == twin.text
    numerics = last_run(fast)["numerics"]
    assert numerics["png_compress_level"] == 1
    assert numerics["zlib"]
    assert main(["verify", str(fast), "--deep"]) == 0
    asked = parse_args([*job, "--output_dir", str(fast)])
    for level, folder in ((1, fast), (None, fast), (6, plain)):  # None: as the folder began
        image = make_image(replace(asked, png_compress_level=level), load_model(asked), 2, 1)
        assert image == (folder / "user_02" / "generated_001.png").read_bytes()

    for num_images, level in ((1, [1]), (2, [])):
        flags = [word for number in level for word in ("--png_compress_level", number)]
        more = [*job, "--num_images_per_user", num_images, "--output_dir", grown, *flags]
        assert play_processes(2, *more) == [0, 0]
    assert tree(grown) == tree(fast)
    assert "png_compress_level" not in capsys.readouterr().err
