"""Bad input, case by case: one line that names the flag, the value and what would be right, and nothing written."""

import json
import logging
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import Shape, make_checkpoint
from tests.jobs import ROOT, finish, run_job, start
from userdiff.config import JobConfig, UsageError

MODEL = ["--vae_path", "model", "--unet_path", "model", "--condition_encoder_path", "model", "--num_users", 5]
SMALL = ["--num_inference_steps", 2, "--num_images_per_user", 1, "--device", "cpu"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER = "condition_encoder.safetensors"
LONG_NAME = 300 * "n"

# What a case asks for is run in a folder that holds these, all good, after `prepare` has spoilt something:
#   model/vae/  model/unet/  model/condition_encoder.safetensors  model/scheduler/scheduler_config.json


# What is spoilt --------------------------------------------------------------------------------------------------------


def write(name, content):
    """A file with this text, these bytes, or this as JSON."""

    def prepare():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            Path(name).write_text(content if isinstance(content, str) else json.dumps(content))

    return prepare


def remove(name):
    return lambda: Path(name).unlink()


def put_folder(name):
    """A folder in a file's place: nobody can read it, root neither."""

    def prepare():
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir()

    return prepare


def link(name, to):
    return lambda: Path(name).symlink_to(to)


def settings(name, **values):
    """Other settings in a JSON file."""

    def prepare():
        file = Path("model", name)
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return prepare


def without_setting(name, key):
    def prepare():
        file = Path("model", name)
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))

    return prepare


def cut(name, num_bytes):
    """A file that ends too early."""
    return lambda: os.truncate(name, Path(name).stat().st_size - num_bytes)


def tensors(name, edit):
    """Other tensors in a safetensors file."""

    def prepare():
        content = load_file(Path("model", name))
        edit(content)
        save_file(content, Path("model", name))

    return prepare


def fill(tensor_name, value):
    return lambda content: content[tensor_name].view(-1)[:1].fill_(value)


def encoder_file(make):
    """A torch file `encoder.pt` with what `make` makes of the good encoder's state dict."""
    return lambda: torch.save(make(load_file(Path("model", ENCODER))), "encoder.pt")


def another_model(shape):
    return lambda: make_checkpoint(Path("other"), shape)


def train_folders(*names):
    return lambda: [Path("train", name).mkdir(parents=True) for name in names]


class Malicious:
    """Unpickled without care, it leaves a file `executed` behind."""

    def __reduce__(self):
        return (Path("executed").touch, ())


def malicious_unet():
    Path("model/unet", WEIGHTS).unlink()
    torch.save({"conv_in.weight": Malicious()}, Path("model/unet/diffusion_pytorch_model.bin"))


UNET = f"unet/{WEIGHTS}"
VAE = f"vae/{WEIGHTS}"
SCHEDULER = "scheduler/scheduler_config.json"


def second_encoder():
    torch.save(
        {name: tensor + 1 for name, tensor in load_file(Path("model", ENCODER)).items()}, "model/condition_encoder.pt"
    )


def nowhere(name, shown=None):
    """A VAE path that leads nowhere; `shown` is the name as the line has it, where that differs."""
    return [f"--vae_path={name}"], f"{shown or name} does not exist", lambda: None


# The table -------------------------------------------------------------------------------------------------------------

Bad = tuple[str | list[str], str, Callable[[], object]]
"""Flags after those of a good job, what the line holds, and what is spoilt before."""


def nothing(): ...


def of_map(content, value):
    return "--user_map map.json", value, write("map.json", content)


def of_encoder(make, value):
    return "--condition_encoder_path encoder.pt", value, encoder_file(make)


def in_folder(prepare, value):
    """Where the flags are those of a good job, and its folder is spoilt."""
    return "", value, prepare


def begun(flags):
    """A dataset that a job made with more flags."""
    return lambda: run_job(*MODEL, *SMALL, "--output_dir", "out", *flags.split())


