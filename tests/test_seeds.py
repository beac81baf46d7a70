import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.definitions import seed_of, slot_of
from userdiff.seeds import item_seed, item_seeds, slots

USER_IDS = st.integers(1, 40) | st.integers(1, 2**63 - 1)


# Seeds


@pytest.mark.parametrize(
    ("item", "seed"),
    [
        ((42, 1, 0), 3062239372),
        ((42, 1, 1), 3062239373),
        ((42, 5, 0), 311273124),
        ((42, 31, 4), 2555016077),
        ((0, 1, 0), 1088167207),
    ],
)
def test_seeds_match_the_vectors(item, seed):
    assert item_seed(*item) == seed


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**63 - 1), USER_IDS, st.integers(0, 2**32 - 1))
def test_seeds_follow_the_definition(base, user_id, image_index):
    assert item_seed(base, user_id, image_index) == seed_of(base, user_id, image_index)
    assert item_seeds(base, user_id, np.array([image_index], np.uint32)).tolist() == [
        seed_of(base, user_id, image_index)
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), USER_IDS, st.integers(0, 2**32 - 1000))
def test_seeds_are_one_to_one_within_a_user(base, user_id, first):
    window = {item_seed(base, user_id, image_index) for image_index in range(first, first + 1000)}
    assert len(window) == 1000
    assert 0 <= min(window) <= max(window) < 2**32


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), USER_IDS)
def test_seeds_stay_one_to_one_where_they_wrap_around(base, user_id):
    wrap = 2**32 - item_seed(base, user_id, 0)  # the image_index whose seed is 0
    window = [item_seed(base, user_id, image_index % 2**32) for image_index in range(wrap - 3, wrap + 3)]
    assert window == [2**32 - 3, 2**32 - 2, 2**32 - 1, 0, 1, 2]


# Slots


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(USER_IDS, st.integers(0, 2**32 - 1)), min_size=1, max_size=20), st.integers(1, 64))
def test_slots_follow_the_definition(items, batch_size):
    user_ids, image_indices = np.array(items, dtype=np.int64).T
    found = slots(user_ids, image_indices, batch_size)
    assert found.tolist() == [slot_of(*item, batch_size) for item in items]


def test_slots_follow_the_definition_in_the_largest_batches():
    items = [(2**63 - 1, 2**32 - 1), (2**63 - 1, 0), (1, 2**32 - 1), (12345, 678)]
    user_ids, image_indices = np.array(items, dtype=np.int64).T
    assert slots(user_ids, image_indices, 65536).tolist() == [slot_of(*item, 65536) for item in items]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 64])
def test_consecutive_images_take_consecutive_rows(batch_size):
    found = slots(np.full(100, 7), np.arange(100), batch_size)
    assert set(np.diff(found) % batch_size) == {1 % batch_size}
