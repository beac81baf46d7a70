import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from userdiff.diffusion import checkpoint as models
from userdiff.diffusion import schedule

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the small checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def edit_tensors(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_config(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_is_found_in_its_folder_or_one_that_holds_it(inside, checkpoint):
    vae = models.load_vae(checkpoint / "vae" if inside else checkpoint)
    unet = models.load_unet(checkpoint / "unet" if inside else checkpoint)
    assert type(vae).__name__ == "AutoencoderKL"
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert not vae.training
    assert not unet.training


def test_half_precision_weights_come_back_as_float32(folder):
    edit_tensors(folder / "unet" / WEIGHTS, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert {parameter.dtype for parameter in models.load_unet(folder).parameters()} == {torch.float32}


def damage_shape(folder):
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(8, 5, 3, 3)}))


def damage_missing(folder):
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop("conv_out.bias"))


def damage_extra(folder):
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({"class_embedding.weight": torch.zeros(2, 2)}))


def damage_nan(folder):
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors["conv_in.bias"].fill_(float("nan")))


def damage_truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


DAMAGES = {
    "another shape": (
        damage_shape,
        r"has conv_in.weight with shape \[8, 5, 3, 3\], needed by .*config.json: \[8, 4, 3, 3\]",
    ),
    "one missing": (damage_missing, "has no tensor conv_out.bias, needed by .*config.json"),
    "one too many": (damage_extra, "has a tensor class_embedding.weight .*: no such tensor"),
    "NaN": (damage_nan, "holds NaN or infinity in conv_in.bias"),
    "truncated": (damage_truncated, "cannot be read as a safetensors file; it is cut short"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no weights .*needed: {WEIGHTS}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(name, folder):
    damage, expected = DAMAGES[name]
    damage(folder / "unet")
    with pytest.raises((ValueError, OSError), match=expected) as raised:
        models.load_unet(folder)
    assert len(str(raised.value)) < 400
    assert "huggingface.co" not in str(raised.value)


def test_another_class_is_refused(checkpoint):
    with pytest.raises(ValueError, match="holds a AutoencoderKL, needed: UNet2DConditionModel"):
        models.load_unet(checkpoint / "vae")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel, needed: AutoencoderKL"):
        models.load_vae(checkpoint / "unet")


def test_a_path_that_is_nowhere_is_refused_without_asking_a_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        models.load_vae(tmp_path / "nowhere")


def test_a_vae_and_a_unet_of_other_latents_do_not_go_together(folder):
    vae, unet = models.load_vae(folder), models.load_unet(folder)
    models.check_agreement(vae, unet)
    vae.register_to_config(latent_channels=3)
    with pytest.raises(ValueError, match="makes latents of 4 channels, the VAE decodes 3"):
        models.check_agreement(vae, unet)


def test_a_scheduler_folder_is_read_and_its_absence_said(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"holds no scheduler_config\.json"):
        schedule.load_noise_scheduler(tmp_path)
    default = schedule.load_noise_scheduler(None)
    default.save_pretrained(tmp_path / "scheduler")
    for path in (tmp_path, tmp_path / "scheduler"):
        loaded = schedule.load_noise_scheduler(path)
        assert torch.equal(loaded.alphas_cumprod, default.alphas_cumprod)


def test_the_hash_is_of_names_shapes_and_values_alone():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2)}
    same = {"a": torch.ones(2, dtype=torch.float16), "b": torch.arange(6.0).reshape(3, 2).t().contiguous()}
    same["b"] = torch.arange(6.0).reshape(2, 3).t().contiguous().t()  # equal, laid out otherwise
    assert models.content_hash(tensors) == models.content_hash(same)
    for other in (
        {**tensors, "a": torch.zeros(2)},
        {**tensors, "b": torch.arange(6.0).reshape(3, 2)},
        {"c": tensors["b"], "a": tensors["a"]},
    ):
        assert models.content_hash(tensors) != models.content_hash(other)


def test_config_values_are_those_that_differ_from_the_defaults(folder):
    values = models.config_values(models.load_vae(folder))
    assert values["scaling_factor"] == 0.7
    assert values["block_out_channels"] == [8, 8]
    assert "act_fn" not in values  # at its default
    assert not any(name.startswith("_") for name in values)
    edit_config(folder / "vae" / "config.json", act_fn="silu", _name_or_path="elsewhere", _diffusers_version="0.1")
    assert models.config_values(models.load_vae(folder)) == values
