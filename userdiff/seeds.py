"""The seed of every item: a function of the base seed, the user and the image, and of nothing else."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Item = tuple[int, int]
"""(user_id, image_index)"""


def item_seed(base_seed: int, user_id: int, image_index: int) -> int:
    """Return the seed of one image, in [0, 2^32): all that a torch CPU generator keeps. One to one within a user."""
    return (_user_seed(base_seed, user_id) + image_index) % 2**32


def item_seeds(base_seed: int, user_id: int, image_indices: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the seeds of a user's images, as `item_seed` does: [number] image indices -> [number]."""
    return (_user_seed(base_seed, user_id) + image_indices.astype(np.int64)) % 2**32


@lru_cache(maxsize=4096)
def _user_seed(base_seed: int, user_id: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{base_seed}:{user_id}".encode(), digest_size=4).digest(), "big")
