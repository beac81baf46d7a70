"""The user condition: the encoder, its weights on disk, and which row of the embedding a user has."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import Tensor, nn

from userdiff.config import null_condition_row
from userdiff.diffusion.weights import (
    FILE_SUFFIXES,
    NoFitError,
    NoWeightsError,
    Weights,
    as_float32,
    check_fit,
    contents,
    find_weights,
    ignore,
    load_own,
)

FILE_STEM = "condition_encoder"
TRAINING_CHECKPOINT_KEY = "condition_encoder_state_dict"
_TABLE = "user_embedding.weight"
_USER_NAME = re.compile(r"(?:(?:ID|user)[_-]?)?([0-9]{1,19})", re.IGNORECASE)  # of a training set's folders


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


def load_condition_encoder(
    path: Path, num_users: int | None, embed_dim: int, on_note: Callable[[str], None] = ignore
) -> UserConditionEncoder:
    """Load an encoder strictly: every tensor present, none left over, all shapes right, all numbers finite.

    `path` is a file, or a folder holding `condition_encoder.safetensors` or `condition_encoder.pt`, or one that
    `accelerator.save_state` wrote. Such a file holds the encoder's state dict, alone or within a training checkpoint
    (see `weights.own_tensors`). Weights come back in float32, in eval mode, on the CPU.

    num_users: rows of the embedding table; None takes the file's.
    on_note: called with a line on every choice between what is there.
    Raises IncompatibleWeightsError naming the first tensor that does not fit, ValueError for a file that is not a
    state dict or holds NaN, FileNotFoundError where there is none.
    """
    with torch.device("meta"):  # takes no memory: a --num_users that is wrong may be huge
        names = UserConditionEncoder(1, embed_dim).state_dict()
    try:
        state, file = load_own(_find_weights(path, on_note), names, TRAINING_CHECKPOINT_KEY, on_note)
    except NoFitError as error:
        raise IncompatibleWeightsError(str(error)) from error
    table = state.get(_TABLE)
    num_rows = table.shape[0] if table is not None and table.dim() == 2 else 1
    if num_users is not None and table is not None and table.shape != (num_users, embed_dim):
        null_row = f"; if one of them is a null row, --num_users {num_rows} and --null_row say so" * (
            num_rows == num_users + 1
        )
        raise IncompatibleWeightsError(
            f"{file} has {_TABLE} with shape {list(table.shape)}, needed: {[num_users, embed_dim]}, --num_users and the "
            f"UNet's cross_attention_dim{null_row}"
        )
    if not num_rows:
        raise ValueError(f"{file} has {_TABLE} with no rows, needed: one for every user")
    with torch.device("meta"):
        encoder = UserConditionEncoder(num_users or num_rows, embed_dim)
    check_fit(state, encoder.state_dict(), str(file), error=IncompatibleWeightsError)
    encoder.load_state_dict(as_float32(state, encoder.state_dict(), str(file)), assign=True)
    return encoder.eval()


def null_token(encoder: UserConditionEncoder, null_condition: str) -> Tensor:
    """Return the token of the null condition, [1, 1, embed_dim], on the encoder's device.

    null_condition: `zeros`, a token of zeros; `row:R`, what the encoder makes of that row of the table. Raises ValueError for
    a row that the table does not have.
    """
    table = encoder.user_embedding.weight
    row = null_condition_row(null_condition)
    if row is None:
        return torch.zeros(1, 1, table.shape[1], device=table.device, dtype=table.dtype)
    if row >= len(table):
        raise ValueError(f"{null_condition} is out of range, needed: row:0 to row:{len(table) - 1}, a row of the table")
    token: Tensor = encoder(torch.tensor([row], device=table.device)).unsqueeze(1)
    return token


def random_condition_encoder(num_users: int, embed_dim: int, seed: int) -> UserConditionEncoder:
    """Make an untrained encoder, the same for the same seed in every process; leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**32)  # a torch CPU generator keeps no more bits than these
        return UserConditionEncoder(num_users, embed_dim).eval()


