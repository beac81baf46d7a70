"""Weights as people have them: whatever can be loaded holds the very tensors that were saved; the rest is refused by name."""

import argparse
import datetime as dt
import json
import os
import pickle
import shutil
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EMAModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from userdiff.diffusion.checkpoint import load_unet, load_vae
from userdiff.diffusion.conditioning import UserConditionEncoder, load_condition_encoder

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a library that warns would speak before we do
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def truth(checkpoint):
    """The tensors of the UNet and of the encoder, as saved."""
    return load_file(checkpoint / "unet" / f"{STEM}.safetensors"), load_file(
        checkpoint / "condition_encoder.safetensors"
    )


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the small checkpoint to save otherwise; its UNet has no weights any more."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "unet" / f"{STEM}.safetensors").unlink()
    return tmp_path / "model"


def assert_unet(path, truth, config=None, notes=()):
    said = []
    found = load_unet(path, config, said.append).state_dict()
    assert found.keys() == truth[0].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth[0].items())
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))


def assert_encoder(path, truth, notes=()):
    said = []
    found = load_condition_encoder(path, None, 16, said.append).state_dict()
    assert found.keys() == truth[1].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth[1].items())
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))


def unet_of(truth, folder):
    model = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    model.load_state_dict(truth[0])
    return model


# Files and folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "non_ema", "safe_serialization": False},
        {"max_shard_size": "100KB"},
        {"max_shard_size": "100KB", "safe_serialization": False},
        {"max_shard_size": "100KB", "variant": "fp16"},
    ],
    ids=str,
)
def test_what_save_pretrained_writes_loads(options, folder, truth):
    unet_of(truth, folder).save_pretrained(folder / "unet", **options)
    assert not (folder / "unet" / f"{STEM}.safetensors").exists()
    assert_unet(folder, truth)


def test_a_variant_beside_the_weights_is_not_used_and_is_named(folder, truth):
    save_file(truth[0], folder / "unet" / f"{STEM}.safetensors")
    save_file({name: tensor.half() for name, tensor in truth[0].items()}, folder / "unet" / f"{STEM}.fp16.safetensors")
    assert_unet(folder, truth, notes=[f"also holds {STEM}.fp16.safetensors, which is not used"])


def test_a_stale_index_gives_way_to_a_whole_file(folder, truth):
    save_file(truth[0], folder / "unet" / f"{STEM}.safetensors")
    index = {"weight_map": {"conv_in.weight": f"{STEM}-00001-of-00002.safetensors"}}
    (folder / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    assert_unet(folder, truth, notes=[f"{STEM}.safetensors is complete, and used"])


def test_the_same_weights_in_two_files_are_no_question(folder, truth):
    save_file(truth[0], folder / "unet" / f"{STEM}.safetensors")
    torch.save(truth[0], folder / "unet" / f"{STEM}.bin")
    assert_unet(folder, truth)


def test_what_the_averager_saves_loads(folder, truth):
    """`EMAModel.save_pretrained` puts how it averaged into the config.json."""
    averaged = EMAModel(
        unet_of(truth, folder).parameters(), model_cls=UNet2DConditionModel, model_config=unet_of(truth, folder).config
    )
    averaged.save_pretrained(folder / "unet_ema")
    assert "decay" in json.loads((folder / "unet_ema" / "config.json").read_text())
    assert_unet(folder / "unet_ema", truth)
    shutil.rmtree(folder / "unet")
    assert_unet(folder, truth, notes=["its unet_ema/ is used"])


@pytest.mark.parametrize("named", ["", "unet"])
def test_an_averaged_unet_beside_the_one_that_is_used_is_named(named, folder, truth):
    unet_of(truth, folder).save_pretrained(folder / "unet")
    shutil.copytree(folder / "unet", folder / "unet_ema")
    assert_unet(folder / named, truth, notes=[f"--unet_path {folder / 'unet_ema'} uses it"])


def test_what_accelerate_saves_loads_by_names(folder, truth, tmp_path):
    accelerator = Accelerator(cpu=True)
    encoder = UserConditionEncoder(5, 16)
    encoder.load_state_dict(truth[1])
    accelerator.prepare(unet_of(truth, folder), encoder)
    accelerator.save_state(str(tmp_path / "state"))
    assert {"model.safetensors", "model_1.safetensors"} <= {file.name for file in (tmp_path / "state").iterdir()}
    assert_unet(tmp_path / "state", truth, config=folder / "unet" / "config.json")
    assert_encoder(tmp_path / "state", truth)


def test_a_training_checkpoint_holds_both(folder, truth):
    content = {
        "unet_state_dict": {f"module.{name}": tensor for name, tensor in truth[0].items()},
        "condition_encoder_state_dict": {f"module.{name}": tensor for name, tensor in truth[1].items()},
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "ema_state_dict": {name: tensor + 1 for name, tensor in truth[0].items()},
        "epoch": 10,
    }
    file = folder / "checkpoint_epoch_10.pt"
    torch.save(content, file)
    beside = ["also holds ema_state_dict, which is not used"]
    assert_unet(file, truth, notes=beside)  # unet/config.json lies beside it
    assert_encoder(file, truth, notes=beside)
    moved = file.rename(folder.parent / file.name)
    assert_unet(moved, truth, config=folder / "unet" / "config.json", notes=beside)


def test_a_config_without_a_class_is_known_by_its_settings(folder, truth):
    save_file(truth[0], folder / "unet" / f"{STEM}.safetensors")
    config = folder / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in content.items() if name != "_class_name"}))
    assert_unet(folder, truth)


