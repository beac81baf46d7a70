"""`run.json`: the identity that decides the pixels, the numerics they were computed with, and the history of runs."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import NoneType
from typing import Any

from userdiff.dataset.atomic import publish
from userdiff.dataset.layout import RECORD_NAME
from userdiff.identity import differences, identity_hash
from userdiff.seeds import Item
from userdiff.shutdown import Stopped
from userdiff.text import id_range

NUMERICS_DEFAULTS = {"png_compress_level": 6}
"""Values for records from before these were noted."""
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
    num_processes: int
    user_ids: str
    """The users that were asked for, as `--user_ids` has them: `1-3 5`."""
    num_images_per_user: int
    numerics: dict[str, Any]
    published: int = 0
    """Images that this run made."""
    failed: list[Item] = field(default_factory=list)
    """Images that were asked for and are not there."""

    def __post_init__(self) -> None:
        """Raise one of _ODD for values that no run writes."""
        kinds: list[tuple[Any, list[object]]] = [
            (str, [self.started, self.state, self.user_ids]),
            ((str, NoneType), [self.ended, self.cause, self.launch]),
            ((list, NoneType), [self.joined]),
            (dict, [self.numerics]),
            (list, [self.failed]),
        ]
        if not all(isinstance(value, kind) for kind, values in kinds for value in values):
            raise TypeError(self)
        for number in (self.num_processes, self.num_images_per_user, self.published):
            if type(number) is not int or number < 0:
                raise TypeError(self)
        self.failed = [(int(user_id), int(image_index)) for user_id, image_index in self.failed]
        self.wanted()
        self.seconds(datetime.now(timezone.utc))

    def wanted(self) -> dict[int, int]:
        """Return what was asked for: user id -> images."""
        ids = (user_id for text in self.user_ids.split() for user_id in id_range(text))
        return dict.fromkeys(ids, self.num_images_per_user)

    def seconds(self, now: datetime | None = None) -> float | None:
        """Return how long the run took, until `now` if it has not ended; None where that cannot be told.

        Neither can it where the clock was set back meanwhile.
        """
        ended = datetime.fromisoformat(self.ended) if self.ended else now
        seconds = (ended - datetime.fromisoformat(self.started)).total_seconds() if ended else -1.0
        return seconds if seconds >= 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return the entry as `run.json` has it."""
        left_out = [("joined", None), ("launch", None)]
        return {name: value for name, value in asdict(self).items() if (name, value) not in left_out}


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
        entry.state, entry.ended = "ended", now()
        if isinstance(error, Stopped):
            entry.state = f"stopped by signal {error.signal_number}"
        elif error is not None:
            entry.state, entry.cause = "failed", str(error) or type(error).__name__
        self.publish(output_dir)

    @classmethod
    def read(cls, output_dir: Path) -> "RunRecord | None":
        """Read a folder's record; None where there is none, ValueError where it is damaged or was edited."""
        path = output_dir / RECORD_NAME
        try:
            content = json.loads(path.read_bytes())
            record = cls(
                identity=content["identity"],
                numerics=content["numerics"],
                history=[RunEntry(**entry) for entry in content["history"]],
                manifest_sha256=content.get("manifest_sha256"),
            )
            kinds = [type(content["history"]), type(record.identity), type(record.numerics["batch_size"])]
            if kinds != [list, dict, int] or not 1 <= record.numerics["batch_size"] <= 2**16:
                raise TypeError(kinds)
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
