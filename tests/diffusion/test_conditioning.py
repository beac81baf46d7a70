import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from userdiff.diffusion.conditioning import (
    IncompatibleWeightsError,
    UserConditionEncoder,
    load_condition_encoder,
    random_condition_encoder,
    user_index_map,
)

NUM_USERS, EMBED_DIM = 4, 6


@pytest.fixture
def state():
    torch.manual_seed(1)
    return UserConditionEncoder(NUM_USERS, EMBED_DIM).state_dict()


def with_prefix(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


LAYOUTS = {
    "bare .pt": ("weights.pt", torch.save, lambda s: s),
    "bare .safetensors": ("weights.safetensors", save_file, lambda s: s),
    "DDP .pt": ("weights.pt", torch.save, with_prefix),
    "DDP .safetensors": ("weights.safetensors", save_file, with_prefix),
    "training checkpoint": (
        "weights.pt",
        torch.save,
        lambda s: {"epoch": 3, "loss": 0.1, "optimizer": {"lr": 1e-4}, "condition_encoder_state_dict": s},
    ),
    "training checkpoint of a DDP wrapper": (
        "weights.pt",
        torch.save,
        lambda s: {"condition_encoder_state_dict": with_prefix(s)},
    ),
    "folder with .pt": ("condition_encoder.pt", torch.save, lambda s: s),
    "folder with .safetensors": ("condition_encoder.safetensors", save_file, lambda s: s),
    "another suffix": ("weights.bin", torch.save, lambda s: s),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_encoder(layout, state, tmp_path):
    name, save, arrange = LAYOUTS[layout]
    save(arrange(state), tmp_path / name)
    path = tmp_path if layout.startswith("folder") else tmp_path / name
    encoder = load_condition_encoder(path, NUM_USERS, EMBED_DIM)
    assert not encoder.training
    for name, tensor in state.items():
        assert torch.equal(encoder.state_dict()[name], tensor)


def test_half_precision_comes_back_as_float32(state, tmp_path):
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "condition_encoder.safetensors")
    encoder = load_condition_encoder(tmp_path, NUM_USERS, EMBED_DIM)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}


def test_the_output_is_the_definitions(state):
    encoder = UserConditionEncoder(NUM_USERS, EMBED_DIM).eval()
    encoder.load_state_dict(state)
    hidden = state["user_embedding.weight"][[2, 0]] @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    hidden = hidden * torch.sigmoid(hidden)
    expected = hidden @ state["mlp.3.weight"].T + state["mlp.3.bias"]
    torch.testing.assert_close(encoder(torch.tensor([2, 0])), expected)


def change(state, **tensors):
    return {**state, **tensors}