def _find_weights(path: Path, on_note: Callable[[str], None]) -> list[Weights]:
    if path.is_dir():
        candidates = [path / f"{FILE_STEM}{suffix}" for suffix in FILE_SUFFIXES]
        found = [Weights((file,), file.name) for file in candidates if file.is_file()]
        if found:
            for file in sorted(path.glob(f"{FILE_STEM}*")):
                if file not in candidates:
                    on_note(f"{file} is there too and is not used; --condition_encoder_path {file} uses it")
            return found
        try:
            return find_weights(path, FILE_STEM)[0]
        except NoWeightsError:
            names = f"{FILE_STEM}.safetensors nor {FILE_STEM}.pt"
            raise FileNotFoundError(f"{path} holds neither {names} ({contents(path)}); name the file") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected {FILE_STEM}.pt, .safetensors or their folder")
    return [Weights((path,), path.name)]


def user_index_map(
    num_rows: int,
    train_user_ids: Sequence[int] | None = None,
    user_map: Path | None = None,
    null_row: int | None = None,
) -> dict[int, int]:
    """Map user id -> row of the embedding, in ascending order of ids.

    With `train_user_ids` (the ids a trainer numbered by rank), the row is the id's rank among them; with `user_map`,
    what the JSON file says (`{"17": 0, "23": 1}`); with neither, `user_id - 1` for the ids from 1 on.

    null_row: the row of no user, where there is one; the others are counted without it.
    """
    rows = [row for row in range(num_rows) if row != null_row]
    if user_map is not None:
        return read_user_map(user_map, num_rows, null_row)
    return dict(zip(range(1, len(rows) + 1) if train_user_ids is None else sorted(train_user_ids), rows, strict=False))


def user_ids_of_folders(data_dir: Path, on_note: Callable[[str], None] = ignore) -> tuple[int, ...]:
    """Return the user ids that a training set's folders are named for, ascending: `ID_17`, `user_17` or `17`.

    Other files and folders are passed over. Raises ValueError where there are no such folders, and where two name one user.
    on_note: called with a line where the order of names, in which some trainers number their classes, is another.
    """
    folder_of: dict[int, str] = {}
    for folder in sorted(path.name for path in data_dir.iterdir() if path.is_dir()):
        match = _USER_NAME.fullmatch(folder)
        if match:
            user_id = int(match[1])
            if user_id in folder_of:
                raise ValueError(f"{data_dir} holds {folder_of[user_id]} and {folder}, both of user {user_id}")
            folder_of[user_id] = folder
    if not folder_of:
        raise ValueError(
            f"{data_dir} has no folder named for a user ({contents(data_dir)}), needed: such as ID_17, user_17, 17"
        )
    if list(folder_of) != sorted(folder_of):  # they were looked at in the order of names
        on_note(
            f"rows are counted by the numbers in the names of {data_dir}; a trainer that sorted the names themselves, as "
            "torchvision's ImageFolder does, has another order, which --user_map can say"
        )
    return tuple(sorted(folder_of))


def read_user_map(
    path: Path, num_rows: int, null_row: int | None = None, what: str = "a row of the table"
) -> dict[int, int]:
    """Read user id -> index, `{"17": 0, "23": 1}`, from JSON; raises ValueError where two users have the same."""
    needed = 'needed: a JSON object of id to index, like {"17": 0, "23": 1}'
    try:
        pairs = json.loads(path.read_bytes(), object_pairs_hook=tuple)  # a dict would hide repeats
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, {needed}") from error
    if not isinstance(pairs, tuple):
        raise ValueError(f"{path} holds {brief(pairs)}, {needed}")
    if not pairs:
        raise ValueError(f"{path} names no users, {needed}")
    index_by_id: dict[int, int] = {}
    user_of: dict[int, int] = {}
    for text, index in pairs:
        named = _USER_NAME.fullmatch(text)
        user_id = int(named[1]) if named else -1
        if not 0 <= user_id < 10**18:
            raise ValueError(f"{path} names user {brief(text)}, needed: a whole number from 0 to 10^18-1")
        if user_id in index_by_id:
            raise ValueError(f"{path} names user {user_id} twice, needed: each user once")
        if type(index) is not int or not 0 <= index < num_rows:
            raise ValueError(
                f"{path} gives user {user_id} the index {brief(index)}, needed: 0 to {num_rows - 1}, {what}"
            )
        if index == null_row:
            raise ValueError(f"{path} gives user {user_id} the index {index}, which --null_row says is no user's")
        if index in user_of:
            raise ValueError(
                f"{path} gives users {user_of[index]} and {user_id} the same index {index}, needed: one for each user"
            )
        index_by_id[user_id] = index
        user_of[index] = user_id
    return dict(sorted(index_by_id.items()))