CASES: dict[str, dict[str, Bad]] = {  # by the flag that the line names
    "--seed": {"below 0": ("--seed -1", "-1", nothing)},
    "--device": {"that is not there": ("--device cuda", "no CUDA device", nothing)},
    "--user_ids": {
        "above the table": ("--user_ids 6", "6 is", nothing),
        "not in the map": ("--user_ids 17 18 --user_map map.json", "18 is", write("map.json", {17: 0, 23: 1})),
    },
    "--train_user_ids": {"more than rows": ("--train_user_ids 1-6", "6 ids", nothing)},
    "--train_data_dir": {
        "not there": ("--train_data_dir no", "no cannot be used", nothing),
        "a file": ("--train_data_dir file", "file cannot be used", write("file", "")),
        "of too few": ("--train_data_dir train", "2 users", train_folders("ID_1", "ID_2")),
        "of nobody": ("--train_data_dir train", "train has no folder", train_folders("a", "b")),
        "beside ids": ("--train_user_ids 1-5 --train_data_dir train", "train goes without", nothing),
    },
    "--guidance_scale": {
        "below 0": ("--guidance_scale -1 --null_condition zeros", "-1.0 is out of range", nothing),
        "no number": ("--guidance_scale nan --null_condition zeros", "nan is out of range", nothing),
    },
    "--null_condition": {
        "not said": ("--guidance_scale 2", "missing with --guidance_scale 2", nothing),
        "unknown": ("--guidance_scale 2 --null_condition none", "'none' is no null condition", nothing),
        "no row": ("--guidance_scale 2 --null_condition row:", "'row:' is no null condition", nothing),
        "beyond the table": ("--guidance_scale 2 --null_condition row:5", "row:5 is out of range", nothing),
    },
    "--guidance_start": {"below 0": ("--guidance_start -0.1", "-0.1 is out of range", nothing)},
    "--guidance_stop": {
        "not after the start": ("--guidance_start 0.5 --guidance_stop 0.5", "0.5 is not after", nothing),
        "above 1": ("--guidance_stop 1.5", "1.5 is out of range", nothing),
    },
    "--null_row": {"beyond the table": ("--null_row 5", "5 is", nothing)},
    "--sample_size": {
        "of three": ("--sample_size 8 8 8", "3 numbers", nothing),
        "of too many pixels": ("--sample_size 10000", "images of ", nothing),
    },
    "--scaling_factor": {
        "0": ("--scaling_factor 0", "0.0 is", nothing),
        "NaN": ("--scaling_factor nan", "nan is", nothing),
    },
    "--user_map": {
        "not JSON": of_map("17: 0", "map.json is not JSON"),
        "an empty file": of_map("", "map.json is not JSON"),
        "not UTF-8": of_map(b"\xff{}", "map.json is not JSON"),
        "nested without end": of_map(100_000 * "[", "map.json is not JSON"),
        "a list": of_map([17, 23], "map.json holds [17, 23]"),
        "a list of pairs": of_map([[17, 0], [23, 1]], "map.json holds [[17, 0], [23, 1]]"),
        "a number": of_map("5", "map.json holds 5"),
        "without users": of_map({}, "map.json names no users"),
        "with a name": of_map({"anna": 0}, "names user 'anna'"),
        "with a float": of_map({"1.0": 0}, "names user '1.0'"),
        "with a user below 0": of_map({"-1": 0}, "names user '-1'"),
        "with a user too large": of_map({str(10**18): 0}, f"names user '{10**18}'"),
        "with a user twice": of_map('{"1": 0, "1": 1}', "names user 1 twice"),
        "with a user twice, by 01": of_map({"1": 0, "01": 1}, "names user 1 twice"),
        "with a row too high": of_map({"1": 5}, "gives user 1 the index 5"),
        "with a row below 0": of_map({"1": -1}, "gives user 1 the index -1"),
        "with a row a float": of_map({"1": 0.0}, "gives user 1 the index 0.0"),
        "with a row in words": of_map({"1": "0"}, "gives user 1 the index '0'"),
        "with two users on a row": of_map({"17": 1, "23": 0, "29": 1}, "users 17 and 29 the same index 1"),
        "a folder": ("--user_map model", "model cannot be used", nothing),
        "not there": ("--user_map no.json", "no.json cannot be used", nothing),
        "a link to itself": ("--user_map loop", "loop cannot be used", link("loop", "loop")),
    },
    "--unet_path": {
        "a VAE": ("--unet_path model/vae", "model/vae holds a AutoencoderKL", nothing),
        "without weights": in_folder(remove(f"model/{UNET}"), "model/unet holds no weights"),
        "weights a folder": in_folder(put_folder(f"model/{UNET}"), "model/unet holds no weights"),
        "weights cut short": in_folder(cut(f"model/{UNET}", 100), f"model/{UNET} cannot be read"),
        "weights malicious": in_folder(malicious_unet, "conv_in.weight"),
        "one tensor missing": in_folder(tensors(UNET, lambda content: content.pop("conv_out.bias")), "no tensor conv_out.bias"),
        "inf": in_folder(tensors(UNET, fill("conv_in.bias", float("inf"))), "conv_in.bias"),
        "config missing": in_folder(remove("model/unet/config.json"), "no config.json, nor does model/unet"),
        "config garbage": in_folder(write("model/unet/config.json", b"\x00\xff{"), "model/unet/config.json is not JSON"),
        "config a list": in_folder(write("model/unet/config.json", []), "model/unet/config.json is not a JSON object"),
        "config without a class": in_folder(write("model/unet/config.json", {"lr": 1}), "a model of no class"),
        "config of another class": in_folder(settings("unet/config.json", _class_name="UNet2DModel"), "a UNet2DModel"),
        "config of other sizes": in_folder(settings("unet/config.json", block_out_channels=[16, 32]), "with shape [8"),
        "config of no sense": in_folder(settings("unet/config.json", down_block_types=["Up"] * 2), "unet/config.json cannot"),
        "latents of unknown size": in_folder(settings("unet/config.json", sample_size=None), "sample_size is None"),
        "latents of no size": in_folder(settings("unet/config.json", sample_size=0), "sample_size is 0"),
        "another condition": in_folder(settings("unet/config.json", class_embed_type="identity"), "class_embed_type is 'identity'"),
        "more than one width": in_folder(settings("unet/config.json", cross_attention_dim=[16, 16]), "is [16, 16]"),
        "latents of other channels": ("--unet_path other", "latents of 3 channels", another_model(Shape(latent_channels=3))),
        "a name too long": (f"--unet_path {LONG_NAME}", LONG_NAME, nothing),
        "a link to itself": ("--unet_path loop", "loop is not a folder", link("loop", "loop")),
        "empty": ("--unet_path=", "'' is not a path", nothing),
    },
    "--unet_config": {"not there": (f"--unet_path model/{UNET} --unet_config no.json", "no.json", nothing)},
    "--vae_path": {
        "a UNet": ("--vae_path model/unet", "model/unet holds a UNet2DConditionModel", nothing),
        "weights empty": in_folder(write(f"model/{VAE}", b""), f"model/{VAE} is empty"),
        "weights garbage": in_folder(write(f"model/{VAE}", 500 * b"garbage"), f"model/{VAE} cannot be read"),
        "one tensor too many": in_folder(tensors(VAE, lambda content: content.update(extra=torch.ones(2))), "a tensor extra"),
        "NaN": in_folder(tensors(VAE, fill("decoder.conv_in.bias", float("nan"))), "decoder.conv_in.bias"),
        "config a folder": in_folder(put_folder("model/vae/config.json"), "model/vae"),
        "config empty": in_folder(write("model/vae/config.json", ""), "model/vae/config.json is empty"),
        "config nested without end": in_folder(write("model/vae/config.json", 100_000 * "["), "config.json is not JSON"),
        "config of another depth": in_folder(settings("vae/config.json", block_out_channels=[8, 8, 8]), "no tensor "),
        "a scaling of 0": in_folder(settings("vae/config.json", scaling_factor=0), "scaling_factor is 0"),
        "a scaling of NaN": in_folder(settings("vae/config.json", scaling_factor=float("nan")), "scaling_factor is nan"),
        "images of two channels": ("--vae_path other", "images of 2 channels", another_model(Shape(image_channels=2))),
        "with spaces": nowhere("my  vae "),
        "in unicode": nowhere("модель-模型-é"),
        "with a newline": nowhere("two\nlines", shown=r"two\nlines"),
        "with control characters": nowhere("bell\x07 \x1b[31mred\r", shown=r"bell\x07 \x1b[31mred\r"),
        "with a line separator": nowhere("two\u2028lines", shown=r"two\u2028lines"),
        "not UTF-8": nowhere(os.fsdecode(b"caf\xe9"), shown=r"caf\udce9"),
        "with percent and braces": nowhere("100%s{0}"),
        "with a leading dash": nowhere("-x"),
        "with a leading dash taken for a flag": ("--vae_path -x", "expected one argument", nothing),
        "relative, above": nowhere("../no/such/../vae"),
        "a file": ("--vae_path model/vae/config.json", "config.json is no file of weights", nothing),
        "below a file": nowhere("model/vae/config.json/vae"),
        "a device": ("--vae_path /dev/null", "/dev/null is not a folder", nothing),
        "a dangling link": ("--vae_path link", "link is not a folder", link("link", "no")),
    },
    "--condition_encoder_path": {
        "empty": ("--condition_encoder_path e.pt", "e.pt is empty", write("e.pt", b"")),
        "garbage": ("--condition_encoder_path e.pt", "e.pt cannot be read", write("e.pt", 99 * b"weights")),
        "cut short": in_folder(cut(f"model/{ENCODER}", 10), f"model/{ENCODER} cannot be read"),
        "not in its folder": ("--condition_encoder_path model/unet", "model/unet", nothing),
        "twice in its folder": in_folder(second_encoder, "model holds both"),
        "a folder": in_folder(put_folder(f"model/{ENCODER}"), "model holds neither"),
        "malicious": of_encoder(lambda state: {"x": Malicious()}, "encoder.pt"),
        "of more users": ("--num_users 6", "[6, 16]", nothing),
        "of far fewer users": ("--num_users 1000000", "[1000000, 16]", nothing),
        "of another width": of_encoder(lambda state: {**state, "user_embedding.weight": torch.ones(5, 8)}, "[5, 16]"),
        "one tensor missing": of_encoder(lambda state: {k: v for k, v in state.items() if k != "mlp.3.bias"}, "mlp.3.bias"),
        "one tensor too many": of_encoder(lambda state: {**state, "extra": torch.ones(2)}, "a tensor extra"),
        "a tensor twice": of_encoder(lambda state: {**state, "module.mlp.0.bias": torch.ones(16)}, "holds a tensor twice"),
        "NaN": of_encoder(lambda state: {**state, "mlp.0.bias": torch.full([16], float("nan"))}, "mlp.0.bias"),
        "beyond float32": of_encoder(
            lambda state: {**state, "mlp.0.bias": torch.full([16], 1e300, dtype=torch.float64)}, "mlp.0.bias"
        ),
        "of whole numbers": of_encoder(
            lambda state: {**state, "mlp.0.bias": torch.ones(16, dtype=torch.int64)}, "torch.int64"
        ),
        "without its numbers": of_encoder(lambda state: {k: v.to("meta") for k, v in state.items()}, "meta"),
        "a list": of_encoder(lambda state: [1, 2], "encoder.pt holds one list"),
        "without tensors": of_encoder(lambda state: {}, "encoder.pt holds no state dict"),
        "not there": ("--condition_encoder_path no/e.pt", "no/e.pt does not exist", nothing),
        "a dangling link": ("--condition_encoder_path e.pt", "e.pt does not exist", link("e.pt", "no")),
        "a name too long": (f"--condition_encoder_path {LONG_NAME}", LONG_NAME, nothing),
    },
    "--scheduler_path": {
        "not there": ("--scheduler_path no", "no does not exist", nothing),
        "not in its folder": ("--scheduler_path model/vae", "model/vae holds no", nothing),
        "garbage": in_folder(write(f"model/{SCHEDULER}", b"\xff\x00"), f"{SCHEDULER} is not JSON"),
        "a list": in_folder(write(f"model/{SCHEDULER}", []), f"{SCHEDULER} is not a JSON object"),
        "without a schedule": in_folder(without_setting(SCHEDULER, "beta_schedule"), f"{SCHEDULER} has no beta_schedule"),
        "a schedule unknown": in_folder(settings(SCHEDULER, beta_schedule="zigzag"), "'zigzag'"),
        "words for numbers": in_folder(settings(SCHEDULER, beta_start="low"), SCHEDULER),
        "a spacing unknown": in_folder(settings(SCHEDULER, timestep_spacing="wide"), "'wide'"),
        "a prediction unknown": in_folder(settings(SCHEDULER, prediction_type="velocity"), "'velocity'"),
        "betas above 1": in_folder(settings(SCHEDULER, beta_end=7.0), SCHEDULER),
        "betas of NaN": in_folder(settings(SCHEDULER, beta_end=float("nan")), SCHEDULER),
        "too few betas": in_folder(settings(SCHEDULER, trained_betas=[0.1]), SCHEDULER),
    },
    "--shard": {
        "another than before": ("--shard 3/7", "3/7, but out was made as shard 2/7; needed: a folder", begun("--shard 2/7")),
        "of another number": ("--shard 2/3", "--shard 2/7 goes on here, and no --shard makes it", begun("--shard 2/7")),
        "of a whole dataset": ("--shard 2/7", "out was made without --shard; needed: a folder", begun("")),
    },
    "--batch_size": {
        "that cuts other shards": (
            "--shard 2/7 --batch_size 8", "8 cuts other shards than 16, with which out was begun; --batch_size 16", begun("--shard 2/7"),
        ),
    },
    "--num_inference_steps": {
        "beyond training": ("--num_inference_steps 1000", "1000", settings(SCHEDULER, steps_offset=1)),
    },
    "--output_dir": {
        "a file": ("--output_dir file", "file is a file", write("file", "")),
        "below a file": ("--output_dir file/a/b", "file is a file", write("file", "")),
        "empty": ("--output_dir=", "''", nothing),
        "a dangling link": ("--output_dir link", "link is a link that leads nowhere", link("link", "no")),
        "below a dangling link": ("--output_dir link/out", "link is a link that leads nowhere", link("link", "no")),
        "a link to itself": ("--output_dir loop", "loop is a link that leads nowhere", link("loop", "loop")),
        "an address": ("--output_dir s3://bucket/data", "is an address, needed: a folder", nothing),
        "an address of files": ("--output_dir file:///tmp/data", "is an address, needed: a folder", nothing),
        "an equals sign too many": ("--output_dir==~/data", "'=~/data' begins with =", nothing),
        "a home that no shell looked at": ("--output_dir=~/data", "'~/data' begins with ~", nothing),
        "a line end of Windows": (["--output_dir", "data\r"], r"'data\r' ends in a carriage return", nothing),
        "not UTF-8": (["--output_dir", os.fsdecode(b"caf\xe9")], r"caf\udce9 is not UTF-8", nothing),
        "a name too long": (f"--output_dir {LONG_NAME}", f"{LONG_NAME} cannot be used", nothing),
        "that nothing can be made in": ("--output_dir /proc/out", "/proc/out cannot be used", nothing),
    },
}  # fmt: skip
"""Beside these, `golden/transcripts/arguments.txt` has what the parser and `JobConfig` refuse."""
WAY_ON = re.compile(r"needed|this checkpoint has users|expected |--\w+|name the|; .* again|the current folder is")
ALL = [(flag, name) for flag, cases in CASES.items() for name in cases]


