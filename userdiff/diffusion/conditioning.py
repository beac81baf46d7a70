"""The user condition: the encoder, its weights on disk, and which row of the embedding a user has."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FILE_STEM = "condition_encoder"
TRAINING_CHECKPOINT_KEY = "condition_encoder_state_dict"


class UserConditionEncoder(nn.Module):
    """A learned embedding per user and a small MLP; its output is the UNet's only conditioning token."""

    def __init__(self, num_users: int, embed_dim: int) -> None:
        """Make an encoder for `num_users` users; `embed_dim` is the UNet's `cross_attention_dim`."""
        super().__init__()
        self.user_embedding = nn.Embedding(num_users, embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(embed_dim, embed_dim),
        )

    def forward(self, user_index: Tensor) -> Tensor:
        """user_index: [batch] int64, rows of the embedding -> [batch, embed_dim]; `unsqueeze(1)` makes the token."""
        embedding: Tensor = self.mlp(self.user_embedding(user_index))
        return embedding


class IncompatibleWeightsError(ValueError):
    """The weights are readable, but they belong to an encoder of another shape."""


def load_condition_encoder(path: Path, num_users: int, embed_dim: int) -> UserConditionEncoder:
    """Load an encoder strictly: every tensor present, none left over, all shapes right, all numbers finite.

    `path` is a file or a folder holding `condition_encoder.safetensors` or `condition_encoder.pt`. The file holds a
    bare state dict, one with the `module.` prefix of a DDP wrapper, or a training checkpoint that has it under
    `condition_encoder_state_dict`. Weights come back in float32, in eval mode, on the CPU.

    Raises IncompatibleWeightsError naming the first tensor that does not fit, ValueError for a file that is not a
    state dict or holds NaN, FileNotFoundError where there is none.
    """
    file = _weights_file(path)
    state = _state_dict(_read(file), file)
    with torch.device("meta"):  # takes no memory: a --num_users that is wrong may be huge
        encoder = UserConditionEncoder(num_users, embed_dim)
    _check_fit(state, encoder.state_dict(), file)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file} holds NaN or infinity in {name}; the file is damaged or training diverged")
    encoder.to_empty(device="cpu").load_state_dict(state)
    return encoder.eval()


def random_condition_encoder(num_users: int, embed_dim: int, seed: int) -> UserConditionEncoder:
    """Make an untrained encoder, the same for the same seed in every process; leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**32)  # a torch CPU generator keeps no more bits than these
        return UserConditionEncoder(num_users, embed_dim).eval()


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        candidates = [path / f"{FILE_STEM}{suffix}" for suffix in (".safetensors", ".pt")]
        found = [file for file in candidates if file.is_file()]
        if len(found) > 1:
            raise ValueError(f"{path} holds both {found[0].name} and {found[1].name}; name the file that is meant")
        if found:
            return found[0]
        raise FileNotFoundError(f"{path} holds neither {candidates[0].name} nor {candidates[1].name}; name the file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected {FILE_STEM}.pt, .safetensors or their folder")
    return path


def _read(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and safetensors each fail in ways of their own
        kind = (
            "a safetensors file"
            if file.suffix == ".safetensors"
            else "a torch file of plain tensors (save the state dict, not the module)"
        )
        raise ValueError(f"{file} cannot be read as {kind}; it is empty, truncated, or not one") from error


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and TRAINING_CHECKPOINT_KEY in content:
        content = content[TRAINING_CHECKPOINT_KEY]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{file} holds no state dict of a UserConditionEncoder, nor one under {TRAINING_CHECKPOINT_KEY!r}"
        )
    if not content:
        raise ValueError(f"{file} holds no tensors, needed: the state dict of a UserConditionEncoder")
    for name, tensor in content.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}"
            raise ValueError(f"{file} holds {name} as {kind}, needed: floating-point numbers, dense, stored")
    state = {str(name).removeprefix("module."): tensor.float().contiguous() for name, tensor in content.items()}
    if len(state) != len(content):
        raise ValueError(f"{file} holds a tensor twice, needed: names all with module. in front, or all without")
    return state


def _check_fit(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], file: Path) -> None:
    for name, tensor in needed.items():
        need = list(tensor.shape)
        if name not in found:
            raise IncompatibleWeightsError(f"{file} has no tensor {name}, needed with shape {need}")
        if found[name].shape != tensor.shape:
            shape = list(found[name].shape)
            hint = "; of the two, --num_users is the first, the UNet's cross_attention_dim the second"
            hint = hint if name == "user_embedding.weight" else ""
            raise IncompatibleWeightsError(f"{file} has {name} with shape {shape}, needed {need}{hint}")
    for name in found:
        if name not in needed:
            raise IncompatibleWeightsError(
                f"{file} has a tensor {name} with shape {list(found[name].shape)}, needed: no such tensor"
            )


def user_index_map(
    num_users: int, train_user_ids: Sequence[int] | None = None, user_map: Path | None = None
) -> dict[int, int]:
    """Map user id -> row of the embedding, in ascending order of ids.

    With `train_user_ids` (the ids a trainer numbered by rank), the index is the id's rank among them; with `user_map`,
    what the JSON file says (`{"17": 0, "23": 1}`); with neither, `user_id - 1` for the ids 1 to num_users.
    """
    if user_map is not None:
        return _read_user_map(user_map, num_users)
    if train_user_ids is not None:
        return {user_id: index for index, user_id in enumerate(sorted(train_user_ids))}
    return {user_id: user_id - 1 for user_id in range(1, num_users + 1)}


def _read_user_map(path: Path, num_users: int) -> dict[int, int]:
    needed = 'needed: a JSON object of id to index, like {"17": 0, "23": 1}'
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=tuple)  # a dict would hide repeats
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, {needed}") from error
    if not isinstance(pairs, tuple):
        raise ValueError(f"{path} holds {brief(pairs)}, {needed}")
    if not pairs:
        raise ValueError(f"{path} names no users, {needed}")
    index_by_id: dict[int, int] = {}
    user_of: dict[int, int] = {}
    for text, index in pairs:
        user_id = int(text) if re.fullmatch("[0-9]{1,19}", text) else 0
        if not 1 <= user_id < 10**18:
            raise ValueError(f"{path} names user {brief(text)}, needed: a whole number from 1 to 10^18-1")
        if user_id in index_by_id:
            raise ValueError(f"{path} names user {user_id} twice, needed: each user once")
        if type(index) is not int or not 0 <= index < num_users:
            raise ValueError(
                f"{path} gives user {user_id} the index {brief(index)}; --num_users {num_users} has 0 to {num_users - 1}"
            )
        if index in user_of:
            raise ValueError(
                f"{path} gives users {user_of[index]} and {user_id} the same index {index}, needed: one for each user"
            )
        index_by_id[user_id] = index
        user_of[index] = user_id
    return dict(sorted(index_by_id.items()))
