"""`run.json`: the identity that decides the pixels, the numerics they were computed with, and the history of runs."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userdiff.dataset.atomic import publish
from userdiff.dataset.files import open_file, read_file
from userdiff.dataset.layout import RECORD_NAME
from userdiff.identity import differences, identity_hash
from userdiff.seeds import Item
from userdiff.shard import WHOLE, Shard
from userdiff.shutdown import Stopped
from userdiff.text import id_range

NUMERICS_DEFAULTS = {"png_compress_level": 6}
"""Values for records from before these were noted."""
MAX_BYTES = 2**27  # of a record: four million failed images
_LEFT_OUT = ("joined", "launch", "lost", "shard")  # of an entry, where they are None
_START = b'{\n  "run": "'
_START_BYTES = 2**14
_ODD = (ValueError, LookupError, TypeError, AttributeError, OverflowError, argparse.ArgumentTypeError)


@dataclass(kw_only=True)
class RunEntry:
    """One run of a job or of a merge, and how it ended."""

    started: str
    """ISO 8601, in UTC."""
    ended: str | None = None
    state: str = "running"
    """`running`, `ended`, `failed`, or `stopped by signal N`. A killed run leaves `running`, and no lock."""
    cause: str | None = None
    """Why the run ended early."""
    joined: list[str] | None = None
    """The names of the folders that a merge joined."""
    launch: str | None = None
    """What tells the launch from any other, where its launcher may restart the processes."""
    shard: str | None = None
    """`2/7`: the run was asked for this shard alone of these users and images, cut for the batch size in `numerics`."""
    num_processes: int
    user_ids: str
    """The users that were asked for, as `--user_ids` has them: `1-3 5`."""
    num_images_per_user: int
    numerics: dict[str, Any]
    published: int = 0
    """Images that this run made."""
    lost: list[str] | None = None
    """The processes that were lost, and in which way; their batches were made by the others."""
    failed: list[Item] = field(default_factory=list)
    """Images that were asked for and are not there."""

    def __post_init__(self) -> None:
        """Raise one of _ODD for values that no run writes."""
        kinds: list[tuple[Any, list[object]]] = [
            (str, [self.started, self.state, self.user_ids]),
            ((str, NoneType), [self.ended, self.cause, self.launch, self.shard]),
            ((list, NoneType), [self.joined, self.lost]),
            (dict, [self.numerics]),
            (list, [self.failed]),
        ]
        if not all(isinstance(value, kind) for kind, values in kinds for value in values):
            raise TypeError(self)
        for number in (self.num_processes, self.num_images_per_user, self.published):
            if type(number) is not int or not 0 <= number <= 2**64:
                raise TypeError(self)
        self.failed = [(int(user_id), int(image_index)) for user_id, image_index in self.failed]
        batch_size = self.numerics["batch_size"] if self.shard_of_all() != WHOLE else 1
        if type(batch_size) is not int or not 1 <= batch_size <= 2**16:
            raise TypeError(self)
        self.id_ranges()
        self.seconds(datetime.now(timezone.utc))

    def id_ranges(self) -> list[range]:
        """Return the users that were asked for."""
        return list(map(id_range, self.user_ids.split()))

    def shard_of_all(self) -> Shard:
        """Return the shard that was asked for."""
        return WHOLE if self.shard is None else Shard.parse(self.shard)

    def wanted(self) -> dict[int, int]:
        """Return what was asked for: user id -> images, of the run's shard."""
        shard, number = self.shard_of_all(), self.num_images_per_user
        user_ids = chain.from_iterable(self.id_ranges())
        if shard == WHOLE:
            return dict.fromkeys(user_ids, number)
        return {user_id: shard.num_images(user_id, number, self.numerics["batch_size"]) for user_id in user_ids}

    def asks_for(self, user_id: int, image_indices: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return which images of a user, one of `wanted`, were asked for: [number] image indices -> [number]."""
        shard, are_first = self.shard_of_all(), image_indices < self.num_images_per_user
        if shard == WHOLE:
            return are_first
        return are_first & shard.takes(user_id, image_indices, self.numerics["batch_size"])

    def seconds(self, now: datetime | None = None) -> float | None:
        """Return how long the run took, until `now` if it has not ended; None where that cannot be told.

        Neither can it where the clock was set back meanwhile.
        """
        ended = datetime.fromisoformat(self.ended) if self.ended else now
        seconds = (ended - datetime.fromisoformat(self.started)).total_seconds() if ended else -1.0
        return seconds if seconds >= 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return the entry as `run.json` has it."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in _LEFT_OUT}


@dataclass(kw_only=True)
class RunRecord:
    """The content of `run.json`."""

    identity: dict[str, Any]
    """What decides the pixels; see `userdiff.identity`."""
    numerics: dict[str, Any]
    """What may change their last bits: batch size, device, threads, library versions. Those of the first images."""
    history: list[RunEntry] = field(default_factory=list)
    """Oldest first."""
    manifest_sha256: str | None = None
    """Of the manifest as it was last published; one with another hash was damaged or edited since."""

    @property
    def run(self) -> str:
        """The identity hash."""
        return identity_hash(self.identity)

    @property
    def last(self) -> RunEntry | None:
        """The last run; None before the first."""
        return self.history[-1] if self.history else None

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        content = {"run": self.run, **asdict(self), "history": [entry.to_json() for entry in self.history]}
        return (json.dumps(content, indent=2) + "\n").encode()

    def publish(self, output_dir: Path) -> None:
        """Write the folder's `run.json`."""
        publish(output_dir / RECORD_NAME, self.to_bytes(), sync=True)

    def begin(self, output_dir: Path, entry: RunEntry) -> None:
        """Note a run that begins."""
        self.history.append(entry)
        self.publish(output_dir)

    def end(self, output_dir: Path, error: BaseException | None = None) -> None:
        """Note how the last run ended: of itself, or by an error."""
        entry = self.history[-1]
        if entry.state != "running":  # it has not begun
            return
        entry.state, entry.ended = "ended", now()
        if isinstance(error, Stopped):
            entry.state = f"stopped by signal {error.signal_number}"
        elif error is not None:
            entry.state, entry.cause = "failed", str(error) or type(error).__name__
        self.publish(output_dir)

    def check(self) -> None:
        """Raise one of _ODD for values that no job writes."""
        identity, numerics = self.identity, self.numerics
        weights = [identity["vae"]["weights"], identity["unet"]["weights"], identity["condition_encoder"]]
        level = numerics.get("png_compress_level", 6)
        numbers = (
            (numerics["batch_size"], 1, 2**16),
            (level, 0, 9),
            (identity["num_inference_steps"], 1, 2**31),
            (identity["seed"], -(2**64), 2**64),
            *((row, 0, 2**31) for row in identity["user_index"].values()),
            *((int(user_id), 0, 2**63) for user_id in identity["user_index"]),
        )
        if not all(type(number) is int and low <= number <= high for number, low, high in numbers):
            raise TypeError(numbers)
        if not (isinstance(identity["noise_schedule"], dict) and all(isinstance(text, str) for text in weights)):
            raise TypeError(identity)
        for entry in self.history:
            if type(entry.numerics["batch_size"]) is not int or not all(
                isinstance(name, str) for name in (*(entry.joined or ()), *(entry.lost or ()))
            ):
                raise TypeError(entry)
            if sum(map(len, entry.id_ranges())) > len(identity["user_index"]):
                raise ValueError(entry.user_ids)

    @classmethod
    def read(cls, output_dir: Path) -> "RunRecord | None":
        """Read a folder's record; None where there is none, ValueError where it is damaged or was edited."""
        path = output_dir / RECORD_NAME
        try:
            with open_file(path) as file:
                if not file.read(_START_BYTES).lstrip().startswith(b"{"):
                    raise ValueError("no object")
            content = json.loads(read_file(path, MAX_BYTES))
            if not isinstance(content["history"], list):
                raise TypeError(content["history"])
            record = cls(
                identity=content["identity"],
                numerics=content["numerics"],
                history=[RunEntry(**entry) for entry in content["history"]],
                manifest_sha256=content.get("manifest_sha256"),
            )
            record.check()
            is_edited = content.get("run") != record.run
        except FileNotFoundError:
            return None
        except (*_ODD, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged; restore it, or remove it (the images say themselves what they are), or start again "
                "with --overwrite"
            ) from error
        if is_edited:
            raise ValueError(
                f"{path} was edited, its identity no longer has the hash that the images carry; restore it, or start "
                "again with --overwrite"
            )
        return record


def is_record(path: Path) -> bool:
    """Return whether a file is a job's record, whole or not."""
    with open_file(path) as file:
        start = file.read(_START_BYTES)
    has_our_fields = b'"identity"' in start and b'"numerics"' in start  # as somebody's editor may write it anew
    return start.startswith(_START) or _START.startswith(start) or not start.strip(b"\0") or has_our_fields


def now() -> str:
    """Return the time as the history notes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def changed_numerics(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the numerics in which two runs differ: (name, old value, new value).

    A name that only one run has is no difference: the other device has no such library, or an older version did not
    record it.
    """
    for name, before, after in differences({**NUMERICS_DEFAULTS, **old}, {**NUMERICS_DEFAULTS, **new}):
        if before is not None and after is not None:
            yield name, before, after