# Every case of it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    shape = Shape(scheduler={"prediction_type": "epsilon"})
    return make_checkpoint(tmp_path_factory.mktemp("good") / "model", shape)


@pytest.fixture
def folder(good_model, tmp_path, monkeypatch):
    """The folder that a case runs in, with a model of its own to spoil."""
    shutil.copytree(good_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # cases are the same on a machine with a GPU
    return tmp_path


class CurrentStderr:
    """What sys.stderr is when it is written to: a logging handler keeps the one it was made with."""

    def write(self, text):
        return sys.stderr.write(text)

    def flush(self):
        sys.stderr.flush()


@pytest.fixture
def stderr_of_libraries(monkeypatch):
    """Let what libraries log, and what they warn of, be captured with the rest of stderr."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if type(handler) is logging.StreamHandler:
            monkeypatch.setattr(handler, "stream", CurrentStderr())
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda *args, **options: sys.stderr.write(warnings.formatwarning(*args[:4]))
        yield


def everything_in(folder):
    """Every file, folder and link, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder)] = path.readlink() if path.is_symlink() else content
    return found


def command_of(flags):
    return [*MODEL, *SMALL, "--output_dir", "out", *(flags.split() if isinstance(flags, str) else flags)]


def assert_refused(flag, value, stdout, stderr):
    """One line, which names the flag and what is wrong, and says the way on."""
    beginning = f"batch_generate.py: error: {flag}: "
    assert stderr.startswith(beginning)
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1
    assert value in stderr.removeprefix(beginning)
    assert WAY_ON.search(stderr.removeprefix(beginning))
    assert not any(word in stderr for word in ("Traceback", "Please", "please", "!"))
    assert stdout == ""


