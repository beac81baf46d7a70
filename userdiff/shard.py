"""Which images belong to which of the shards that independent jobs make of a dataset. Pure arithmetic, without numpy."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_SHARDS = 2**20
_NEEDED = f"needed: I/N, 1 <= I <= N <= {MAX_SHARDS}, or auto"


@dataclass(frozen=True)
class Shard:
    """A part of a dataset's images; raises ValueError for numbers that are out of range.

    With `period` the least common multiple of the batch size and the number of shards, an image is in shard
    `1 + (image_index + image_index // period + user_id) % count`, whatever else is asked for. Two things follow:

    - A user has as many images in each shard as in any other, give or take one.
    - A user's images in a shard take each slot as often as any other, give or take one. Within a period their slots all
      differ, and are the same modulo the common divisor of the two numbers; in the next period they are the next ones.
    """

    number: int
    """1 to `count`."""
    count: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.number <= self.count <= MAX_SHARDS:
            raise ValueError(f"{str(self)!r} is no shard, {_NEEDED}")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse `2/7`; raises ValueError."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise ValueError(f"{text!r} is no shard, {_NEEDED}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        """Return what `parse` takes."""
        return f"{self.number}/{self.count}"

    def takes(self, user_id: int, image_indices: "NDArray[np.integer]", batch_size: int) -> "NDArray[np.bool_]":
        """Return which of a user's images are in this shard: [number] image indices -> [number]."""
        first = (self.number - 1 - user_id) % self.count
        indices = image_indices.astype("int64")
        is_in: NDArray[np.bool_] = (indices + indices // math.lcm(batch_size, self.count)) % self.count == first
        return is_in

    def num_images(self, user_id: int, num_images: int, batch_size: int) -> int:
        """Return how many of a user's first `num_images` images are in this shard."""
        period = math.lcm(batch_size, self.count)
        num_periods, rest = divmod(num_images, period)
        first = (self.number - 1 - user_id - num_periods) % self.count
        return num_periods * (period // self.count) + len(range(first, rest, self.count))


WHOLE = Shard(1, 1)
"""All of a dataset."""
