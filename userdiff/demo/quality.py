"""Does user k write the digit k - 1? A classifier of real digits reads what a checkpoint draws.

`python -m userdiff.demo.quality` prints a table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC
from torch import Tensor

from userdiff.config import BUNDLED_CHECKPOINT
from userdiff.demo.digits import NUM_USERS, load_digits
from userdiff.diffusion.checkpoint import load_unet, load_vae
from userdiff.diffusion.conditioning import load_condition_encoder
from userdiff.diffusion.schedule import load_noise_scheduler
from userdiff.diffusion.training_loop import generate_samples

CHECKPOINT = BUNDLED_CHECKPOINT
NUM_HELD_OUT = 1000
SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # pixels; what the classifier learns to overlook


class Split(NamedTuple):
    """The real digits, split for the classifier: images [n, 32, 32, 3] uint8, digits [n] int64."""

    images: Tensor
    digits: Tensor
    held_out_images: Tensor
    held_out_digits: Tensor


def split_digits() -> Split:
    """Split the real digits into 4,000 to learn from and 1,000 held out, 100 of each digit; always the same ones."""
    images, digits = load_digits()
    learn, held_out = train_test_split(range(len(digits)), test_size=NUM_HELD_OUT, stratify=digits, random_state=0)
    return Split(images[learn], digits[learn], images[held_out], digits[held_out])


def features(images: Tensor) -> NDArray[np.float32]:
    """images: [n, 32, 32, 3] uint8 -> [n, 1024], grey in [0, 1]; real and generated images alike."""
    grey: NDArray[np.float32] = images.float().mean(dim=-1).flatten(1).div(255).numpy()
    return grey


def train_classifier(images: Tensor, digits: Tensor) -> Pipeline:
    """Fit a support vector machine to digits [n] in images [n, 32, 32, 3], each also shifted by a pixel."""
    shifted = torch.cat([images.roll(shift, dims=(1, 2)) for shift in SHIFTS])  # the margin is black: nothing wraps
    classifier = make_pipeline(PCA(50, random_state=0), SVC(C=10, gamma="scale"))
    return classifier.fit(features(shifted), digits.repeat(len(SHIFTS)).numpy())


def train_plain_classifier(images: Tensor, digits: Tensor) -> SVC:
    """Fit a support vector machine to bare pixels: a weaker second opinion that shares nothing with the first."""
    return SVC(C=10, gamma="scale").fit(features(images), digits.numpy())


def accuracy_by_digit(classifier: Any, images: Tensor, digits: Tensor) -> dict[int, float]:
    """Share of images [n, 32, 32, 3] uint8 read as the digit [n] they should be, for each digit."""
    right = torch.from_numpy(classifier.predict(features(images))) == digits
    return {int(digit): right[digits == digit].float().mean().item() for digit in digits.unique()}


def draw(
    checkpoint: Path, num_images_per_user: int, *, num_inference_steps: int = 20, seed: int = 42, batch_size: int = 50
) -> tuple[Tensor, Tensor]:
    """Generate images of all ten users as a training loop would: images [n, 32, 32, 3] uint8 and digits [n]."""
    unet = load_unet(checkpoint)
    images = generate_samples(
        unet,
        load_condition_encoder(checkpoint, NUM_USERS, unet.config.cross_attention_dim),
        load_vae(checkpoint),
        load_noise_scheduler(checkpoint),
        range(1, NUM_USERS + 1),
        num_images_per_user=num_images_per_user,
        num_inference_steps=num_inference_steps,
        seed=seed,
        batch_size=batch_size,
    )
    return images, torch.arange(NUM_USERS).repeat_interleave(num_images_per_user)


def report(checkpoint: Path, num_images_per_user: int = 50, num_inference_steps: int = 20, seed: int = 42) -> str:
    """Make a table of how much of each user both classifiers read rightly, and of real digits they had not seen."""
    real = split_digits()
    images, digits = draw(checkpoint, num_images_per_user, num_inference_steps=num_inference_steps, seed=seed)
    classifiers = [train(real.images, real.digits) for train in (train_classifier, train_plain_classifier)]
    drawn = [accuracy_by_digit(classifier, images, digits) for classifier in classifiers]
    held_out = [accuracy_by_digit(c, real.held_out_images, real.held_out_digits) for c in classifiers]
    lines = [
        f"{num_images_per_user} images a user, {num_inference_steps} steps, seed {seed}",
        _row("", "shifted", "plain"),
    ]
    lines += [_row(f"user {digit + 1} ({digit})", *(table[digit] for table in drawn)) for digit in range(NUM_USERS)]
    lines += [_row("all users", *map(_mean, drawn)), _row("real, held out", *map(_mean, held_out))]
    return "\n".join(lines)


def _mean(accuracies: dict[int, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)  # every digit is there equally often


def _row(name: str, *values: float | str) -> str:
    cells = [f"{value:9.1%}" if isinstance(value, float) else f"{value:>9}" for value in values]
    return f"{name:16}" + "".join(cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m userdiff.demo.quality",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--num_images_per_user", type=int, default=50)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    print(report(args.checkpoint, args.num_images_per_user, args.num_inference_steps, args.seed))


if __name__ == "__main__":
    main()