def test_what_a_library_says_would_be_seen(stderr_of_libraries, capfd):
    logging.getLogger("diffusers.models").warning("a log line")
    logging.getLogger("torch.anything").error("another")
    warnings.warn("a warning", stacklevel=1)
    _, stderr = capfd.readouterr()
    assert all(said in stderr for said in ("a log line", "another", "a warning"))


@pytest.mark.parametrize(("flag", "name"), ALL)
def test_bad_input_is_one_line_and_nothing_is_written(flag, name, folder, stderr_of_libraries, capfd):
    flags, value, prepare = CASES[flag][name]
    prepare()
    before = everything_in(folder)
    capfd.readouterr()
    status = run_job(*command_of(flags))
    assert_refused(flag, value, *capfd.readouterr())
    assert status == 2
    assert everything_in(folder) == before


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--seed", "below 0"),
        ("--user_ids", "above the table"),
        ("--unet_path", "weights cut short"),
        ("--condition_encoder_path", "malicious"),
    ],
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_dataset_that_is_there_is_left_as_it_is(flag, name, overwrite, folder, stderr_of_libraries, capfd):
    assert run_job(*MODEL, *SMALL, "--output_dir", "out") == 0
    flags, value, prepare = CASES[flag][name]
    prepare()
    before = everything_in(folder)
    capfd.readouterr()
    assert run_job(*command_of(flags), *overwrite) == 2
    assert_refused(flag, value, *capfd.readouterr())
    assert everything_in(folder) == before


