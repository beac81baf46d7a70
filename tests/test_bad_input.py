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
from dataclasses import dataclass, fields
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


@dataclass(frozen=True)
class Bad:
    """A job that is refused: `error: {flag}: ...`, where the rest of the line holds `value` and `remedy`."""

    flags: str | list[str]  # after those of a good job, whose place they take; `prepare` may be all that is bad
    flag: str
    value: str
    remedy: str
    prepare: Callable[[], object] = lambda: None
    with_model: bool = True  # whether the flags of the good job name the model


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


class Malicious:
    """Unpickled without care, it leaves a file `executed` behind."""

    def __reduce__(self):
        return (Path("executed").touch, ())


def malicious_unet():
    Path("model/unet", WEIGHTS).unlink()
    torch.save({"conv_in.weight": Malicious()}, Path("model/unet/diffusion_pytorch_model.bin"))


UNET = f"unet/{WEIGHTS}"
VAE = f"vae/{WEIGHTS}"
SAVED = "save_pretrained writes"

# The table -------------------------------------------------------------------------------------------------------------

FLAGS = {
    "seed below 0": Bad("--seed -1", "--seed", "-1", "needed: 0 to 9223372036854775807"),
    "device that is not there": Bad("--device cuda", "--device", "no CUDA device", "use --device cpu"),
    "user_ids above num_users": Bad("--user_ids 6", "--user_ids", "6 is", "this checkpoint has users 1-5"),
    "user_ids not in the map": Bad(
        "--user_ids 17 18 --user_map map.json",
        "--user_ids",
        "18 is",
        "has users 17 23",
        write("map.json", {17: 0, 23: 1}),
    ),
}
"""Beside these, `golden/transcripts/arguments.txt` has what the parser and `JobConfig` refuse."""


def user_map(content, value, remedy):
    return Bad("--user_map map.json", "--user_map", f"map.json {value}", remedy, write("map.json", content))


OBJECT = 'needed: a JSON object of id to index, like {"17": 0, "23": 1}'
MAPS = {
    "user_map not JSON": user_map("17: 0", "is not JSON", OBJECT),
    "user_map an empty file": user_map("", "is not JSON", OBJECT),
    "user_map not UTF-8": user_map(b"\xff\xfe{}", "is not JSON", OBJECT),
    "user_map nested without end": user_map(100_000 * "[", "is not JSON", OBJECT),
    "user_map a list": user_map([17, 23], "holds [17, 23]", OBJECT),
    "user_map a list of pairs": user_map([[17, 0], [23, 1]], "holds [[17, 0], [23, 1]]", OBJECT),
    "user_map a number": user_map("5", "holds 5", OBJECT),
    "user_map without users": user_map({}, "names no users", OBJECT),
    "user_map with a name": user_map({"anna": 0}, "names user 'anna'", "needed: a whole number from 1 to 10^18-1"),
    "user_map with a float": user_map({"1.0": 0}, "names user '1.0'", "needed: a whole number from 1 to 10^18-1"),
    "user_map with user 0": user_map({"0": 0}, "names user '0'", "needed: a whole number from 1 to 10^18-1"),
    "user_map with a user too large": user_map({str(10**18): 0}, f"names user '{10**18}'", "from 1 to 10^18-1"),
    "user_map with a user twice": user_map('{"1": 0, "1": 1}', "names user 1 twice", "needed: each user once"),
    "user_map with a user twice, by 01": user_map({"1": 0, "01": 1}, "names user 1 twice", "needed: each user once"),
    "user_map with a row too high": user_map({"1": 5}, "gives user 1 the index 5", "--num_users 5 has 0 to 4"),
    "user_map with a row below 0": user_map({"1": -1}, "gives user 1 the index -1", "--num_users 5 has 0 to 4"),
    "user_map with a row a float": user_map({"1": 0.0}, "gives user 1 the index 0.0", "--num_users 5 has 0 to 4"),
    "user_map with a row in words": user_map({"1": "0"}, "gives user 1 the index '0'", "--num_users 5 has 0 to 4"),
    "user_map with two users on a row": user_map(
        {"17": 1, "23": 0, "29": 1}, "gives users 17 and 29 the same index 1", "needed: one for each user"
    ),
    "user_map a folder": Bad(
        "--user_map model", "--user_map", "model cannot be used (Is a directory)", "needed: JSON file"
    ),
    "user_map not there": Bad(
        "--user_map no.json", "--user_map", "no.json cannot be used (No such file", "needed: JSON file"
    ),
}


def bad_unet(prepare, value, remedy):
    return Bad("", "--unet_path", value, remedy, prepare)


