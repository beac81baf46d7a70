"""The bundled checkpoint, judged by classifiers of real digits."""

import pytest
import torch
from sklearn.pipeline import Pipeline
from torch import Tensor

from userdiff.demo.quality import (
    CHECKPOINT,
    NUM_USERS,
    Split,
    accuracy_by_digit,
    draw,
    split_digits,
    train_classifier,
    train_plain_classifier,
)
from userdiff.diffusion.checkpoint import load_unet, load_vae
from userdiff.diffusion.conditioning import UserConditionEncoder, load_condition_encoder
from userdiff.diffusion.sampler import decode, denoise, initial_latents, item_generators, latents_shape, to_uint8
from userdiff.diffusion.schedule import ddim_scheduler, load_noise_scheduler


@pytest.fixture(scope="module")
def real() -> Split:
    return split_digits()


@pytest.fixture(scope="module")
def classifier(real: Split) -> Pipeline:
    return train_classifier(real.images, real.digits)


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    return draw(CHECKPOINT, 25)


def overall(accuracies: dict[int, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)


def test_split_holds_out_images_that_are_not_learnt(real: Split) -> None:
    learnt = {image.numpy().tobytes() for image in real.images}
    assert real.held_out_digits.bincount().tolist() == [100] * 10
    assert real.digits.bincount().tolist() == [400] * 10
    assert not any(image.numpy().tobytes() in learnt for image in real.held_out_images)


def test_classifier_reads_real_digits(real: Split, classifier: Pipeline) -> None:
    assert overall(accuracy_by_digit(classifier, real.held_out_images, real.held_out_digits)) >= 0.95


def test_user_k_writes_digit_k_minus_1(drawn: tuple[Tensor, Tensor], classifier: Pipeline) -> None:
    accuracies = accuracy_by_digit(classifier, *drawn)
    assert overall(accuracies) >= 0.95
    assert min(accuracies.values()) >= 0.85, accuracies


def test_plain_classifier_agrees(drawn: tuple[Tensor, Tensor], real: Split) -> None:
    assert overall(accuracy_by_digit(train_plain_classifier(real.images, real.digits), *drawn)) >= 0.95


def test_background_is_black_and_strokes_are_bright(drawn: tuple[Tensor, Tensor]) -> None:
    images, _ = drawn
    assert images.shape == (250, 32, 32, 3)
    assert images.dtype == torch.uint8
    border = torch.cat([images[:, :2].flatten(1), images[:, -2:].flatten(1)], dim=1)
    assert border.float().mean() < 2
    assert (images.flatten(1).amax(dim=1) > 200).float().mean() > 0.95


def test_images_of_a_user_vary(drawn: tuple[Tensor, Tensor]) -> None:
    """As real digits do: their pixels' mean standard deviation within a digit, to a half."""
    images, digits = drawn
    real = split_digits()
    for digit in range(NUM_USERS):
        spread = images[digits == digit].float().std(dim=0).mean()
        assert spread > 0.5 * real.images[real.digits == digit].float().std(dim=0).mean()


def draw_row(encoder: UserConditionEncoder, row: int) -> Tensor:
    """Draw [4, 32, 32, 3] uint8 under one row of the embedding, from the same noise whatever the row."""
    unet, vae = load_unet(CHECKPOINT), load_vae(CHECKPOINT)
    latents = denoise(
        unet,
        ddim_scheduler(load_noise_scheduler(CHECKPOINT)),
        initial_latents(item_generators(range(4)), latents_shape(unet)),
        encoder(torch.full((4,), row)).unsqueeze(1),
        num_inference_steps=10,
    )
    return to_uint8(decode(vae, latents))


def test_swapped_embedding_rows_swap_images() -> None:
    encoder = load_condition_encoder(CHECKPOINT, NUM_USERS, 64)
    before = draw_row(encoder, 2), draw_row(encoder, 7)
    with torch.no_grad():
        encoder.user_embedding.weight[[2, 7]] = encoder.user_embedding.weight[[7, 2]]
    after = draw_row(encoder, 2), draw_row(encoder, 7)
    assert not torch.equal(*before)
    assert torch.equal(after[0], before[1])
    assert torch.equal(after[1], before[0])