def test_every_flag_is_refused_something():
    arguments = (ROOT / "tests" / "golden" / "transcripts" / "arguments.txt").read_text()
    refused = {*CASES, *re.findall(r"^! batch_generate\.py: error: (--\w+)", arguments, re.MULTILINE)}
    assert {f"--{field.name}" for field in fields(JobConfig)} <= refused


def test_the_malicious_payload_would_be_seen(folder):
    before = everything_in(folder)
    pickle.loads(pickle.dumps(Malicious()))
    assert everything_in(folder) != before


def test_a_precision_that_the_launcher_asks_for_is_checked_too(folder, stderr_of_libraries, capfd, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert run_job(*command_of("")) == 2
    assert_refused("--mixed_precision", "'fp8', asked for by the launcher", *capfd.readouterr())


def test_a_real_command_line_says_the_same(folder):
    flags, value, _ = CASES["--vae_path"]["with a newline"]
    before = everything_in(folder)
    command = [sys.executable, ROOT / "batch_generate.py", *command_of(flags)]
    status, stdout, stderr = finish(start(command, cwd=folder, OMP_NUM_THREADS="1"))
    assert_refused("--vae_path", value, stdout, stderr)
    assert status == 2
    assert everything_in(folder) == before


# What is odd and yet right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        " my  data ",
        "данные-数据-é",
        "two\nlines",
        "bell\x07\x1b[31m",
        "-x",
        "--seed",
        "100%s{0}",
        "a'b\"c&<d>",
        "deep/er/est",
    ],
)
def test_odd_paths_are_right_too(name, folder, capfd):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path("model").rename(name)
    flags = [f"--{flag}={name}" for flag in ("vae_path", "unet_path", "condition_encoder_path", "scheduler_path")]
    out = f"{name} out"
    assert run_job(*flags, "--num_users", 5, *SMALL, f"--output_dir={out}") == 0, capfd.readouterr().err
    assert len(list(Path(out).glob("user_*/generated_000.png"))) == 5
    assert (Path(out) / "manifest.csv").is_file()