OF_THE_TWO = "--num_users and the UNet's cross_attention_dim"
MISMATCHES = {
    "another number of users": (
        lambda s: change(s, **{"user_embedding.weight": torch.zeros(31, EMBED_DIM)}),
        f"has user_embedding.weight with shape [31, 6], needed: [4, 6], {OF_THE_TWO}",
    ),
    "another width": (
        lambda s: UserConditionEncoder(NUM_USERS, 8).state_dict(),
        f"has user_embedding.weight with shape [4, 8], needed: [4, 6], {OF_THE_TWO}",
    ),
    "one tensor missing": (
        lambda s: {name: tensor for name, tensor in s.items() if name != "mlp.3.bias"},
        "has no tensor mlp.3.bias, needed with shape [6]",
    ),
    "one tensor too many": (
        lambda s: change(s, **{"projection.weight": torch.zeros(6, 6)}),
        "has a tensor projection.weight with shape [6, 6], needed: no such tensor",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_names_the_tensor_and_both_shapes(name, state, tmp_path):
    arrange, expected = MISMATCHES[name]
    torch.save(arrange(state), tmp_path / "weights.pt")
    with pytest.raises(IncompatibleWeightsError) as raised:
        load_condition_encoder(tmp_path / "weights.pt", NUM_USERS, EMBED_DIM)
    assert str(raised.value) == f"{tmp_path / 'weights.pt'} {expected}"


class Malicious:
    def __reduce__(self):
        return (Path("executed").touch, ())


BROKEN = {
    "empty": (lambda f, s: f.write_bytes(b""), "is empty"),
    "garbage": (lambda f, s: f.write_bytes(b"not weights at all"), "cannot be read as a torch file"),
    "malicious pickle": (
        lambda f, s: f.write_bytes(pickle.dumps(Malicious(), protocol=2)),
        "cannot be read as a torch file",
    ),
    "malicious torch file": (lambda f, s: torch.save({"a": Malicious()}, f), r"holds no state dict .*pathlib"),
    "no state dict": (lambda f, s: torch.save([1, 2], f), "holds one list, needed: a state dict"),
    "no tensors": (lambda f, s: torch.save({}, f), "holds no state dict"),
    "NaN": (
        lambda f, s: torch.save(change(s, **{"mlp.0.bias": torch.full((6,), float("nan"))}), f),
        "holds NaN or infinity in mlp.0.bias",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, expected = BROKEN[name]
    write(tmp_path / "weights.pt", state)
    with pytest.raises(ValueError, match=expected) as raised:
        load_condition_encoder(tmp_path / "weights.pt", NUM_USERS, EMBED_DIM)
    assert not isinstance(raised.value, IncompatibleWeightsError)  # `random` must not paper over these
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_safetensors_file_is_refused(state, tmp_path):
    file = tmp_path / "condition_encoder.safetensors"
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        load_condition_encoder(file, NUM_USERS, EMBED_DIM)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        load_condition_encoder(tmp_path / "nowhere.pt", NUM_USERS, EMBED_DIM)
    with pytest.raises(FileNotFoundError, match=r"neither condition_encoder\.safetensors nor condition_encoder\.pt"):
        load_condition_encoder(tmp_path, NUM_USERS, EMBED_DIM)


def test_a_folder_with_both_files_is_ambiguous(state, tmp_path):
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "condition_encoder.pt")
    save_file(state, tmp_path / "condition_encoder.safetensors")
    with pytest.raises(ValueError, match="name the file that is meant"):
        load_condition_encoder(tmp_path, NUM_USERS, EMBED_DIM)


def test_random_weights_depend_on_the_seed_alone():
    global_state = torch.get_rng_state()
    one, same, other = (random_condition_encoder(NUM_USERS, EMBED_DIM, seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), global_state)
    for name in one:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_the_row_of_a_user():
    assert user_index_map(3) == {1: 0, 2: 1, 3: 2}
    assert user_index_map(3, train_user_ids=[5, 1, 3]) == {1: 0, 3: 1, 5: 2}
    assert user_index_map(31, train_user_ids=range(1, 30, 2))[29] == 14


def test_a_user_map_is_read_as_it_stands(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"23": 1, "17": 0}))
    assert user_index_map(2, user_map=tmp_path / "map.json") == {17: 0, 23: 1}
    assert list(user_index_map(2, user_map=tmp_path / "map.json")) == [17, 23]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("not json", "is not JSON, needed: a JSON object of id to index"),
        ("[1, 2]", r"holds \[1, 2\], needed: a JSON object of id to index"),
        ('{"anna": 0}', "names user 'anna', needed: a whole number from 0"),
        ("{}", "names no users, needed: a JSON object"),
        ('{"1": 0, "01": 1}', "names user 1 twice, needed: each user once"),
        ('{"1": 0, "1": 1}', "names user 1 twice, needed: each user once"),
        ('{"1": 2}', "gives user 1 the index 2, needed: 0 to 1"),
        ('{"1": -1}', "gives user 1 the index -1"),
        ('{"1": true}', "gives user 1 the index True"),
        ('{"1": 0.0}', "gives user 1 the index 0.0"),
        ('{"7": 1, "8": 1}', "gives users 7 and 8 the same index 1, needed: one for each user"),
    ],
)
def test_a_bad_user_map_is_refused(content, expected, tmp_path):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        user_index_map(2, user_map=tmp_path / "map.json")
