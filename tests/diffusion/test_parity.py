"""The job's images against the oracle's, on checkpoints of many shapes."""

import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from tests.checkpoints import Shape, make_checkpoint, model_flags
from tests.jobs import run_job
from tests.oracle import assert_parity, oracle_image
from userdiff.config import BUNDLED_CHECKPOINT
from userdiff.diffusion.schedule import ddim_scheduler

SHAPES = {
    "default": (Shape(), {}),
    "3 latent channels": (Shape(latent_channels=3), {}),
    "sample_size 12": (Shape(sample_size=12), {}),
    "embed 24, 7 users": (Shape(embed_dim=24, num_users=7), {}),
    "VAE x8": (Shape(vae_blocks=4), {}),
    "grey images": (Shape(image_channels=1), {}),
    "v_prediction": (Shape(scheduler={"prediction_type": "v_prediction"}), {}),
    "own betas, trailing": (
        Shape(scheduler={"beta_schedule": "linear", "beta_end": 0.02, "timestep_spacing": "trailing"}),
        {},
    ),
    "clipped sample": (Shape(scheduler={"clip_sample": True, "clip_sample_range": 2.0}), {}),
    "signed range": (Shape(), {"signed": True}),
    "eta 0.6": (Shape(), {"eta": 0.6}),
    "eta 1, another seed": (Shape(), {"eta": 1.0, "seed": 2**40 + 7}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_job_makes_the_oracles_images(name, tmp_path):
    shape, options = SHAPES[name]
    folder = make_checkpoint(tmp_path / "model", shape, seed=3)
    flags = [*model_flags(folder, shape), "--num_inference_steps", 6, "--num_images_per_user", 3, "--batch_size", 4]
    flags += ["--eta", options.get("eta", 0), "--seed", options.get("seed", 42)]
    flags += ["--vae_output_range", "signed" if options.get("signed") else "unit"]
    assert run_job(*flags, "--output_dir", tmp_path / "out") == 0
    items = [(user_id, image_index) for user_id in range(1, shape.num_users + 1) for image_index in range(3)]
    assert_parity(tmp_path / "out", {item: oracle_image(folder, *item, steps=6, **options) for item in items})


def test_the_bundled_checkpoint_makes_the_oracles_images(tmp_path):
    assert run_job("--num_images_per_user", 2, "--output_dir", tmp_path / "out") == 0
    items = [(user_id, image_index) for user_id in range(1, 11) for image_index in range(2)]
    expected = {item: oracle_image(BUNDLED_CHECKPOINT, *item, steps=20) for item in items}
    assert_parity(tmp_path / "out", expected)


def test_the_bundled_scheduler_is_the_training_default():
    noise_scheduler = DDPMScheduler.from_pretrained(BUNDLED_CHECKPOINT / "scheduler")
    assert noise_scheduler.config.beta_schedule == "scaled_linear"
    assert (noise_scheduler.config.beta_start, noise_scheduler.config.beta_end) == (0.00085, 0.012)
    assert not noise_scheduler.config.clip_sample


def test_positional_scheduler_arguments_survive():
    noise_scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    assert DDIMScheduler.from_config(noise_scheduler.config).config.beta_end == 0.02  # diffusers drops them
    assert ddim_scheduler(noise_scheduler).config.beta_end == 0.012
    assert ddim_scheduler(noise_scheduler).config.beta_schedule == "scaled_linear"
