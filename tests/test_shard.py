import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.definitions import shard_of
from userdiff.seeds import slots
from userdiff.shard import Shard

USER_IDS = st.integers(1, 40) | st.integers(1, 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(
    USER_IDS, st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(1, 2**16), st.integers(1, 2**20), st.data()
)
def test_shards_follow_the_definition(user_id, image_indices, batch_size, num_shards, data):
    shard = Shard(data.draw(st.integers(1, num_shards)), num_shards)
    found = shard.takes(user_id, np.array(image_indices, np.uint32), batch_size)
    assert found.tolist() == [
        shard_of(user_id, index, batch_size, num_shards) == shard.number for index in image_indices
    ]


@settings(max_examples=200, deadline=None)
@given(USER_IDS, st.integers(0, 3000), st.integers(1, 64), st.integers(1, 40))
def test_every_image_of_a_user_is_in_one_shard_and_they_are_spread_over_shards_and_slots(
    user_id, num_images, batch_size, num_shards
):
    shards = [Shard(number, num_shards) for number in range(1, num_shards + 1)]
    image_indices = np.arange(num_images)
    taken = np.array([shard.takes(user_id, image_indices, batch_size) for shard in shards])
    assert (taken.sum(axis=0) == 1).all()
    assert [shard.num_images(user_id, num_images, batch_size) for shard in shards] == taken.sum(axis=1).tolist()
    assert np.ptp(taken.sum(axis=1)) <= 1
    for of_shard in taken:
        rows = slots(np.full(of_shard.sum(), user_id), np.flatnonzero(of_shard), batch_size)
        assert np.ptp(np.bincount(rows, minlength=batch_size)) <= 1


@pytest.mark.parametrize("text", ["1/1", "2/7", "1048576/1048576"])
def test_a_shard_is_read_as_it_is_written(text):
    assert str(Shard.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "7", "0/3", "4/3", "1/0", "1/1048577", "-1/3", "1/3 ", "1.0/3", "1/2/3", "²/3", 99 * "1"]
)
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(ValueError, match="needed: I/N, 1 <= I <= N"):
        Shard.parse(text)