def bad_vae(prepare, value, remedy):
    return Bad("", "--vae_path", value, remedy, prepare)


MODELS = {
    "VAE given as UNet": Bad("--unet_path model/vae", "--unet_path", "model/vae", "needed: UNet2DConditionModel"),
    "UNet given as VAE": Bad("--vae_path model/unet", "--vae_path", "model/unet", "needed: AutoencoderKL"),
    "weights missing": bad_unet(remove(f"model/{UNET}"), "model/unet holds no weights", f"needed: {WEIGHTS}"),
    "weights a folder": bad_unet(put_folder(f"model/{UNET}"), "model/unet holds no weights", f"needed: {WEIGHTS}"),
    "weights empty": bad_vae(write(f"model/{VAE}", b""), "model/vae holds weights that cannot be read", SAVED),
    "weights cut short": bad_unet(cut(f"model/{UNET}", 100), "model/unet holds weights that cannot be read", SAVED),
    "weights garbage": bad_vae(write(f"model/{VAE}", 500 * b"garbage"), "model/vae holds weights that cannot be read", SAVED),
    "weights malicious": bad_unet(malicious_unet, "model/unet holds weights that cannot be read", SAVED),
    "weights with one tensor missing": bad_unet(
        tensors(UNET, lambda content: content.pop("conv_out.bias")), "model/unet has no tensor conv_out.bias", "config.json"
    ),
    "weights with one tensor too many": bad_vae(
        tensors(VAE, lambda content: content.update(extra=torch.ones(2))), "a tensor extra", "config.json has no place for"
    ),
    "VAE weights with NaN": bad_vae(tensors(VAE, fill("decoder.conv_in.bias", float("nan"))), "decoder.conv_in.bias", "diverged"),
    "UNet weights with inf": bad_unet(tensors(UNET, fill("conv_in.bias", float("inf"))), "conv_in.bias", "diverged"),
    "config missing": bad_unet(remove("model/unet/config.json"), "model/unet, needed", f"no config.json, nor does model/unet, needed: what diffusers' {SAVED}"),
    "config a folder": bad_vae(put_folder("model/vae/config.json"), "model/vae", SAVED),
    "config garbage": bad_unet(write("model/unet/config.json", b"\x00\xff{"), "model/unet/config.json is not JSON", SAVED),
    "config empty": bad_vae(write("model/vae/config.json", ""), "model/vae/config.json is not JSON", SAVED),
    "config nested without end": bad_vae(write("model/vae/config.json", 100_000 * "["), "config.json is not JSON", SAVED),
    "config a list": bad_unet(write("model/unet/config.json", []), "model/unet/config.json is not a JSON object", SAVED),
    "config without a class": bad_unet(
        without_setting("unet/config.json", "_class_name"), "model/unet holds a model of no class", "UNet2DConditionModel"
    ),
    "config of another class": bad_unet(
        settings("unet/config.json", _class_name="UNet2DModel"), "holds a UNet2DModel", "needed: UNet2DConditionModel"
    ),
    "config with other block sizes": bad_unet(
        settings("unet/config.json", block_out_channels=[16, 32]), "with shape [8", "needed [16"
    ),
    "config with another number of blocks": bad_vae(
        settings("vae/config.json", block_out_channels=[8, 8, 8]), "no tensor decoder.up_blocks.1", "config.json"
    ),
    "config without latents' size": bad_unet(settings("unet/config.json", sample_size=None), "sample_size is None", "needed:"),
    "config with latents of no size": bad_unet(settings("unet/config.json", sample_size=0), "sample_size is 0", "from 1 on"),
    "config with another condition": bad_unet(
        settings("unet/config.json", class_embed_type="identity"), "class_embed_type is 'identity'", "needed: none"
    ),
    "config with more than one width": bad_unet(
        settings("unet/config.json", cross_attention_dim=[16, 16]), "cross_attention_dim is [16, 16]", "one whole number"
    ),
    "config with a scaling of 0": bad_vae(settings("vae/config.json", scaling_factor=0), "scaling_factor is 0", "above 0"),
    "config with a scaling of NaN": bad_vae(
        settings("vae/config.json", scaling_factor=float("nan")), "scaling_factor is nan", "above 0"
    ),
    "latents of other channels": Bad(
        "--unet_path other", "--unet_path", "latents of 3 channels, the VAE decodes 4", "must be equal",
        another_model(Shape(latent_channels=3)),
    ),
    "images of two channels": Bad(
        "--vae_path other", "--vae_path", "images of 2 channels", "needed: 1, 3 or 4", another_model(Shape(image_channels=2))
    ),
}  # fmt: skip


