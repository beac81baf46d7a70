"""Similarity of images, measured on short integer vectors. Functions of arrays; no files are opened."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS, _COLUMNS = 512, 4096  # of a block of distances: 8 MB

NEAR = np.dtype([("own", "i8"), ("own_distance", "f8"), ("other", "i8"), ("other_distance", "f8")])
"""The nearest vector of the same user, and of any other: an index, -1 where there is none, and how far it is."""


def nearest(
    queries: NDArray[np.integer],
    users: NDArray[np.int64],
    others: NDArray[np.integer] | None = None,
    other_users: NDArray[np.int64] | None = None,
) -> Iterator[tuple[int, float, int, float]]:
    """Find for every query, in their order, the nearest of `others`, as the fields of NEAR.

    queries: [n, d]; others: [m, d], by default the queries themselves, where none is its own neighbour. users: [n] and
    other_users: [m], whose vectors they are, ascending.
    Distances are squared Euclidean. Integers whose products sum up to less than 2^24 give exact ones in float32: the
    same numbers on any machine. Of several at the same distance the first is taken. All are compared with all: the
    time grows as n x m.
    """
    is_same = others is None or other_users is None
    if others is None or other_users is None:
        others, other_users = queries, users
    for user_id in np.unique(users):
        first, last = np.searchsorted(users, [user_id, user_id + 1]).tolist()
        left, right = np.searchsorted(other_users, [user_id, user_id + 1]).tolist()
        for start in range(first, last, _ROWS):
            block = queries[start : min(start + _ROWS, last)]
            own = _closest(block, others, [(left, right)], itself=start if is_same else None)
            other = _closest(block, others, [(0, left), (right, len(others))])
            yield from zip(*own, *other, strict=True)


def _closest(
    block: NDArray[np.integer], others: NDArray[np.integer], spans: list[tuple[int, int]], itself: int | None = None
) -> tuple[list[int], list[float]]:
    """Find the nearest within some spans of `others`; itself: the first query's own index there, which is not to be found."""
    rows = np.arange(len(block))
    best, index = np.full(len(block), np.inf), np.full(len(block), -1)
    queries = block.astype(np.float32)
    doubled = -2 * queries
    for left, right in spans:
        for start in range(left, right, _COLUMNS):
            columns = others[start : min(start + _COLUMNS, right)].astype(np.float32)
            distances = doubled @ columns.T
            distances += np.einsum("md,md->m", columns, columns)  # all but the query's own square
            if itself is not None:
                is_inside = (rows + itself >= start) & (rows + itself < start + len(columns))
                distances[rows[is_inside], (rows + itself - start)[is_inside]] = np.inf
            at = distances.argmin(axis=1)
            is_closer = distances[rows, at] < best
            best[is_closer], index[is_closer] = distances[rows, at][is_closer], at[is_closer] + start
    return index.tolist(), (best + (queries**2).sum(axis=1)).tolist()


@dataclass(frozen=True, slots=True)
class Similarity:
    """Whose images a user's images are most like."""

    own: float
    """Share of the images whose nearest one is of the same user."""
    chance: float
    """What that share would be if images told nothing of their user."""
    other: int | None
    """The other user to whom most of the rest are nearest; the first of several."""
    other_share: float


def similarity(
    users: NDArray[np.int64], near: NDArray[np.void], other_users: NDArray[np.int64] | None = None
) -> dict[int, Similarity]:
    """Sum up, user by user, the fields of NEAR that `nearest` found for the same arguments.

    A user without a nearest image, of their own or another's, is left out. Equally near counts as the user's own.
    """
    is_same = other_users is None
    candidates = users if other_users is None else other_users
    sums: dict[int, Similarity] = {}
    for user_id in np.unique(users).tolist():
        found = near[users == user_id]
        is_own = (found["own"] >= 0) & (found["own_distance"] <= found["other_distance"])
        num_candidates = len(candidates) - is_same
        if num_candidates:
            others = Counter(candidates[found["other"][~is_own]].tolist())
            other, count = min(others.items(), key=lambda item: (-item[1], item[0])) if others else (None, 0)
            chance = (int((candidates == user_id).sum()) - is_same) / num_candidates
            sums[user_id] = Similarity(float(is_own.mean()), chance, other, count / len(found))
    return sums
