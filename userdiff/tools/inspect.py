"""Is it the right user, and is it any good: figures of a finished dataset that need no classifier."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from userdiff.dataset.layout import LOADED_SUFFIXES, is_system
from userdiff.dataset.png import open_image
from userdiff.dataset.scan import Track, listed_rows, read_all, untracked
from userdiff.tools.similarity import NEAR, Similarity, nearest, similarity

COPY_DIFFERENCE = 0.1  # the closest two of 4,400 handwritten digits have 0.11, noise of 4 levels makes 0.04
FLAT_CONTRAST = 2.0  # levels of 255
ODD_SPREADS = 5.0  # from the median of a user's images
ODD_IMAGES = 8  # fewer have no spread to speak of
COMPARED = 100_000  # images that are compared with each other; more are thinned out evenly
REAL = 100  # real images of each user that are compared with
LISTED = 5  # worst cases of a kind

SIDE = 16  # pixels of the small pictures that are compared
_LEVELS = 32  # of a small picture's values to one standard deviation
_LOOK = np.dtype(
    [
        ("row", "i8"),
        ("user", "i8"),
        ("pixels", "u8"),  # a hash of them: equal for equal pixels only
        ("brightness", "f8"),  # the mean of all values, in levels of 255
        ("contrast", "f8"),  # their standard deviation, of the channel that varies most
        ("small", "i1", SIDE * SIDE),  # the picture in grey, small, without its brightness and contrast
    ]
)
_STRIP = 256  # lines of an image
_REAL_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_ENDS_IN_ID = re.compile(r".*?0*([1-9]\d*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFigures:
    """The figures of one user."""

    user_id: int
    num_images: int
    """The number of images that could be read."""
    num_flat: int
    num_odd: int
    num_copies: int
    """Images with a near-copy among the user's others."""
    num_shared: int
    """Images with a near-copy among the images of other users."""
    brightness: tuple[float, float]
    """Mean and standard deviation over the user's images, in levels of 255."""
    contrast: tuple[float, float]
    generated: Similarity | None
    """To the dataset's own images; None where there is nothing to compare with."""
    real: Similarity | None
    """To real images, where these were given."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images that are alike."""

    difference: float
    """Root mean square over the small pictures, in standard deviations of their values: 0.1 is a correlation of 0.995."""
    has_same_pixels: bool
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Oddity:
    """An image and the figure it stands out by."""

    value: float
    name: str
    what: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The figures of a dataset."""

    num_images: int
    """The number of images that could be read."""
    num_compared: int
    """The number of them that were compared with each other."""
    damaged: list[str]
    users: list[UserFigures]
    closest_within: list[Pair]
    closest_across: list[Pair]
    flattest: list[Oddity]
    oddest: list[Oddity]


def inspect(output_dir: Path, real_dir: Path | None = None, track: Track = untracked) -> Report:
    """Read the images of a manifest and compare them; raises ValueError where there are none.

    real_dir: real images to compare with, in folders whose names end in a user's id.
    """
    rows = listed_rows(output_dir)
    found_real = real_files(real_dir) if real_dir else []
    names = [row.file_name for row in rows]
    users = [row.user_id for row in rows]
    looks = _look_at_all([output_dir / name for name in names], users, track)
    if not len(looks):
        raise ValueError(f"{output_dir}: none of {len(rows)} images can be read, the first is {names[0]}")
    real = _look_at_all([path for _, path in found_real], [user_id for user_id, _ in found_real], track, _REAL_FORMATS)
    if real_dir and not len(real):
        raise ValueError(f"--real: none of the {len(found_real)} images in {real_dir} can be read")
    full = looks[looks["contrast"] >= FLAT_CONTRAST]
    compared = full[_spread(len(full), COMPARED)]
    near = _near(compared, track)
    to_real = similarity(compared["user"], _near(compared, track, real), real["user"]) if real_dir else {}
    oddness = _oddness(looks)
    return Report(
        num_images=len(looks),
        num_compared=len(compared),
        damaged=[names[i] for i in np.setdiff1d(np.arange(len(rows)), looks["row"]).tolist()],
        users=_user_figures(looks, compared, near, oddness, to_real),
        closest_within=_pairs(compared, near, "own", names),
        closest_across=_pairs(compared, near, "other", names),
        flattest=[
            Oddity(float(looks["contrast"][i]), names[looks["row"][i]])
            for i in np.argsort(looks["contrast"], kind="stable")[:LISTED]
        ],
        oddest=_oddest(looks, oddness, names),
    )


# Reading -------------------------------------------------------------------------------------------------------------


def real_files(real_dir: Path) -> list[tuple[int, Path]]:
    """Find (user id, file) of real images, sorted, REAL of each user at most."""
    if not real_dir.is_dir():
        raise ValueError(f"--real: {real_dir} is not a folder")
    folders: dict[int, Path] = {}
    for folder in sorted(real_dir.iterdir()):
        match = _ENDS_IN_ID.fullmatch(folder.name)
        if match and folder.is_dir():
            user_id = int(match[1])
            if user_id in folders:
                raise ValueError(f"--real: {folders[user_id].name} and {folder.name} both end in {user_id}")
            folders[user_id] = folder
    files = []
    for user_id, folder in sorted(folders.items()):
        found = sorted(
            path for path in folder.iterdir() if path.suffix.lower() in LOADED_SUFFIXES and not is_system(path.name)
        )
        files += [(user_id, found[i]) for i in _spread(len(found), REAL)]
    if not files:
        raise ValueError(f"--real: {real_dir} holds no images in folders whose names end in a user's id, as user_07")
    return files


def _look_at_all(
    paths: Sequence[Path], users: Sequence[int], track: Track, formats: tuple[str, ...] = ("PNG",)
) -> NDArray[np.void]:
    """Read images with several threads, keeping of each what _LOOK says; those that cannot be read are left out."""
    found = zip(users, track(read_all(partial(_look_at, formats=formats), paths), len(paths)), strict=True)
    return np.fromiter(((i, user_id, *look) for i, (user_id, look) in enumerate(found) if look), _LOOK)


def _look_at(path: Path, formats: tuple[str, ...] = ("PNG",)) -> tuple[Any, ...] | None:
    try:
        with open_image(path, formats) as opened:
            picture = opened if opened.mode in {"L", "RGB", "RGBA"} else opened.convert("RGB")
            small = _small(picture)
            digest = hashlib.blake2b(digest_size=8)
            for top in range(0, picture.height, _STRIP):  # of a large image, nothing is held twice
                strip = picture.crop((0, top, picture.width, min(top + _STRIP, picture.height)))
                digest.update(strip.tobytes())
            counts = np.array(picture.histogram(), float).reshape(-1, 256)  # [channels, levels]
    except Exception:  # Pillow has many words for a broken image
        return None
    levels = np.arange(256.0)
    means = counts @ levels / counts.sum(axis=1)
    deviations = np.sqrt(counts @ levels**2 / counts.sum(axis=1) - means**2)
    return int.from_bytes(digest.digest(), "big"), means.mean(), deviations.max(), small


def _small(picture: Image.Image) -> NDArray[np.int8]:
    """Make the small picture: 0 is its mean, _LEVELS a standard deviation of its values."""
    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(grey).astype(float).ravel()
    scaled = (values - values.mean()) / max(values.std(), 1e-9) * _LEVELS
    return np.clip(np.round(scaled), -127, 127).astype(np.int8)


def _spread(number: int, limit: int) -> list[int]:
    """Choose `limit` of so many indices, evenly; all, where there are no more."""
    return np.linspace(0, number - 1, min(number, limit)).round().astype(int).tolist()


# Figures -------------------------------------------------------------------------------------------------------------


def _near(looks: NDArray[np.void], track: Track, others: NDArray[np.void] | None = None) -> NDArray[np.void]:
    """Find the nearest small pictures, as NEAR says, among the same or other images."""
    vectors = () if others is None else (others["small"], others["user"])
    found = nearest(looks["small"], looks["user"], *vectors)
    return np.fromiter(track(found, len(looks)), NEAR, count=len(looks))


def _user_figures(
    looks: NDArray[np.void],
    compared: NDArray[np.void],
    near: NDArray[np.void],
    oddness: NDArray[np.float64],
    to_real: Mapping[int, Similarity],
) -> list[UserFigures]:
    generated = similarity(compared["user"], near)
    figures = []
    for user_id in np.unique(looks["user"]).tolist():
        is_user = looks["user"] == user_id
        of_user, of_user_near = looks[is_user], near[compared["user"] == user_id]
        brightness, contrast = of_user["brightness"], of_user["contrast"]
        figures.append(
            UserFigures(
                user_id=user_id,
                num_images=len(of_user),
                num_flat=int((contrast < FLAT_CONTRAST).sum()),
                num_odd=int((oddness[is_user].max(axis=1) > ODD_SPREADS).sum()),
                num_copies=int((_differences(of_user_near, "own") <= COPY_DIFFERENCE).sum()),
                num_shared=int((_differences(of_user_near, "other") <= COPY_DIFFERENCE).sum()),
                brightness=(float(brightness.mean()), float(brightness.std())),
                contrast=(float(contrast.mean()), float(contrast.std())),
                generated=generated.get(user_id),
                real=to_real.get(user_id),
            )
        )
    return figures


def _differences(near: NDArray[np.void], which: str) -> NDArray[np.float64]:
    """Return how much the nearest differ, in Pair's unit; infinity where there is none. `which`: `own` or `other`."""
    return np.sqrt(near[f"{which}_distance"]) / (SIDE * _LEVELS)