def test_a_second_encoder_beside_is_a_question_or_a_note(folder, truth):
    shutil.copy(folder / "condition_encoder.safetensors", folder / "condition_encoder_ema.safetensors")
    assert_encoder(folder, truth, notes=["condition_encoder_ema.safetensors uses it"])
    torch.save({name: tensor + 1 for name, tensor in truth[1].items()}, folder / "condition_encoder.bin")
    with pytest.raises(ValueError, match="name the file that is meant"):
        load_condition_encoder(folder, None, 16)


def test_json_with_a_byte_order_mark_is_json(folder, truth):
    save_file(truth[0], folder / "unet" / f"{STEM}.safetensors")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text(), encoding="utf-8-sig")
    assert_unet(folder, truth)
    config.write_text(config.read_text(encoding="utf-8-sig"), encoding="utf-16")
    assert_unet(folder, truth)


# Names ---------------------------------------------------------------------------------------------------------------

WRAPPED = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled, then DDP": lambda name: f"module._orig_mod.{name}",
    "DDP, then compiled": lambda name: f"_orig_mod.module.{name}",
    "FSDP, around each part": lambda name: f"_fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.', 1)}",
    "all of them": lambda name: f"_orig_mod._fsdp_wrapped_module.module.{name}",
    "within a module of all models": lambda name: f"unet.{name}",
    "the same, wrapped": lambda name: f"module.models.0._orig_mod.{name}",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wrappers_put_into_names_is_no_name(kind, folder, truth):
    torch.save({WRAPPED[kind](name): tensor for name, tensor in truth[0].items()}, folder / "unet" / f"{STEM}.bin")
    torch.save({WRAPPED[kind](name): tensor for name, tensor in truth[1].items()}, folder / "e.pt")
    assert_unet(folder, truth)
    assert_encoder(folder / "e.pt", truth)


def test_what_torch_averages_has_a_count_beside_it(folder, truth):
    averaged = torch.optim.swa_utils.AveragedModel(unet_of(truth, folder))
    assert "n_averaged" in averaged.state_dict()
    torch.save(averaged.state_dict(), folder / "unet" / f"{STEM}.bin")
    assert_unet(folder, truth)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_attention_of_old_vaes_is_read_by_its_old_names(prefix, checkpoint, folder):
    file = folder / "vae" / f"{STEM}.safetensors"
    saved = load_file(file)
    renamed = {}
    for name, tensor in saved.items():
        old = name
        for new_part, old_part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            old = old.replace(f".{new_part}.", f".{old_part}.")
        renamed[prefix + old] = tensor
    assert renamed.keys() != saved.keys()
    save_file(renamed, file)
    found = load_vae(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


# Pickles -------------------------------------------------------------------------------------------------------------


class Settings(dict):
    """As EasyDict is one."""


class Malicious:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


FOREIGN = {
    "argparse.Namespace": argparse.Namespace(lr=1e-4),
    "numpy": {"loss": np.float64(0.1), "losses": np.arange(3.0)},
    "pathlib": Path("runs"),
    "datetime": dt.timedelta(days=1),
    "a class of the trainer's": Settings(lr=1e-4),
    "defaultdict": defaultdict(list, {1: [2]}),
    "a module": torch.nn.Linear(2, 2),
    "an optimizer": torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]),
    "a call": Malicious(Path("executed").touch),
    "a shell": Malicious(os.system, "touch executed"),
    "a compiler": Malicious(exec, "open('executed', 'w')"),
}


def test_a_state_dict_of_a_kind_of_its_own_is_read(folder, truth):
    tagged = {name: torch.nn.Parameter(tensor) for name, tensor in truth[1].items()}
    for parameter in tagged.values():
        parameter.tag = "mine"
    for content in (
        Settings(truth[1]),
        {"a": defaultdict(list, truth[1])},
        {"b": tagged, "args": argparse.Namespace()},
    ):
        torch.save(content, folder / "e.pt")
        found = load_condition_encoder(folder / "e.pt", None, 16).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in truth[1].items())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", FOREIGN)
def test_of_a_pickle_the_tensors_are_loaded_and_nothing_is_run(kind, protocol, folder, truth, monkeypatch):
    monkeypatch.chdir(folder)
    content = {"condition_encoder_state_dict": OrderedDict(truth[1]), "extra": FOREIGN[kind], "epoch": 3}
    torch.save(content, "e.pt", pickle_protocol=protocol)
    assert_encoder(Path("e.pt"), truth, notes=["only its tensors were loaded"])
    assert not Path("executed").exists()


