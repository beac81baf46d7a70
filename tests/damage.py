"""A dataset's folder under attack: whether it is right, and ways to damage it."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from PIL import Image

from tests.jobs import tree

_FINAL_NAME = re.compile(r"generated_\d{3,}\.png")


class Failure(Exception):
    """The job did what it never may."""


def is_whole(png: bytes) -> bool:
    try:
        Image.open(io.BytesIO(png)).verify()
        Image.open(io.BytesIO(png)).load()
    except Exception:
        return False
    return png[-8:-4] == b"IEND"


class Dataset:
    """A folder that a job fills, and what an undisturbed run made of it."""

    def __init__(self, folder: Path, flags: Sequence[str], reference: Path) -> None:
        self.folder, self.reference = folder, reference
        self.flags = [*flags, "--output_dir", str(folder)]
        self.expected = {str(path.relative_to(reference)): path for path in reference.glob("user_*/*")}
        self.damaged: dict[str, int] = {}  # our own doing, with the time, until the job makes them again

    def images(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """What lies under a final name, but what was damaged and not yet made again."""
        folders = os.scandir(self.folder) if self.folder.is_dir() else ()
        for user in [entry for entry in folders if entry.name.startswith("user_")]:
            for entry in os.scandir(user):
                name = f"{user.name}/{entry.name}"
                is_damaged = name in self.damaged and entry.stat().st_mtime_ns == self.damaged[name]
                if _FINAL_NAME.fullmatch(entry.name) and not is_damaged:
                    yield name, entry

    def num_made(self) -> int:
        return sum(1 for _ in self.images())

    def record_time(self) -> int:
        path = self.folder / "run.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def wrong_images(self) -> dict[str, str]:
        """Each with what is wrong."""
        wrong = {}
        for name, entry in self.images():
            png = Path(entry).read_bytes()
            if name not in self.expected or png != self.expected[name].read_bytes():
                wrong[name] = "is whole, with other bytes" if is_whole(png) else f"is broken, {len(png)} bytes long"
        return wrong

    def check_images(self) -> None:
        if wrong := self.wrong_images():
            raise Failure("\n".join(f"{name} {what}" for name, what in sorted(wrong.items())))

    def check_done(self) -> None:
        """A job that came to its end: the undisturbed run's files, and their bytes."""
        self.damaged = {}
        names, wanted = ({path.name for path in folder.iterdir()} for folder in (self.folder, self.reference))
        if odd := (names ^ wanted) | {name for name in names if name.startswith(".") or ".part-" in name}:
            raise Failure(f"done, but these are only here or only in an undisturbed run: {sorted(odd)}")
        self.check_images()
        if differing := tree(self.folder).items() ^ tree(self.reference).items():
            raise Failure(f"done, but these differ: {sorted({name for name, _ in differing})}")
        if (state := json.loads((self.folder / "run.json").read_text())["history"][-1]["state"]) != "ended":
            raise Failure(f"done, but the history's last state is {state!r}")

    def damage(self, rng: Random) -> tuple[str, str]:
        """Damage something that is there: (kind, what was done)."""
        for kind in rng.sample(DAMAGES, len(DAMAGES)):
            with suppress(IndexError):
                what = kind(rng, self.folder, self.reference)
                self.damaged |= {name: (self.folder / name).stat().st_mtime_ns for name in self.wrong_images()}
                return kind.__name__, what
        raise AssertionError("there is always something")


# Each says what it did, and raises IndexError where there is nothing to do it to -------------------------------------


def some(rng: Random, folder: Path, pattern: str) -> Path:
    return rng.choice(sorted(folder.glob(pattern)))


def truncate_image(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "user_*/generated_*.png")
    os.truncate(path, rng.choice(range(path.stat().st_size)))
    return f"cut {path.name} to {path.stat().st_size} bytes"


def empty_image(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "user_*/generated_*.png")
    os.truncate(path, 0)
    return f"emptied {path.name}"


def delete_image(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "user_*/generated_*.png")
    path.unlink()
    return f"deleted {path.name}"


def delete_user(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "user_*")
    shutil.rmtree(path)
    return f"deleted {path.name}"


def tear_part(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "manifest.part-*.csv")
    last_line = path.read_bytes().splitlines(keepends=True)[-1]
    os.truncate(path, path.stat().st_size - rng.choice(range(1, len(last_line))))
    return f"tore the last line of {path.name}"


def append_garbage(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "manifest*.csv")
    path.write_bytes(path.read_bytes() + rng.randbytes(60) + rng.choice([b"", b"\n"]))
    return f"appended garbage to {path.name}"


def double_row(rng: Random, folder: Path, reference: Path) -> str:
    path = some(rng, folder, "manifest*.csv")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, rng.choice(lines[1:])]))
    return f"doubled a row of {path.name}"


def mangle_byte(rng: Random, folder: Path, reference: Path) -> str:
    """Put a byte that no row has in place of one; another digit would be an edit, which nobody looks for."""
    path = some(rng, folder, "manifest*.csv")
    data = bytearray(path.read_bytes())
    data[rng.choice(range(len(data)))] = rng.choice(b'?\0\xff\n,"')
    path.write_bytes(data)
    return f"mangled a byte of {path.name}"


def delete_manifest(rng: Random, folder: Path, reference: Path) -> str:
    some(rng, folder, "manifest.csv").unlink()
    return "deleted manifest.csv"


def fake_temporary(rng: Random, folder: Path, reference: Path) -> str:
    (some(rng, folder, "user_*") / ".generated_003.png.tmp-0123abcd").write_bytes(b"\x89PNG\r\n")
    return "left a temporary"


def stale_part(rng: Random, folder: Path, reference: Path) -> str:
    """Rows of images that are there, and of some that are not, the last one torn."""
    header, *rows = (reference / "manifest.csv").read_text().splitlines(keepends=True)
    path = folder / f"manifest.part-{rng.randrange(3, 200):05d}.csv"
    path.write_text(header + "".join(rng.sample(rows, 20))[:-9])
    return f"left {path.name}"


DAMAGES: list[Callable[[Random, Path, Path], str]] = [
    truncate_image,
    empty_image,
    delete_image,
    delete_user,
    tear_part,
    append_garbage,
    double_row,
    mangle_byte,
    delete_manifest,
    fake_temporary,
    stale_part,
]