def _pairs(looks: NDArray[np.void], near: NDArray[np.void], which: str, names: Sequence[str]) -> list[Pair]:
    """List the closest pairs, each once; `which`: `own` or `other`, as in NEAR."""
    differences = _differences(near, which)
    pairs: dict[tuple[int, int], Pair] = {}
    for i in np.argsort(differences, kind="stable").tolist():
        if len(pairs) == LISTED or differences[i] == np.inf:
            break
        first, second = sorted((i, int(near[which][i])))
        has_same_pixels = bool(looks["pixels"][first] == looks["pixels"][second])
        both = (names[looks["row"][first]], names[looks["row"][second]])
        pairs.setdefault((first, second), Pair(float(differences[i]), has_same_pixels, both))
    return list(pairs.values())


def _oddness(looks: NDArray[np.void]) -> NDArray[np.float64]:
    """Return how far brightness and contrast are from their user's median: [n, 2], in robust standard deviations.

    A spread below one level counts as one: among images that are all alike, the slightest difference is not odd.
    """
    values = np.stack([looks["brightness"], looks["contrast"]], axis=1)
    oddness = np.zeros_like(values)
    for user_id in np.unique(looks["user"]):
        is_user = looks["user"] == user_id
        if is_user.sum() >= ODD_IMAGES:
            away = np.abs(values[is_user] - np.median(values[is_user], axis=0))
            oddness[is_user] = away / np.maximum(1.4826 * np.median(away, axis=0), 1)
    return oddness


def _oddest(looks: NDArray[np.void], oddness: NDArray[np.float64], names: Sequence[str]) -> list[Oddity]:
    """List what is odd, oddest first, with what it is odd in."""
    most = oddness.max(axis=1)
    listed = []
    for i in np.argsort(-most, kind="stable")[:LISTED].tolist():
        if most[i] > ODD_SPREADS:
            what = ("brightness", "contrast")[int(oddness[i].argmax())]
            usual = float(np.median(looks[what][looks["user"] == looks["user"][i]]))
            described = f"{what} {looks[what][i]:.0f}, its user's median {usual:.0f}"
            listed.append(Oddity(float(most[i]), names[looks["row"][i]], described))
    return listed