def bad_encoder(make, value, remedy):
    return Bad("--condition_encoder_path encoder.pt", "--condition_encoder_path", value, remedy, encoder_file(make))


ENCODERS = {
    "encoder empty": Bad(
        "--condition_encoder_path e.pt", "--condition_encoder_path", "e.pt", "a torch file", write("e.pt", b"")
    ),
    "encoder garbage": Bad(
        "--condition_encoder_path e.pt",
        "--condition_encoder_path",
        "e.pt",
        "a torch file",
        write("e.pt", 99 * b"weights"),
    ),
    "encoder cut short": Bad(
        "", "--condition_encoder_path", f"model/{ENCODER}", "truncated", cut(f"model/{ENCODER}", 10)
    ),
    "encoder not in its folder": Bad(
        "--condition_encoder_path model/unet",
        "--condition_encoder_path",
        "model/unet holds neither",
        "condition_encoder.pt",
    ),
    "encoder twice in its folder": Bad(
        "", "--condition_encoder_path", "model holds both", "name the file", write("model/condition_encoder.pt", b"")
    ),
    "encoder a folder": Bad(
        "", "--condition_encoder_path", "model", "condition_encoder.pt", put_folder(f"model/{ENCODER}")
    ),
    "encoder malicious": bad_encoder(lambda state: {**state, "x": Malicious()}, "encoder.pt", "save the state dict"),
    "encoder of more users": Bad(
        "--num_users 6", "--condition_encoder_path", "shape [5, 16], needed [6, 16]", "--num_users"
    ),
    "encoder of far fewer users": Bad(
        "--num_users 1000000", "--condition_encoder_path", "[1000000, 16]", "--num_users"
    ),
    "encoder of another width": bad_encoder(
        lambda state: {**state, "user_embedding.weight": torch.ones(5, 8)}, "needed [5, 16]", "cross_attention_dim"
    ),
    "encoder with one key missing": bad_encoder(
        lambda state: {k: v for k, v in state.items() if k != "mlp.3.bias"},
        "no tensor mlp.3.bias",
        "needed with shape [16]",
    ),
    "encoder with one key too many": bad_encoder(
        lambda state: {**state, "extra": torch.ones(2)}, "a tensor extra", "needed: no such tensor"
    ),
    "encoder with a key in both spellings": bad_encoder(
        lambda state: {**state, "module.mlp.0.bias": torch.ones(16)},
        "encoder.pt holds a tensor twice",
        "or all without",
    ),
    "encoder with NaN": bad_encoder(
        lambda state: {**state, "mlp.0.bias": torch.full([16], float("nan"))}, "mlp.0.bias", "training diverged"
    ),
    "encoder beyond float32": bad_encoder(
        lambda state: {**state, "mlp.0.bias": torch.full([16], 1e300, dtype=torch.float64)},
        "mlp.0.bias",
        "training diverged",
    ),
    "encoder of whole numbers": bad_encoder(
        lambda state: {**state, "mlp.0.bias": torch.ones(16, dtype=torch.int64)},
        "torch.int64",
        "needed: floating-point",
    ),
    "encoder without its numbers": bad_encoder(
        lambda state: {name: tensor.to("meta") for name, tensor in state.items()}, "meta", "needed: floating-point"
    ),
    "encoder a list": bad_encoder(
        lambda state: [1, 2], "encoder.pt holds no state dict", "'condition_encoder_state_dict'"
    ),
    "encoder of another checkpoint": bad_encoder(
        lambda state: {"epoch": 3, "unet": state}, "encoder.pt holds no state dict", "'condition_encoder_state_dict'"
    ),
    "encoder without tensors": bad_encoder(lambda state: {}, "encoder.pt holds no tensors", "needed: the state dict"),
}


def scheduler(value, remedy, prepare):
    return Bad("--scheduler_path model", "--scheduler_path", value, remedy, prepare)


