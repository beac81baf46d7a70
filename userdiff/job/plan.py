"""Which images a job makes, and which row of which batch each one takes. Pure arithmetic."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from userdiff.seeds import Item, slots
from userdiff.shard import WHOLE, Shard

PADDING = -1  # stands for a row of a batch that no image takes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The images of a run and which of them are left to make, decided by the main process for all others.

    Item number i is image `i % num_images_per_user` of the user `user_ids[i // num_images_per_user]`.
    """

    user_ids: tuple[int, ...]
    """Ascending, each once."""
    num_images_per_user: int
    batch_size: int
    """Rows of every forward pass; those without an image are padding."""
    pending: NDArray[np.bool_]
    """[users * images of each] whether an item is of this shard and still to be made."""
    shard: Shard = WHOLE
    """That of this run, whose images alone are asked for."""

    @cached_property
    def wanted(self) -> dict[int, int]:
        """The number of images that are asked for: user id -> images."""
        number, batch_size = self.num_images_per_user, self.batch_size
        return {user_id: self.shard.num_images(user_id, number, batch_size) for user_id in self.user_ids}

    @cached_property
    def num_items(self) -> int:
        """The number of images that are asked for, made or not."""
        return sum(self.wanted.values())

    @cached_property
    def num_pending(self) -> int:
        """The number of images that are still to be made."""
        return int(self.pending.sum())

    @property
    def num_done(self) -> int:
        """The number of images that are asked for and made already."""
        return self.num_items - self.num_pending

    def without(self, items: Iterable[Item]) -> "Plan":
        """Return the plan without these images among those to make."""
        pending, users = self.pending.copy(), {user_id: number for number, user_id in enumerate(self.user_ids)}
        for user_id, image_index in items:
            if user_id in users and image_index < self.num_images_per_user:
                pending[users[user_id] * self.num_images_per_user + image_index] = False
        return replace(self, pending=pending)

    def item(self, number: int) -> tuple[int, int]:
        """Return the (user_id, image_index) of an item number."""
        user, image_index = divmod(int(number), self.num_images_per_user)
        return self.user_ids[user], image_index

    def asks_for(self, user_id: int, image_indices: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return which of a user's images are asked for: [number] image indices -> [number]."""
        if user_id not in self.wanted:
            return np.zeros(len(image_indices), bool)
        is_in = self.shard.takes(user_id, image_indices, self.batch_size)
        return is_in & (image_indices < self.num_images_per_user)

    @cached_property
    def batches(self) -> NDArray[np.int64]:
        """[num_batches, batch_size] item numbers or PADDING: batch k takes the k-th pending item of every slot."""
        slot = self._pending_slots()
        lengths = np.bincount(slot, minlength=self.batch_size)
        by_slot = np.argsort(slot, kind="stable")  # stable: within a slot, (user_id, image_index) order stays
        items = np.flatnonzero(self.pending)[by_slot]
        batches = np.full((int(lengths.max()), self.batch_size), PADDING, dtype=np.int64)
        for row, queue in enumerate(np.split(items, np.cumsum(lengths)[:-1])):
            batches[: len(queue), row] = queue
        return batches

    def _pending_slots(self) -> NDArray[np.uint16]:
        """[num_pending] slots, computed user by user so that no other array has an entry for each item."""
        of_users = [np.zeros(0, np.uint16)]
        for user_id, pending in zip(self.user_ids, self.pending.reshape(len(self.user_ids), -1), strict=True):
            image_indices = np.flatnonzero(pending)
            of_user = slots(np.full_like(image_indices, user_id), image_indices, self.batch_size)
            of_users.append(of_user.astype(np.uint16))  # a batch has 65,536 rows at most
        return np.concatenate(of_users)

    def to_bytes(self) -> bytes:
        """Pack the plan for the store: a bit an item, compressed."""
        header = json.dumps([self.user_ids, self.num_images_per_user, self.batch_size, str(self.shard)])
        return header.encode() + b"\n" + zlib.compress(np.packbits(self.pending).tobytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Plan":
        """Unpack what `to_bytes` packed."""
        header, _, bits = data.partition(b"\n")
        user_ids, num_images_per_user, batch_size, shard = json.loads(header)
        packed = np.frombuffer(zlib.decompress(bits), dtype=np.uint8)
        return cls(
            user_ids=tuple(user_ids),
            num_images_per_user=num_images_per_user,
            batch_size=batch_size,
            pending=np.unpackbits(packed, count=len(user_ids) * num_images_per_user).astype(bool),
            shard=Shard.parse(shard),
        )


def make_plan(
    user_ids: Iterable[int],
    num_images_per_user: int,
    batch_size: int,
    done: Mapping[int, Sequence[int] | NDArray[np.integer]] = MappingProxyType({}),
    shard: Shard = WHOLE,
) -> Plan:
    """Plan a shard of `num_images_per_user` images for each user, without those done: user id -> [number] image indices."""
    ascending = tuple(sorted(user_ids))
    pending = np.ones((len(ascending), num_images_per_user), dtype=bool)
    image_indices = np.arange(0 if shard == WHOLE else num_images_per_user)
    for number, user_id in enumerate(ascending):
        if shard != WHOLE:
            pending[number] = shard.takes(user_id, image_indices, batch_size)
        made = np.asarray(done.get(user_id, ()), dtype=np.uint32)
        pending[number, made[made < num_images_per_user]] = False
    return Plan(
        user_ids=ascending,
        num_images_per_user=num_images_per_user,
        batch_size=batch_size,
        pending=pending.ravel(),
        shard=shard,
    )
