"""The contract's definitions, written plainly: nothing here calls the code under test."""

import csv
import hashlib
import io
from pathlib import Path

from PIL import Image, PngImagePlugin

HEADER = "file_name,user_id,image_index,seed,num_inference_steps,conditioning,width,height,num_bytes,sha256"
RUN = "5d" * 32


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seed_of(base_seed: int, user_id: int, image_index: int) -> int:
    digest = hashlib.blake2b(f"{base_seed}:{user_id}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "big") + image_index) % 2**32


def slot_of(user_id: int, image_index: int, batch_size: int) -> int:
    return ((((user_id * 2654435769) % 2**32) * batch_size >> 32) + image_index) % batch_size


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
