"""What makes passes fast must change nothing but last bits: each against the plain model."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from tests.checkpoints import model_flags
from tests.jobs import finish, launch, run_job, tree
from tests.oracle import assert_parity, oracle_image
from userdiff import sampling
from userdiff.acceleration import token_vectors, use_single_token
from userdiff.models import ddim_scheduler, load_noise_scheduler

SHAPES = {
    "as in use": {},
    "Stable Diffusion 1": {"attention_head_dim": 2, "layers_per_block": 2},
    "heads of Stable Diffusion 2": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "several transformer layers": {"transformer_layers_per_block": 2},
    "only cross-attention": {"only_cross_attention": True},
    "upcast attention": {"upcast_attention": True},
}


def make_unet(**changes):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval().requires_grad_(False)


def draw(unet, tokens):
    """Latents of three images, after four steps."""
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    return sampling.denoise(unet, ddim_scheduler(load_noise_scheduler(None)), noise, tokens, num_inference_steps=4)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_one_token_needs_no_attention(changes):
    plain = make_unet(**changes)
    fast = copy.deepcopy(plain)
    use_single_token(fast)
    tokens = torch.randn((3, 1, 16), generator=torch.Generator().manual_seed(1))
    vectors = token_vectors(fast, tokens)
    assert vectors.shape[:2] == (3, 1)
    expected = draw(plain, tokens)
    assert relative_error(draw(fast, vectors), expected) < 1e-5
    # each image has its own user's vectors
    assert relative_error(draw(fast, vectors.flip(0)), expected) > 1e-3


def test_queries_and_keys_are_not_computed():
    fast = make_unet()
    use_single_token(fast)
    vectors = token_vectors(fast, torch.zeros(1, 1, 16))
    for name, module in fast.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
            module.forward = None  # a call would fail
    fast(torch.zeros(1, 4, 8, 8), torch.tensor(1), vectors)


def test_a_unet_of_another_make_is_left_as_it_is():
    unet = make_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )
    tokens = torch.randn((3, 1, 16), generator=torch.Generator().manual_seed(1))
    expected = draw(unet, tokens)
    use_single_token(unet)
    assert token_vectors(unet, tokens) is tokens
    assert torch.equal(draw(unet, tokens), expected)


def test_kernels_chosen_by_timing_are_refused(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    assert run_job(*model_flags(checkpoint), "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("batch_generate.py: error: --dynamo_mode: max-autotune chooses kernels")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("precision", "launcher_flags", "compiled"),
    [("no", [], "inductor"), ("bf16", ["--dynamo_use_regional_compilation"], "inductor, regional")],
    ids=["float32", "bf16, regional"],
)
def test_compiled_launches_make_the_same_bytes_user_by_user(
    checkpoint, tmp_path, monkeypatch, precision, launcher_flags, compiled
):
    """Users change from batch to batch: a graph that had taken one's vectors for a constant would draw them again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    job = [*model_flags(checkpoint), "--num_inference_steps", 3, "--num_images_per_user", 2, "--batch_size", 2]
    job += ["--mixed_precision", precision, "--output_dir"]
    for number in (1, 2):
        status, _, stderr = finish(
            launch(number, *job, tmp_path / str(number), config="cpu_compiled.yaml"), timeout=400
        )
        assert status == 0, stderr
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert json.loads((tmp_path / "2" / "run.json").read_text())["numerics"]["compiled"] == compiled
    if precision == "no":
        items = [(user_id, image_index) for user_id in range(1, 6) for image_index in range(2)]
        assert_parity(tmp_path / "2", {item: oracle_image(checkpoint, *item, steps=3) for item in items})
    else:
        assert run_job(*job, tmp_path / "eager", "--device", "cpu") == 0
        for path in (tmp_path / "2").glob("user_*/*.png"):
            found, expected = (
                np.asarray(Image.open(p), dtype=int)
                for p in (path, tmp_path / "eager" / path.relative_to(tmp_path / "2"))
            )
            assert np.abs(found - expected).mean() < 1
