"""Which images there are, which seed and which row of a batch each has, and what is left. Pure arithmetic."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

PADDING = -1  # in a batch: a row that computes nothing of use
_GOLDEN_RATIO = 2654435769  # 2^32 / golden ratio: Fibonacci hashing, Knuth, TAOCP 3, 6.4


def seats(user_ids: NDArray[np.int64], image_indices: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Row of the batch that each image is computed in: a function of the image alone, in [0, batch_size).

    Some kernels round differently in another row, so an image always sits in the same one. Consecutive images of a
    user take consecutive rows; users start at rows spread by Fibonacci hashing, so that batches fill evenly.
    """
    start = (
        (user_ids.astype(np.uint64) * np.uint64(_GOLDEN_RATIO)) % np.uint64(2**32) * np.uint64(batch_size)
    ) >> np.uint64(32)
    return (start.astype(np.int64) + image_indices) % batch_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run was asked for and what of it is left: frozen by the main process, the same for every other.

    Item number i is image `i % num_images_per_user` of the user `user_ids[i // num_images_per_user]`.
    """

    user_ids: tuple[int, ...]
    """Ascending, each once."""
    num_images_per_user: int
    batch_size: int
    """Rows of every forward pass; what no image needs is padding."""
    waiting: NDArray[np.bool_]
    """[num_items] whether an item is still to be made."""

    @property
    def num_items(self) -> int:
        """How many images were asked for, made or not."""
        return len(self.user_ids) * self.num_images_per_user

    @property
    def num_waiting(self) -> int:
        """How many images are still to be made."""
        return int(self.waiting.sum())

    def item(self, number: int) -> tuple[int, int]:
        """Give the (user_id, image_index) of an item number."""
        user, image_index = divmod(int(number), self.num_images_per_user)
        return self.user_ids[user], image_index

    @cached_property
    def batches(self) -> NDArray[np.int64]:
        """[num_batches, batch_size] item numbers or PADDING: batch k takes the k-th waiting item of every seat."""
        items, seat = np.flatnonzero(self.waiting), self._waiting_seats()
        queue_lengths = np.bincount(seat, minlength=self.batch_size)
        batches = np.full((int(queue_lengths.max(initial=0)), self.batch_size), PADDING, dtype=np.int64)
        by_seat = np.argsort(seat, kind="stable")  # stable: within a seat, (user_id, image_index) order stays
        ends = np.cumsum(queue_lengths)
        for row, (end, length) in enumerate(zip(ends.tolist(), queue_lengths.tolist(), strict=True)):
            batches[:length, row] = items[by_seat[end - length : end]]
        return batches

    def _waiting_seats(self) -> NDArray[np.uint16]:
        """Seats of the waiting items, user by user, so that no array but the answer has an entry for each item."""
        of_users = [np.zeros(0, np.uint16)]
        for user_id, waiting in zip(self.user_ids, self.waiting.reshape(len(self.user_ids), -1), strict=True):
            image_indices = np.flatnonzero(waiting)
            of_user = seats(np.full_like(image_indices, user_id), image_indices, self.batch_size)
            of_users.append(of_user.astype(np.uint16))  # a batch has 65,536 rows at most
        return np.concatenate(of_users)

    def to_bytes(self) -> bytes:
        """Pack the plan to travel: a bit an item, compressed."""
        header = [self.user_ids, self.num_images_per_user, self.batch_size]
        return json.dumps(header).encode() + b"\n" + zlib.compress(np.packbits(self.waiting).tobytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Plan":
        """Unpack what `to_bytes` packed."""
        header, _, bits = data.partition(b"\n")
        user_ids, num_images_per_user, batch_size = json.loads(header)
        waiting = np.unpackbits(
            np.frombuffer(zlib.decompress(bits), dtype=np.uint8), count=len(user_ids) * num_images_per_user
        )
        return cls(
            user_ids=tuple(user_ids),
            num_images_per_user=num_images_per_user,
            batch_size=batch_size,
            waiting=waiting.astype(bool),
        )


def make_plan(
    user_ids: Iterable[int],
    num_images_per_user: int,
    batch_size: int,
    done: Mapping[int, Sequence[int] | NDArray[np.integer]] = MappingProxyType({}),
) -> Plan:
    """Plan `num_images_per_user` images for each user, less those done: of which user, which images."""
    ascending = tuple(sorted(user_ids))
    waiting = np.ones((len(ascending), num_images_per_user), dtype=bool)
    for number, user_id in enumerate(ascending):
        made = np.asarray(done.get(user_id, ()), dtype=np.uint32)
        waiting[number, made[made < num_images_per_user]] = False
    return Plan(
        user_ids=ascending, num_images_per_user=num_images_per_user, batch_size=batch_size, waiting=waiting.ravel()
    )
