import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userdiff.identity import OPTION_DEFAULTS, describe_differences, differences, identity_hash, make_identity

NAMES = st.text("abcxyz_0", min_size=1, max_size=3)
JSON_VALUES = st.recursive(
    st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.sampled_from([0.5, 1e-9, 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
IDENTITIES = st.dictionaries(NAMES, JSON_VALUES, max_size=4)


def hash_by_definition(identity):
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def in_another_order(value):
    if isinstance(value, dict):
        return {name: in_another_order(value[name]) for name in reversed(value)}
    return [in_another_order(item) for item in value] if isinstance(value, list) else value


def test_options_at_their_default_are_left_out_and_required_values_never():
    identity = make_identity({"seed": 0, "nothing": None}, {"eta": 0.0, "vae_output_range": "signed"})
    assert identity == {"seed": 0, "nothing": None, "vae_output_range": "signed"}


def test_a_later_option_at_its_default_changes_no_hash(monkeypatch):
    old = make_identity({"seed": 42}, {"eta": 0.6})
    monkeypatch.setitem(OPTION_DEFAULTS, "clip_skip", 1.0)
    assert identity_hash(make_identity({"seed": 42}, {"eta": 0.6, "clip_skip": 1.0})) == identity_hash(old)


def test_an_identity_is_already_as_it_will_read_back():
    identity = make_identity({"user_index": {3: 1, 1: 0}, "shape": (4, 8)}, {})
    assert identity == {"user_index": {"3": 1, "1": 0}, "shape": [4, 8]}


@settings(max_examples=60, deadline=None)
@given(IDENTITIES)
def test_the_hash_follows_the_definition_in_any_order_of_keys_and_survives_json(identity):
    assert identity_hash(identity) == hash_by_definition(identity)
    assert identity_hash(in_another_order(identity)) == hash_by_definition(identity)
    assert identity_hash(json.loads(json.dumps(make_identity(identity, {})))) == hash_by_definition(identity)


@settings(max_examples=100, deadline=None)
@given(IDENTITIES, IDENTITIES)
def test_two_identities_differ_where_their_hashes_do(old, new):
    assert bool(list(differences(old, new))) == (hash_by_definition(old) != hash_by_definition(new))
    assert list(differences(old, in_another_order(old))) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"seed": 1, "eta": 0.6}, {"seed": 1}, [("eta", 0.6, None)]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2, "c": 3}, [("a", 1, 2), ("b", 1, 2), ("c", None, 3)]),
        (
            {"vae": {"weights": "x", "config": {"scaling_factor": 0.7, "force_upcast": True}}},
            {"vae": {"weights": "y", "config": {"scaling_factor": 1.5, "force_upcast": True}}},
            [("vae.config.scaling_factor", 0.7, 1.5), ("vae.weights", "x", "y")],
        ),
        ({"vae": {"weights": "x"}}, {"vae": "x"}, [("vae", {"weights": "x"}, "x")]),
        ({"shape": [4, 8]}, {"shape": [8, 4]}, [("shape", [4, 8], [8, 4])]),
    ],
)
def test_differences_are_named_by_where_they_are(old, new, found):
    assert list(differences(old, new)) == found


def test_differences_are_told_with_both_values_and_of_a_mapping_a_few():
    old = {
        "seed": 1,
        "user_index": {str(user_id): user_id - 1 for user_id in range(1, 10)},
        "unet": {"weights": 30 * "a"},
    }
    new = {"seed": 2, "user_index": {"1": 5, "2": 1}, "unet": {"weights": 30 * "b"}, "eta": 0.5}
    assert describe_differences(old, new) == (
        "eta was 0.0, is 0.5; seed was 1, is 2; unet.weights was aaaaaaaaaaaa..., is bbbbbbbbbbbb...; "
        "user_index.1 was 0, is 5; user_index.3 was 2, is absent; user_index.4 was 3, is absent; and 5 more of user_index"
    )
    assert describe_differences({"seed": 1}, {"seed": 2}, lambda *field: "/".join(field)) == "seed/1/2"