SCHEDULER = "scheduler/scheduler_config.json"
SCHEDULERS = {
    "scheduler not there": Bad("--scheduler_path no", "--scheduler_path", "no is not a folder", "scheduler_config.json"),
    "scheduler not in its folder": Bad("--scheduler_path model/vae", "--scheduler_path", "model/vae holds no", SAVED),
    "scheduler the file itself": Bad(
        f"--scheduler_path model/{SCHEDULER}", "--scheduler_path", f"{SCHEDULER} is not a folder", "needed: one that holds"
    ),
    "scheduler garbage": scheduler(f"model/{SCHEDULER} is not JSON", SAVED, write(f"model/{SCHEDULER}", b"\xff\x00")),
    "scheduler a list": scheduler(f"model/{SCHEDULER} is not a JSON object", SAVED, write(f"model/{SCHEDULER}", [])),
    "scheduler without a schedule": scheduler(
        f"model/{SCHEDULER} has no beta_schedule", "needed: the noise schedule", without_setting(SCHEDULER, "beta_schedule")
    ),
    "scheduler with a schedule unknown": scheduler("'zigzag'", "none of linear, scaled_linear", settings(SCHEDULER, beta_schedule="zigzag")),
    "scheduler with words for numbers": scheduler(SCHEDULER, SAVED, settings(SCHEDULER, beta_start="low")),
    "scheduler with a spacing unknown": scheduler("'wide'", "none of leading, trailing", settings(SCHEDULER, timestep_spacing="wide")),
    "scheduler with a prediction unknown": scheduler(
        "'velocity'", "none of epsilon, sample, v_prediction", settings(SCHEDULER, prediction_type="velocity")
    ),
    "scheduler with betas above 1": scheduler(SCHEDULER, "betas from 0 to 1", settings(SCHEDULER, beta_end=7.0)),
    "scheduler with betas of NaN": scheduler(SCHEDULER, "betas from 0 to 1", settings(SCHEDULER, beta_end=float("nan"))),
    "scheduler with too few betas": scheduler(SCHEDULER, "num_train_timesteps betas", settings(SCHEDULER, trained_betas=[0.1])),
    "scheduler with steps beyond training": Bad(
        "--scheduler_path model --num_inference_steps 1000", "--num_inference_steps", "1000", "another steps_offset",
        settings(SCHEDULER, steps_offset=1),
    ),
}  # fmt: skip


def nowhere(name, shown=None):
    """A VAE path that leads nowhere; `shown` is the name as the line has it, where that differs."""
    return Bad([f"--vae_path={name}"], "--vae_path", f"{shown or name} is not a folder", "one that holds config.json")


PATHS = {
    "path with spaces": nowhere("my  vae "),
    "path in unicode": nowhere("модель-模型-é"),
    "path with a newline": nowhere("two\nlines", shown=r"two\nlines"),
    "path with control characters": nowhere("bell\x07 \x1b[31mred\r", shown=r"bell\x07 \x1b[31mred\r"),
    "path with a line separator": nowhere("two\u2028lines", shown=r"two\u2028lines"),
    "path not UTF-8": nowhere(os.fsdecode(b"caf\xe9"), shown=r"caf\udce9"),
    "path with percent and braces": nowhere("100%s{0}"),
    "path with a leading dash": nowhere("-x"),
    "path with a leading dash taken for a flag": Bad(
        "--vae_path -x", "--vae_path", "expected one argument", "--vae_path=-..."
    ),
    "path relative, above": nowhere("../no/such/../vae"),
    "path a file": nowhere("model/vae/config.json"),
    "path below a file": nowhere("model/vae/config.json/vae"),
    "path a device": nowhere("/dev/null"),
    "path with a name too long": Bad(f"--unet_path {LONG_NAME}", "--unet_path", LONG_NAME, "needed: "),
    "path empty": Bad("--unet_path=", "--unet_path", "'' is not a path", "the current folder is ."),
    "path a dangling link": Bad(
        "--vae_path link", "--vae_path", "link is not a folder", "one that holds", link("link", "no")
    ),
    "path a link to itself": Bad(
        "--unet_path loop", "--unet_path", "loop is not a folder", "one that holds", link("loop", "loop")
    ),
    "encoder path not there": Bad(
        "--condition_encoder_path no/e.pt",
        "--condition_encoder_path",
        "no/e.pt does not exist",
        "expected condition_encoder.pt",
    ),
    "encoder path a dangling link": Bad(
        "--condition_encoder_path e.pt",
        "--condition_encoder_path",
        "e.pt does not exist",
        "expected",
        link("e.pt", "no"),
    ),
    "encoder path with a name too long": Bad(
        f"--condition_encoder_path {LONG_NAME}",
        "--condition_encoder_path",
        LONG_NAME,
        "condition_encoder.pt",
    ),
    "user_map path a link to itself": Bad(
        "--user_map loop",
        "--user_map",
        "loop cannot be used (Too many levels",
        "needed: JSON file",
        link("loop", "loop"),
    ),
    "output_dir a file": Bad(
        "--output_dir file", "--output_dir", "file is a file", "needed: a folder", write("file", "")
    ),
    "output_dir below a file": Bad(
        "--output_dir file/a/b", "--output_dir", "file is a file", "needed: a folder", write("file", "")
    ),
    "output_dir empty": Bad("--output_dir=", "--output_dir", "''", "the current folder is ."),
    "output_dir a dangling link": Bad(
        "--output_dir link", "--output_dir", "link is a link that leads nowhere", "needed: a folder", link("link", "no")
    ),
    "output_dir below a dangling link": Bad(
        "--output_dir link/out",
        "--output_dir",
        "link is a link that leads nowhere",
        "needed: a folder",
        link("link", "no"),
    ),
    "output_dir a link to itself": Bad(
        "--output_dir loop",
        "--output_dir",
        "loop is a link that leads nowhere",
        "needed: a folder",
        link("loop", "loop"),
    ),
    "output_dir not UTF-8": Bad(
        ["--output_dir", os.fsdecode(b"caf\xe9")], "--output_dir", r"caf\udce9 is not UTF-8", "needed: a name"
    ),
    "output_dir with a name too long": Bad(
        f"--output_dir {LONG_NAME}", "--output_dir", f"{LONG_NAME} cannot be used", "needed: folder of the dataset"
    ),
    "output_dir that nothing can be made in": Bad(
        "--output_dir /proc/out", "--output_dir", "/proc/out cannot be used", "needed: folder of the dataset"
    ),
}

