"""What all images of a dataset have in common, and what follows for each: its row and its text chunks."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset.layout import file_name
from userdiff.dataset.png import RUN_CHUNK
from userdiff.dataset.rows import Row, Rows
from userdiff.seeds import item_seed, item_seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The fields of an identity that rows and text chunks repeat."""

    seed: int
    """The base seed."""
    num_inference_steps: int
    conditioning: str
    run: str
    """The identity hash."""

    @classmethod
    def of(cls, identity: Mapping[str, Any], run: str) -> "Recipe":
        """Return the recipe in an identity, `run` being its hash."""
        return cls(
            seed=identity["seed"],
            num_inference_steps=identity["num_inference_steps"],
            conditioning=identity.get("conditioning", "trained"),
            run=run,
        )

    def text_chunks(self, user_id: int, image_index: int) -> dict[str, str]:
        """Return what the PNG of an image says of itself."""
        return {
            "user_id": str(user_id),
            "image_index": str(image_index),
            "seed": str(item_seed(self.seed, user_id, image_index)),
            "num_inference_steps": str(self.num_inference_steps),
            "conditioning": self.conditioning,
            RUN_CHUNK: self.run,
        }

    def row(self, user_id: int, image_index: int, size: tuple[int, int], png: bytes) -> Row:
        """Return the row of an image of `size` (width, height) whose file holds `png`."""
        return Row(
            file_name=file_name(user_id, image_index),
            user_id=user_id,
            image_index=image_index,
            seed=item_seed(self.seed, user_id, image_index),
            num_inference_steps=self.num_inference_steps,
            conditioning=self.conditioning,
            width=size[0],
            height=size[1],
            num_bytes=len(png),
            sha256=hashlib.sha256(png).hexdigest(),
        )

    def agrees(self, rows: Rows) -> NDArray[np.bool_]:
        """Return which rows have this seed, number of steps and conditioning: [number] bool."""
        array = rows.array
        is_as_planned: NDArray[np.bool_] = array["num_inference_steps"] == self.num_inference_steps
        is_as_planned &= array["is_random"] == (self.conditioning == "random")
        for user_id, place in rows.places.items():
            is_as_planned[place] &= array["seed"][place] == item_seeds(self.seed, user_id, array["image_index"][place])
        return is_as_planned
