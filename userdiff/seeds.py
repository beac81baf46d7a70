"""An item's seed and its slot in a batch: functions of the item alone, whichever process computes it in whichever batch."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Item = tuple[int, int]
"""(user_id, image_index)"""
_GOLDEN_RATIO = 2654435769  # 2^32 / golden ratio: Fibonacci hashing, Knuth, TAOCP 3, 6.4


def item_seed(base_seed: int, user_id: int, image_index: int) -> int:
    """Return the seed of one image, in [0, 2^32), since a torch CPU generator keeps no more; different within a user."""
    return (_user_seed(base_seed, user_id) + image_index) % 2**32


def item_seeds(base_seed: int, user_id: int, image_indices: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the seeds of a user's images, as `item_seed` does: [number] image indices -> [number]."""
    return (_user_seed(base_seed, user_id) + image_indices.astype(np.int64)) % 2**32


@lru_cache(maxsize=4096)
def _user_seed(base_seed: int, user_id: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{base_seed}:{user_id}".encode(), digest_size=4).digest(), "big")


def slots(user_ids: NDArray[np.int64], image_indices: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Return the row of the batch that each image is computed in: a function of the image alone, in [0, batch_size).

    Some kernels round differently in another row, so an image always has the same one. Consecutive images of a
    user take consecutive rows; users start at rows spread by Fibonacci hashing, so that batches fill evenly.
    """
    start = (
        (user_ids.astype(np.uint64) * np.uint64(_GOLDEN_RATIO)) % np.uint64(2**32) * np.uint64(batch_size)
    ) >> np.uint64(32)
    return (start.astype(np.int64) + image_indices) % batch_size
