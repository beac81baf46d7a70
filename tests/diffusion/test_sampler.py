import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from tests.oracle import oracle_image, oracle_seed
from userdiff import UserConditionEncoder, generate_samples
from userdiff.diffusion import sampler as sampling


@pytest.fixture(scope="module")
def live(checkpoint):
    """Model objects as a training loop holds them: in training mode."""
    encoder = UserConditionEncoder(5, 16)
    encoder.load_state_dict(load_file(checkpoint / "condition_encoder.safetensors"))
    return {
        "unet": UNet2DConditionModel.from_pretrained(checkpoint / "unet").train(),
        "condition_encoder": encoder.train(),
        "vae": AutoencoderKL.from_pretrained(checkpoint / "vae").train(),
        "noise_scheduler": DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
    }


def test_latents_are_the_items_own_seeded_noise():
    seeds = [oracle_seed(42, user_id, 3) for user_id in (1, 9)]
    latents = sampling.initial_latents(sampling.item_generators(seeds), (4, 8, 8))
    assert latents.dtype == torch.float32
    for row, seed in enumerate(seeds):
        noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(latents[row : row + 1], noise)


def test_generate_samples_draws_the_oracles_images(live, checkpoint):
    images = generate_samples(**live, user_ids=[4, 2], num_images_per_user=2, num_inference_steps=5, batch_size=3)
    assert images.dtype == torch.uint8
    assert images.shape == (4, 16, 16, 3)
    for image, item in zip(images.numpy(), [(4, 0), (4, 1), (2, 0), (2, 1)], strict=True):
        difference = np.abs(image.astype(int) - oracle_image(checkpoint, *item, steps=5))
        assert difference.max() <= 1
        assert (difference == 0).mean() > 0.99


def test_generate_samples_leaves_the_training_loop_as_it_was(live):
    state = torch.get_rng_state()
    live["vae"].eval()
    generate_samples(**live, user_ids=[1], num_inference_steps=2)
    assert live["unet"].training
    assert live["condition_encoder"].training
    assert not live["vae"].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in live["unet"].parameters())


def test_generate_samples_follows_a_user_mapping(live, checkpoint):
    (image,) = generate_samples(**live, user_ids=[3], user_index={1: 0, 3: 1, 5: 2}, num_inference_steps=5).numpy()
    expected = oracle_image(checkpoint, 3, 0, steps=5, user_index=1)
    assert np.abs(image.astype(int) - expected).max() <= 1
    assert np.abs(image.astype(int) - oracle_image(checkpoint, 3, 0, steps=5)).max() > 1


@pytest.mark.parametrize("user_ids", [[], [6], [0], [1, 9]])
def test_generate_samples_refuses_a_user_the_model_does_not_have(live, user_ids):
    with pytest.raises(ValueError, match=r"^user_ids: .* this model has users \[1, 2, 3, 4, 5\]$"):
        generate_samples(**live, user_ids=user_ids, num_inference_steps=1)


def test_decode_refuses_an_unknown_range(live):
    with pytest.raises(ValueError, match="'sgined' is neither unit nor signed"):
        sampling.decode(live["vae"], torch.zeros(1, 4, 8, 8), output_range="sgined")


def test_pixels_are_truncated_not_rounded():
    values = torch.tensor([-1.0, 0.0, 0.999 / 255, 1.0 / 255, 254.9 / 255, 1.0, 2.0])
    images = values.reshape(1, 1, 1, 7).expand(2, 3, 1, 7)
    pixels = sampling.to_uint8(images)
    assert pixels.shape == (2, 1, 7, 3)
    assert pixels[1, 0, :, 2].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_non_finite_images_are_told_apart():
    images = torch.zeros(4, 3, 2, 2)
    images[1, 2, 1, 0] = float("nan")
    images[3, 0, 0, 0] = float("inf")
    assert sampling.finite_images(images).tolist() == [True, False, True, False]


def test_on_step_is_asked_before_every_pass_and_ends_the_loop(live):
    class EnoughError(Exception):
        pass

    steps = []

    def on_step():
        steps.append(None)
        if len(steps) == 3:
            raise EnoughError

    passes = []
    handle = live["unet"].register_forward_hook(lambda *_: passes.append(None))
    scheduler = sampling_scheduler(live)
    with pytest.raises(EnoughError):
        sampling.denoise(
            live["unet"],
            scheduler,
            torch.zeros(1, 4, 8, 8),
            torch.zeros(1, 1, 16),
            num_inference_steps=5,
            on_step=on_step,
        )
    handle.remove()
    assert len(passes) == 2


def sampling_scheduler(live):
    from userdiff.diffusion.schedule import ddim_scheduler

    return ddim_scheduler(live["noise_scheduler"])


@pytest.mark.parametrize(
    ("low", "high", "claimed", "contradicts"),
    [(0, 1, "unit", False), (-1, 1, "unit", True), (-0.05, 1.05, "unit", False), (0, 1, "signed", True),
     (-1, 1, "signed", False)],
)  # fmt: skip
def test_a_plainly_wrong_output_range_is_noticed(low, high, claimed, contradicts):
    decoded = torch.linspace(low, high, 3 * 64).reshape(1, 3, 8, 8)
    if claimed == "signed":
        decoded = decoded / 2 + 0.5
    assert sampling.contradicts_range(decoded, claimed) == contradicts