def test_links_and_paths_with_dots_are_right_too(folder):
    for name in ("vae", "unet"):
        Path(name).symlink_to(Path("model", name))
    Path("encoder.safetensors").symlink_to(folder / "model" / ENCODER)
    Path("somewhere").mkdir()
    Path("out").symlink_to("somewhere")
    flags = [
        "--vae_path",
        "./vae/",
        "--unet_path",
        "somewhere/../unet",
        "--condition_encoder_path",
        "encoder.safetensors",
    ]
    assert run_job(*flags, "--num_users", 5, *SMALL, "--output_dir", "out") == 0
    assert len(list(Path("somewhere").glob("user_*/generated_000.png"))) == 5
    assert run_job(*flags, "--num_users", 5, *SMALL, "--output_dir", "out/deeper/still") == 0
    assert len(list(Path("somewhere/deeper/still").glob("user_*/generated_000.png"))) == 5


def test_a_user_map_of_any_order_with_gaps_is_right(folder):
    write("map.json", {"0023": 1, "17": 4, str(10**18 - 1): 0})()
    assert run_job(*MODEL, *SMALL, "--user_map", "map.json", "--output_dir", "out") == 0
    assert len(list(Path("out").glob("user_*/generated_000.png"))) == 3
    assert Path("out/manifest.csv").read_text().count(f",{10**18 - 1},") == 1


def test_what_does_not_print_is_written_as_an_escape():
    assert str(UsageError("--a: b\nc\td\x1b[0m\u2028\x00\udcff")) == r"--a: b\nc\td\x1b[0m\u2028\x00\udcff"
    assert str(UsageError("--a: 'é 数' {}%s")) == "--a: 'é 数' {}%s"
