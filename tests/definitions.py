"""The contract's definitions, written plainly: nothing here calls the code under test."""

import csv
import hashlib
import io
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

HEADER = "file_name,user_id,image_index,seed,num_inference_steps,conditioning,width,height,num_bytes,sha256"
RUN = "5d" * 32
IDENTITY = {
    "vae": {"weights": "a1" * 32, "config": {"scaling_factor": 0.7}},
    "unet": {"weights": "b2" * 32, "config": {}},
    "condition_encoder": "c3" * 32,
    "noise_schedule": {"beta_schedule": "scaled_linear", "clip_sample": False},
    "user_index": {str(user_id): user_id - 1 for user_id in range(1, 10)},
    "seed": 42,
    "num_inference_steps": 20,
}
NUMERICS = {"batch_size": 4, "device": "x86_64"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seed_of(base_seed: int, user_id: int, image_index: int) -> int:
    digest = hashlib.blake2b(f"{base_seed}:{user_id}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") + image_index) % 2**32


def slot_of(user_id: int, image_index: int, batch_size: int) -> int:
    return ((((user_id * 2654435769) % 2**32) * batch_size >> 32) + image_index) % batch_size


def shard_of(user_id: int, image_index: int, batch_size: int, num_shards: int) -> int:
    """Return the number of the shard, from 1, that an image is in."""
    return 1 + (image_index + image_index // math.lcm(batch_size, num_shards) + user_id) % num_shards


def name_of(user_id: int, image_index: int) -> str:
    return f"user_{user_id:02d}/generated_{image_index:03d}.png"


def chunks_of(
    user_id: int, image_index: int, *, run: str = RUN, base_seed: int = 42, steps: int = 20
) -> dict[str, str]:
    """Return the text chunks of an image."""
    return {
        "user_id": str(user_id),
        "image_index": str(image_index),
        "seed": str(seed_of(base_seed, user_id, image_index)),
        "num_inference_steps": str(steps),
        "conditioning": "trained",
        "userdiff_run": run,
    }


def png_of(text: dict[str, str], size: tuple[int, int] = (3, 2), colour: str = "navy", mode: str = "RGB") -> bytes:
    """Return a PNG of one colour with text chunks."""
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        chunks.add_text(key, value)
    Image.new(mode, size, colour).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def png_of_pixels(pixels: np.ndarray) -> bytes:
    """Return a PNG of [height, width] or [height, width, channels] uint8, without a word."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def fields_of(user_id: int, image_index: int, data: bytes, size: tuple[int, int] = (3, 2)) -> tuple:
    """Return the row of an image whose file holds `data`, in the order of the columns."""
    seed = seed_of(42, user_id, image_index)
    name = name_of(user_id, image_index)
    return (name, user_id, image_index, seed, 20, "trained", *size, len(data), sha256(data))


def line_of(row: tuple) -> str:
    return ",".join(str(value) for value in row) + "\n"


def csv_of(*rows: tuple) -> str:
    """Return the content of a manifest or a part."""
    return HEADER + "\n" + "".join(line_of(row) for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_of(identity: Any) -> str:
    """Return the hash of an identity."""
    return sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode())


def image_of(user_id: int, image_index: int, colour: str = "navy", *, run: str = run_of(IDENTITY)) -> bytes:
    """Return the file of an image that explains itself."""
    return png_of(chunks_of(user_id, image_index, run=run), colour=colour)


def entry_of(user_ids: str = "1-2", number: int = 3, **changes: Any) -> dict[str, Any]:
    """Return what `run.json` says of a run that ended."""
    times = {"started": "2026-11-23T11:06:00+00:00", "ended": "2026-11-23T11:07:30+00:00"}
    asked = {"num_processes": 2, "user_ids": user_ids, "num_images_per_user": number, "numerics": NUMERICS}
    return {**times, "state": "ended", "cause": None, **asked, "published": 1, "failed": [], **changes}


def record_of(*history: dict[str, Any], identity: Any = IDENTITY, **changes: Any) -> dict[str, Any]:
    """Return the content of `run.json`."""
    begun = {"run": run_of(identity), "identity": identity, "numerics": NUMERICS}
    return {**begun, "history": list(history), "manifest_sha256": None, **changes}


Contents = Mapping[tuple[int, int], bytes]
"""The files of images, by user and image."""


def images_of(items: Iterable[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    return {item: image_of(*item) for item in items}


def manifest_of(contents: Contents) -> str:
    sizes = {item: struct.unpack(">II", data[16:24]) for item, data in contents.items()}
    return csv_of(*(fields_of(*item, data, sizes[item]) for item, data in sorted(contents.items())))


def write_dataset(folder: Path, contents: Contents, record: dict[str, Any] | None = None) -> Path:
    """Write images and their manifest, and `run.json` where there is a record, as a job leaves them that ended."""
    folder.mkdir(parents=True, exist_ok=True)
    for item, data in contents.items():
        path = folder / name_of(*item)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():  # a job makes no image twice
            path.write_bytes(data)
    manifest = manifest_of(contents)
    (folder / "manifest.csv").write_text(manifest)
    if record:
        (folder / "run.json").write_text(json.dumps({**record, "manifest_sha256": sha256(manifest.encode())}))
    return folder


def interrupt(folder: Path, rows_left: int | None = None, **entry: Any) -> None:
    """Make of a finished dataset what a killed job leaves: rows in a part, no other images, and no end noted."""
    header, *lines = (folder / "manifest.csv").read_text().splitlines(keepends=True)
    (folder / "manifest.csv").write_text(header)
    (folder / "manifest.part-00000.csv").write_text("".join([header, *lines[:rows_left]]))
    for line in lines[len(lines) if rows_left is None else rows_left :]:
        (folder / line.partition(",")[0]).unlink()
    change_entry(folder, **{"state": "running", "ended": None, **entry})


def change_entry(folder: Path, **changes: Any) -> None:
    """Change what `run.json` says of the last run."""
    record = json.loads((folder / "run.json").read_text())
    record["history"][-1] |= changes
    record["manifest_sha256"] = sha256((folder / "manifest.csv").read_bytes())
    (folder / "run.json").write_text(json.dumps(record))
