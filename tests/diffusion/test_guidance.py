"""Classifier-free guidance: the job's images against the formula's, and what says that nothing is guessed."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from tests.checkpoints import model_flags
from tests.jobs import play_processes, run_job, tree
from tests.oracle import assert_parity, oracle_condition, oracle_image, oracle_seed
from userdiff import generate_samples
from userdiff.config import parse_args
from userdiff.diffusion.conditioning import load_condition_encoder
from userdiff.diffusion.model import load_model
from userdiff.diffusion.sampler import Guidance
from userdiff.diffusion.schedule import load_noise_scheduler
from userdiff.tools.reproduce import make_image

STEPS = 6


@pytest.fixture
def flags(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", str(STEPS), "--batch_size", "4"]


@pytest.mark.parametrize(
    ("scale", "null", "guided"),
    [
        (2, "zeros", (0, 1)),
        (4, "row:2", (0, 1)),
        (0, "row:0", (0, 1)),
        (1.5, "zeros", (0.5, 1)),  # its edges are on steps
        (3, "row:4", (0.25, 0.7)),  # ... and between them
        (3, "zeros", (0.0, 0.1)),  # an interval without a step
    ],
)
def test_the_job_makes_the_formulas_images(checkpoint, flags, tmp_path, scale, null, guided):
    guidance = ["--guidance_scale", scale, "--null_condition", null]
    guidance += ["--guidance_start", guided[0], "--guidance_stop", guided[1]]
    assert run_job(*flags, *guidance, "--num_images_per_user", 6, "--output_dir", tmp_path / "out") == 0
    null_row = None if null == "zeros" else int(null[4:])
    options = {"steps": STEPS, "scale": scale, "null_row": null_row, "guided": guided}
    items = [(user_id, image_index) for user_id in range(1, 6) for image_index in range(6)]
    assert_parity(tmp_path / "out", {item: oracle_image(checkpoint, *item, **options) for item in items})


def test_guidance_changes_the_images(checkpoint, flags, tmp_path):
    """Hold the test above to its word: the oracle's images with and without are not the same."""
    guided, plain = (oracle_image(checkpoint, 2, 0, steps=STEPS, scale=scale) for scale in (4, 1))
    assert np.abs(guided.astype(int) - plain.astype(int)).max() > 5


