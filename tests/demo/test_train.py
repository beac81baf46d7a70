"""A run of the trainer, a few steps long, leaves a whole checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from userdiff.demo.digits import NUM_USERS
from userdiff.demo.quality import CHECKPOINT
from userdiff.demo.train import new_vae, normalise_latents, parse_args, publish, stratified_timesteps, train
from userdiff.diffusion.checkpoint import check_agreement, load_unet, load_vae
from userdiff.diffusion.conditioning import load_condition_encoder
from userdiff.diffusion.schedule import ddim_scheduler, load_noise_scheduler

TINY = {
    "vae_steps": "3",
    "vae_batch_size": "4",
    "vae_channels": "8 8 8",
    "unet_steps": "4",
    "unet_batch_size": "4",
    "unet_channels": "16 16",
    "sample_every": "2",
    "guidance_start": "0.5",
}


def run_tiny(folder: Path, *more: str) -> Path:
    tiny = [word for flag, value in TINY.items() for word in (f"--{flag}", *value.split())]
    train(parse_args(["--output_dir", str(folder / "out"), "--work_dir", str(folder / "work"), *tiny, *more]))
    return folder / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture(params=["bundled", "trained"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return CHECKPOINT if request.param == "bundled" else request.getfixturevalue("trained")


def test_strict_loaders_take_the_checkpoint(checkpoint: Path) -> None:
    unet, vae = load_unet(checkpoint), load_vae(checkpoint)
    check_agreement(vae, unet)
    load_condition_encoder(checkpoint, NUM_USERS, unet.config.cross_attention_dim)
    assert ddim_scheduler(load_noise_scheduler(checkpoint)).alphas_cumprod.equal(
        ddim_scheduler(load_noise_scheduler(None)).alphas_cumprod
    )


def test_weights_are_half_precision(checkpoint: Path) -> None:
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == [checkpoint.name, "unet", "vae"]
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_configs_name_no_path(checkpoint: Path) -> None:
    for file in checkpoint.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        assert "_name_or_path" not in config
        assert not any(isinstance(value, str) and "/" in value for value in config.values())


def test_bundled_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 10_000_000


def test_samples_are_drawn_on_the_way(trained: Path) -> None:
    work = trained.parent / "work"
    assert [file.name for file in sorted(work.glob("samples_*"))] == ["samples_00002.png", "samples_00004.png"]
    assert Image.open(work / "samples_00004.png").size == (640, 640)


def test_same_seed_same_weights_with_the_vae_trained_before(trained: Path, tmp_path: Path) -> None:
    again = run_tiny(tmp_path, "--vae_path", str(trained.parent / "work" / "vae"))
    for file in trained.rglob("*.safetensors"):
        other = load_file(again / file.relative_to(trained))
        assert all(torch.allclose(tensor, other[name], atol=1e-3) for name, tensor in load_file(file).items())


def test_normalised_latents_decode_to_the_same_images() -> None:
    torch.manual_seed(0)
    vae, pixels = new_vae([8, 8, 8]).eval(), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        normalise_latents(vae, pixels)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert posterior.mean.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    variance = posterior.mean.square().mean() + posterior.var.mean()
    assert variance.sqrt().item() * vae.config.scaling_factor == pytest.approx(1, abs=1e-4)


def test_stratified_timesteps_cover_the_schedule() -> None:
    timesteps = stratified_timesteps(10, 1000)
    assert (timesteps // 100).tolist() == list(range(10))


def test_publish_replaces_what_was_there(tmp_path: Path) -> None:
    for name, content in (("first", "1"), ("second", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content)
        publish(tmp_path / name, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]