CASES = {**FLAGS, **MAPS, **MODELS, **ENCODERS, **SCHEDULERS, **PATHS}


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


def command_of(case):
    flags = case.flags.split() if isinstance(case.flags, str) else case.flags
    return [*(MODEL if case.with_model else []), *SMALL, "--output_dir", "out", *flags]


def assert_refused(case, stdout, stderr):
    beginning = f"batch_generate.py: error: {case.flag}: "
    assert stderr.startswith(beginning)
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1
    assert case.value in stderr.removeprefix(beginning)
    assert case.remedy in stderr.removeprefix(beginning)
    assert not any(word in stderr for word in ("Traceback", "Please", "please", "!"))
    assert stdout == ""


def test_what_a_library_says_would_be_seen(stderr_of_libraries, capfd):
    logging.getLogger("diffusers.models").warning("a log line")
    logging.getLogger("torch.anything").error("another")
    warnings.warn("a warning", stacklevel=1)
    _, stderr = capfd.readouterr()
    assert all(said in stderr for said in ("a log line", "another", "a warning"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(name, folder, stderr_of_libraries, capfd):
    case = CASES[name]
    case.prepare()
    before = everything_in(folder)
    capfd.readouterr()
    status = run_job(*command_of(case))
    stdout, stderr = capfd.readouterr()
    assert_refused(case, stdout, stderr)
    assert status == 2
    assert everything_in(folder) == before


@pytest.mark.parametrize("name", ["seed below 0", "user_ids above num_users", "weights cut short", "encoder malicious"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_dataset_that_is_there_is_left_as_it_is(name, overwrite, folder, stderr_of_libraries, capfd):
    assert run_job(*MODEL, *SMALL, "--output_dir", "out") == 0
    case = CASES[name]
    case.prepare()
    before = everything_in(folder)
    capfd.readouterr()
    assert run_job(*command_of(case), *overwrite) == 2
    assert_refused(case, *capfd.readouterr())
    assert everything_in(folder) == before


def test_every_flag_is_refused_something():
    refused = {flag for case in CASES.values() for flag in case.flag.split(", ")}
    arguments = (ROOT / "tests" / "golden" / "transcripts" / "arguments.txt").read_text()
    refused |= set(re.findall(r"^! batch_generate\.py: error: (--\w+)", arguments, re.MULTILINE))
    assert {f"--{field.name}" for field in fields(JobConfig)} <= refused


def test_the_malicious_payload_would_be_seen(folder):
    before = everything_in(folder)
    pickle.loads(pickle.dumps(Malicious()))
    assert everything_in(folder) != before


def test_a_precision_that_the_launcher_asks_for_is_checked_too(folder, stderr_of_libraries, capfd, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    case = Bad("", "--mixed_precision", "'fp8', asked for by the launcher", "is none of no, fp16, bf16")
    assert run_job(*command_of(case)) == 2
    assert_refused(case, *capfd.readouterr())


@pytest.mark.parametrize("name", ["path with a newline"])
def test_a_real_command_line_says_the_same(name, folder):
    case = CASES[name]
    case.prepare()
    before = everything_in(folder)
    command = [sys.executable, ROOT / "batch_generate.py", *command_of(case)]
    status, stdout, stderr = finish(start(command, cwd=folder, OMP_NUM_THREADS="1"))
    assert_refused(case, stdout, stderr)
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