def test_a_scale_of_1_is_no_guidance(flags, tmp_path):
    assert run_job(*flags, "--output_dir", tmp_path / "plain") == 0
    without = ["--guidance_scale", 1, "--null_condition", "zeros", "--guidance_start", 0.2, "--guidance_stop", 0.5]
    assert run_job(*flags, *without, "--output_dir", tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    assert run_job(*flags, *without, "--output_dir", tmp_path / "plain") == 0  # the same dataset goes on


def test_a_pipeline_of_diffusers_makes_the_same(checkpoint, flags, tmp_path):
    """Its null condition is `negative_prompt_embeds`, its guidance is on at every step."""
    assert run_job(*flags, "--guidance_scale", 3, "--null_condition", "row:1", "--output_dir", tmp_path / "out") == 0
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler.from_config(load_noise_scheduler(None).config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = DDIMScheduler.from_config(load_noise_scheduler(None).config)  # it had set steps_offset to 1
    pipeline.set_progress_bar_config(disable=True)
    size = unet.config.sample_size * pipeline.vae_scale_factor
    expected = {}
    for user_id in range(1, 6):
        generator = torch.Generator().manual_seed(oracle_seed(42, user_id, 0))
        images = pipeline(
            prompt_embeds=oracle_condition(checkpoint, user_id - 1)[:, None],
            negative_prompt_embeds=oracle_condition(checkpoint, 1)[:, None],
            latents=torch.randn((1, unet.config.in_channels, *[unet.config.sample_size] * 2), generator=generator),
            height=size,
            width=size,
            guidance_scale=3.0,
            num_inference_steps=STEPS,
            output_type="latent",
        ).images
        with torch.no_grad():
            decoded = vae.decode(images / vae.config.scaling_factor).sample.clamp(0, 1)[0].permute(1, 2, 0)
        expected[user_id, 0] = (decoded.numpy() * 255).astype(np.uint8)
    assert_parity(tmp_path / "out", expected)


@pytest.mark.parametrize("more", [["--eta", "0.7"], ["--seed", "9"]])
def test_a_guided_dataset_is_the_same_at_any_number_of_processes(flags, tmp_path, more):
    guidance = [*more, "--guidance_scale", "2.5", "--null_condition", "zeros", "--guidance_start", "0.3"]
    assert run_job(*flags, *guidance, "--output_dir", tmp_path / "one") == 0
    assert play_processes(3, *flags, *guidance, "--output_dir", tmp_path / "three") == [0, 0, 0]
    assert tree(tmp_path / "three") == tree(tmp_path / "one")


def test_an_image_is_made_again_and_a_training_loop_makes_it_too(checkpoint, flags, tmp_path):
    out = tmp_path / "out"
    guidance = ["--guidance_scale", "3", "--null_condition", "row:0", "--guidance_stop", "0.8"]
    assert run_job(*flags, *guidance, "--output_dir", out) == 0
    config = parse_args([*flags, *guidance, "--output_dir", str(out)])
    model = load_model(config)
    path = out / "user_03" / "generated_001.png"
    assert make_image(config, model, 3, 1) == path.read_bytes()
    images = generate_samples(
        UNet2DConditionModel.from_pretrained(checkpoint / "unet"),
        load_condition_encoder(checkpoint, 5, model.unet.config.cross_attention_dim),
        AutoencoderKL.from_pretrained(checkpoint / "vae"),
        load_noise_scheduler(None),
        [3],
        num_images_per_user=2,
        num_inference_steps=STEPS,
        guidance_scale=3,
        null_condition="row:0",
        guidance_stop=0.8,
    )
    with Image.open(path) as image:
        assert np.abs(images[1].numpy().astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_the_identity_has_all_four_and_another_guidance_is_refused(flags, tmp_path, capsys):
    out = tmp_path / "out"
    guidance = ["--guidance_scale", "3", "--null_condition", "zeros", "--guidance_start", "0.2"]
    assert run_job(*flags, *guidance, "--output_dir", out) == 0
    said = capsys.readouterr().out
    assert "guidance 3 away from a token of zeros, at steps 2 to 6" in said
    identity = json.loads((out / "run.json").read_text())["identity"]
    chosen = {
        "guidance_scale": 3.0,
        "null_condition": "zeros",
        "guidance_start": 0.2,
    }  # guidance_stop is at its default
    assert {name: value for name, value in identity.items() if "guidance" in name or "null" in name} == chosen
    assert "3 away from zeros, from 0.2 to 1 of the steps" in (out / "preview.html").read_text()
    for other in (
        ["--guidance_scale", "2"],
        ["--null_condition", "row:1"],
        ["--guidance_stop", "0.5"],
        ["--guidance_scale", "1"],
    ):
        assert run_job(*flags, *guidance, *other, "--output_dir", out) == 2
        assert f"{other[0][2:]} was " in capsys.readouterr().err


def test_a_null_row_that_is_a_users_warns(flags, tmp_path, capsys):
    assert run_job(*flags, "--guidance_scale", 2, "--null_condition", "row:3", "--output_dir", tmp_path / "out") == 0
    assert "--null_condition row:3 is the row of user 4" in capsys.readouterr().err
    null = ["--guidance_scale", 2, "--null_condition", "row:3", "--null_row", 3]
    assert run_job(*flags, *null, "--output_dir", tmp_path / "other") == 0
    assert "is the row of user" not in capsys.readouterr().err


def test_a_training_loop_is_refused_the_same(flags):
    model = load_model(parse_args(flags))
    live = [model.unet, model.condition_encoder, model.vae, load_noise_scheduler(None), [1]]
    for wrong in (
        {"guidance_scale": 2},
        {"guidance_scale": 2, "null_condition": "row:9"},
        {"guidance_scale": float("nan"), "null_condition": "zeros"},
        {"guidance_start": 1.0},
    ):
        with pytest.raises(ValueError, match=r"guidance|null_condition|row:9"):
            generate_samples(*live, num_inference_steps=1, **wrong)


def test_the_interval_is_that_of_diffusers_guiders():
    from diffusers.guiders import ClassifierFreeGuidance

    for start, stop, steps in ((0, 1, 20), (0.2, 0.8, 20), (0.33, 0.66, 7), (0.1, 0.15, 10), (0, 0.05, 10)):
        guider = ClassifierFreeGuidance(guidance_scale=2.0, start=start, stop=stop)
        guidance = Guidance(scale=2.0, null_hidden_states=torch.zeros(1, 1, 1), start=start, stop=stop)
        for step in range(steps):
            guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(1))
            assert guidance.is_at(step, steps) == guider._is_cfg_enabled()
