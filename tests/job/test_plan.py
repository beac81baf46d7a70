import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.definitions import shard_of, slot_of
from userdiff.job import plan
from userdiff.job.plan import PADDING, Plan
from userdiff.shard import WHOLE, Shard

USER_IDS = st.integers(1, 40) | st.integers(1, 2**63 - 1)


def batches_by_definition(items, batch_size):
    """Batch k takes the k-th pending item of every slot, each slot in (user, index) order; None is padding."""
    queues = [[] for _ in range(batch_size)]
    for user_id, image_index in sorted(items):
        queues[slot_of(user_id, image_index, batch_size)].append((user_id, image_index))
    return [[q[k] if k < len(q) else None for q in queues] for k in range(max(map(len, queues)))]


def make_plan(user_ids, num_images, batch_size, done=(), shard=WHOLE):
    of_user = {}
    for user_id, image_index in done:
        of_user.setdefault(user_id, []).append(image_index)
    return plan.make_plan(user_ids, num_images, batch_size, of_user, shard)


def batches_of(plan):
    return [[None if number == PADDING else plan.item(number) for number in batch] for batch in plan.batches]


def test_a_plan_numbers_images_user_by_user_and_counts_what_is_left():
    plan = make_plan([7, 3], 3, batch_size=4, done=[(3, 0), (7, 2), (99, 0), (3, 5)])  # two of them nobody asked for
    assert plan.user_ids == (3, 7)
    assert [plan.item(number) for number in range(6)] == [(3, 0), (3, 1), (3, 2), (7, 0), (7, 1), (7, 2)]
    assert (plan.num_items, plan.num_pending) == (6, 4)


@st.composite
def plans(draw):
    """(user_ids in some order, num_images_per_user, batch_size, done items, some of them never asked for)."""
    user_ids = draw(st.lists(USER_IDS, min_size=1, max_size=6, unique=True))
    num_images = draw(st.integers(1, 12))
    asked = st.tuples(st.sampled_from(user_ids), st.integers(0, num_images - 1))
    done = draw(st.sets(asked | st.tuples(USER_IDS, st.integers(0, 20)), max_size=60))
    return user_ids, num_images, draw(st.integers(1, 64)), done


@settings(max_examples=150, deadline=None)
@given(plans(), st.randoms(use_true_random=False))
def test_batches_follow_the_definition_in_whatever_order_things_are_named(asked, shuffler):
    user_ids, num_images, batch_size, done = asked
    pending = {(user_id, index) for user_id in user_ids for index in range(num_images)} - done
    plan = make_plan(user_ids, num_images, batch_size, done)
    assert batches_of(plan) == batches_by_definition(pending, batch_size)
    assert plan.batches.shape[1] == batch_size
    assert plan.num_pending == len(pending)
    shuffled, shuffled_done = list(user_ids), sorted(done)
    shuffler.shuffle(shuffled)
    shuffler.shuffle(shuffled_done)
    assert make_plan(shuffled, num_images, batch_size, shuffled_done).to_bytes() == plan.to_bytes()


@pytest.mark.parametrize(
    ("user_ids", "num_images", "batch_size", "done", "num_batches"),
    [
        ([1], 1, 1, [], 1),
        ([1], 1, 16, [], 1),
        ([31], 1, 64, [], 1),
        ([1], 5, 64, [], 1),
        ([1], 64, 64, [], 1),
        ([1], 65, 64, [], 2),
        ([1], 17, 16, [(1, 0)], 1),
        ([1], 33, 16, [(1, 8)], 3),  # images 0 and 32 wait for one row
        ([1, 2, 3], 7, 5, [], 5),
        ([1, 2, 3], 7, 1, [], 21),
        ([1, 2], 2, 4, [(1, 0), (1, 1), (2, 0), (2, 1)], 0),
        (range(1, 32), 100, 64, [], 50),  # 49 were free packing; cutting per user costs 62
    ],
)
def test_ragged_and_tiny_plans_have_no_batch_too_many(user_ids, num_images, batch_size, done, num_batches):
    plan = make_plan(user_ids, num_images, batch_size, done)
    assert plan.batches.shape == (num_batches, batch_size)
    assert int((plan.batches != PADDING).sum()) == len(user_ids) * num_images - len(done)


@pytest.mark.parametrize("num_users", [1, 2, 10, 31, 100, 1000])
@pytest.mark.parametrize("batch_size", [16, 64])
def test_users_spread_evenly_over_the_rows(num_users, batch_size):
    num_items = num_users * 100
    more = len(make_plan(range(1, num_users + 1), 100, batch_size).batches) - -(-num_items // batch_size)
    assert 0 <= more <= max(1, 0.02 * num_items / batch_size)


# Shards


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(1, 20))
def test_shards_are_parts_of_the_whole_plan_that_make_it_up(asked, num_shards):
    user_ids, num_images, batch_size, done = asked
    whole = make_plan(user_ids, num_images, batch_size, done)
    shards = [Shard(number, num_shards) for number in range(1, num_shards + 1)]
    parts = [make_plan(user_ids, num_images, batch_size, done, shard) for shard in shards]
    assert (sum(part.pending.astype(int) for part in parts) == whole.pending).all()
    assert sum(part.num_items for part in parts) == whole.num_items == sum(whole.wanted.values())
    for shard, part in zip(shards, parts, strict=True):
        items = {(user_id, index) for user_id in user_ids for index in range(num_images)}
        wanted = {item for item in items if shard_of(*item, batch_size, num_shards) == shard.number}
        assert (part.num_items, part.num_done) == (len(wanted), len(wanted & done))
        assert batches_of(part) == batches_by_definition(wanted - done, batch_size)
        for user_id in (*user_ids, 2**63):
            asked_for = part.asks_for(user_id, np.arange(20)).tolist()
            assert asked_for == [(user_id, index) in wanted for index in range(20)]


@pytest.mark.parametrize("num_shards", [2, 3, 5, 7, 8, 10, 16, 17, 64, 65])
@pytest.mark.parametrize("batch_size", [16, 64])
def test_the_batches_of_a_shard_are_full(num_shards, batch_size):
    """Wherever a user has several batches in a shard, whatever divisors the two numbers have in common."""
    num_images = 8 * batch_size * num_shards + 5
    for number in {1, 2, num_shards}:
        part = make_plan(range(1, 4), num_images, batch_size, shard=Shard(number, num_shards))
        assert abs(part.num_items - 3 * num_images / num_shards) <= 3
        assert len(part.batches) <= -(-part.num_items // batch_size) + 2


# Plans on their way


@settings(max_examples=100, deadline=None)
@given(plans())
def test_a_plan_arrives_as_it_was_sent(asked):
    user_ids, num_images, batch_size, done = asked
    sent = make_plan(user_ids, num_images, batch_size, done, Shard(2, 3))
    arrived = Plan.from_bytes(sent.to_bytes())
    assert arrived.user_ids == sent.user_ids
    assert arrived.num_images_per_user == sent.num_images_per_user
    assert arrived.batch_size == sent.batch_size
    assert arrived.shard == sent.shard
    assert arrived.pending.dtype == np.bool_
    assert arrived.pending.tolist() == sent.pending.tolist()
    assert np.array_equal(arrived.batches, sent.batches)


def test_a_plan_travels_in_a_bit_an_image():
    done = [(1, index) for index in range(80_000) if random.Random(index).random() < 0.5]  # nothing to compress
    assert len(make_plan([1], 80_000, 16, done).to_bytes()) < 80_000 / 8 + 100