def test_a_pickle_of_before_zip_files_is_read(folder, truth):
    content = {"condition_encoder_state_dict": truth[1], "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, folder / "e.pt", _use_new_zipfile_serialization=False)
    assert_encoder(folder / "e.pt", truth, notes=["argparse.Namespace"])


def test_an_expanded_tensor_is_refused_before_it_is_copied(folder, truth):
    """Of 2 kB on disk, and a terabyte in memory."""
    table = torch.zeros(1).expand(2**24, 2**14)
    torch.save({**truth[1], "user_embedding.weight": table}, folder / "e.pt")
    assert (folder / "e.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"user_embedding.weight with shape \[16777216, 16384\]"):
        load_condition_encoder(folder / "e.pt", None, 16)


# Refused -------------------------------------------------------------------------------------------------------------


def two_files(folder, truth):
    save_file(truth[0], folder / "unet" / f"{STEM}.safetensors")
    torch.save({name: tensor + 1 for name, tensor in truth[0].items()}, folder / "unet" / f"{STEM}.bin")


def two_variants(folder, truth):
    for number, variant in enumerate(("fp16", "non_ema")):
        tensors = {name: tensor + number for name, tensor in truth[0].items()}
        save_file(tensors, folder / "unet" / f"{STEM}.{variant}.safetensors")


def shard_gone(folder, truth):
    unet_of(truth, folder).save_pretrained(folder / "unet", max_shard_size="100KB")
    next(folder.glob("unet/*-00002-of-*")).unlink()


def index_gone(folder, truth):
    unet_of(truth, folder).save_pretrained(folder / "unet", max_shard_size="100KB")
    (folder / "unet" / f"{STEM}.safetensors.index.json").unlink()


def beyond_the_folder(folder, truth):
    save_file(truth[0], folder / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(truth[0], "../elsewhere.safetensors")}
    (folder / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def two_in_one(folder, truth):
    more = {f"ema.{name}": tensor + 1 for name, tensor in truth[0].items()}
    torch.save(
        {**{f"net.{name}": tensor for name, tensor in truth[0].items()}, **more}, folder / "unet" / f"{STEM}.bin"
    )


def pointer(folder, truth):
    (folder / "unet" / f"{STEM}.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    )


def page(folder, truth):
    (folder / "unet" / f"{STEM}.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")


def script(folder, truth):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "unet" / f"{STEM}.bin")


def whole_module(folder, truth):
    torch.save(unet_of(truth, folder), folder / "unet" / f"{STEM}.bin")


def whole_numbers(folder, truth):
    save_file(
        {name: tensor.to(torch.int8) for name, tensor in truth[0].items()}, folder / "unet" / f"{STEM}.safetensors"
    )


def distributed(folder, truth):
    (folder / "unet" / "pytorch_model_fsdp_0").mkdir()
    (folder / "unet" / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"0")


def another_module(folder, truth):
    save_file(truth[1], folder / "unet" / f"{STEM}.safetensors")


def twice_over(folder, truth):
    shutil.copytree(folder / "unet", folder / "unet" / "unet")
    shutil.copy(folder / "unet" / "config.json", folder / "config.json")


REFUSED = {
    two_files: ["unet holds both", f"{STEM}.bin", f"{STEM}.safetensors", "name the file"],
    two_variants: ["unet holds both", f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.safetensors"],
    shard_gone: [f"{STEM}.safetensors.index.json names", "-00002-of-", "needed: all shards"],
    index_gone: ["-00001-of-", "needed: that too"],
    beyond_the_folder: ["'../elsewhere.safetensors'", "needed: files of its own folder"],
    two_in_one: [f"{STEM}.bin holds two that fit", "'net.'", "'ema.'"],
    pointer: ["is a Git LFS pointer", "git lfs pull"],
    page: ["is a web page", "download it again"],
    script: ["is a TorchScript module", "needed: a state dict"],
    whole_module: ["holds one UNet2DConditionModel", "state_dict()"],
    whole_numbers: ["torch.int8", "needed: floating-point numbers"],
    distributed: [".distcp", "accelerate merge-weights"],
    another_module: ["has no tensor conv_in.weight", "user_embedding.weight"],
    twice_over: ["both hold a UNet2DConditionModel", "name the one"],
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_what_cannot_be_told_is_refused_by_name(damage, folder, truth, capfd):
    damage(folder, truth)
    with pytest.raises((ValueError, OSError)) as raised:
        load_unet(folder)
    for part in REFUSED[damage]:
        assert part in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # no library speaks first


def test_a_pointer_for_a_config_is_told_too(folder):
    (folder / "unet" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ValueError, match=r"config\.json is a Git LFS pointer"):
        load_unet(folder)


def test_a_file_without_a_config_names_the_flag(folder, truth, tmp_path):
    torch.save(truth[0], tmp_path / "unet.pt")
    with pytest.raises(FileNotFoundError, match="--unet_config"):
        load_unet(tmp_path / "unet.pt")


def test_a_bare_pickle_is_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("e.pt").write_bytes(pickle.dumps(Malicious(Path("executed").touch), protocol=2))
    with pytest.raises(ValueError, match=r"e\.pt cannot be read"):
        load_condition_encoder(Path("e.pt"), 5, 16)
    assert not Path("executed").exists()
