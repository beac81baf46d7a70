"""A dataset in the features of the user's own network: how various each user's images are, and how near real ones.

Precision and recall are those of Kynkäänniemi et al. 2019 (https://arxiv.org/abs/1904.06991), density and coverage those of
Naeem et al. 2020 (https://arxiv.org/abs/2002.09797), KID that of Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401),
each of one user's images and their real ones. Functions of tensors, in float64, by all pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from userdiff.config import errors_of
from userdiff.dataset.scan import Track, untracked
from userdiff.judge.network import load_network
from userdiff.judge.pictures import Batch, batch_size_of, dataset_batches, file_batches
from userdiff.judge.scores import call_function, function_of, run_network
from userdiff.text import listed

COMPARED = 4000  # images of a user; more are thinned out evenly
NEIGHBOURS_PRECISION = 3  # as in the paper's experiments, for precision and recall
NEIGHBOURS_DENSITY = 5  # likewise, for density and coverage
LISTED = 5  # closest pairs

Look = Callable[[Batch], Tensor]
"""Returns the features of a batch: [batch, d]."""


class Features(NamedTuple):
    """Features of one user's images."""

    names: list[str]
    vectors: Tensor
    """[images, d] float64"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFigures:
    """The figures of one user; those that take real images are None where there are too few."""

    user_id: int
    num_images: int
    num_real: int
    diversity: float | None
    """Mean cosine distance of two of the user's images."""
    real_diversity: float | None
    precision: float | None
    """Share of the images within the reach of a real one."""
    recall: float | None
    """Share of the real images within the reach of a generated one."""
    density: float | None
    """Mean number of real images within whose reach an image is, over that of their neighbours; may exceed 1."""
    coverage: float | None
    """Share of the real images with an image within their reach."""
    kid: float | None
    """Squared maximum mean discrepancy to the real images, unbiased: 0 for the same distribution, or a little below."""
    nearest_real: float | None
    """Of the image closest to a real one: how far, where 1 is the median way from a real image to the next; 0 is a copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureReport:
    """The figures of a dataset in the features of a network."""

    dimensions: int
    unread: list[str]
    """Names of images, real ones included, that cannot be read."""
    users: list[FeatureFigures]
    closest_to_real: list[tuple[float, str, str]]
    """(how far, as `nearest_real` has it; image; real image) of the closest pairs, one an image, ascending."""


def look_at_features(
    output_dir: Path, source: str, real_files: Sequence[tuple[int, Path]] = (), track: Track = untracked
) -> FeatureReport:
    """Load a network and compare a dataset's images, and real ones (user id, path), in its features.

    source: as `load_judge` takes it, giving [batch, d]. Raises UsageError naming --features.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = batch_size_of(output_dir, device)
    unread: list[str] = []
    with errors_of("--features"):
        look = _loaded(source, device)
        generated, shape = _collect(dataset_batches(output_dir, batch_size, unread, track), look)
        assert shape is not None  # there are images, or this would have raised
        real, _ = _collect(file_batches(real_files, shape, batch_size, unread, track), look)
    users, pairs = [], []
    for user_id, features in sorted(generated.items()):
        figures, closest = compare(user_id, features, real.get(user_id))
        users.append(figures)
        pairs += closest
    dimensions = next(iter(generated.values())).vectors.shape[1]
    return FeatureReport(dimensions=dimensions, unread=unread, users=users, closest_to_real=sorted(pairs)[:LISTED])


def _loaded(source: str, device: torch.device) -> Look:
    function = function_of(source)
    if function is not None:
        return lambda batch: _checked(call_function(function, source, batch.to(device), batch.user_ids), batch, source)
    network = load_network(Path(source), device)
    return lambda batch: _checked(run_network(network, batch.to(device), source), batch, source)


def _checked(found: Any, batch: Batch, source: str) -> Tensor:
    vectors = torch.as_tensor(found).double().cpu()
    if vectors.dim() != 2 or len(vectors) != len(batch.slots):
        raise ValueError(
            f"{source} returns {list(vectors.shape)}, needed: [{len(batch.slots)}, d], features of each image"
        )
    if not vectors.isfinite().all():
        raise ValueError(f"{source} returns features that are not finite")
    return vectors


def _collect(batches: Iterable[Batch], look: Look) -> tuple[dict[int, Features], tuple[int, int, int] | None]:
    """Return the features of all images, user id -> features, and the shape of an image."""
    found: dict[int, tuple[list[str], list[Tensor]]] = {}
    shape = None
    for batch in batches:
        vectors = look(batch)
        for slot, picture in batch.present.items():
            height, width, channels = picture.pixels.shape
            shape = height, width, channels
            names, of_user = found.setdefault(picture.user_id, ([], []))
            names.append(picture.name)
            of_user.append(vectors[slot])
    return {user_id: _thinned(names, torch.stack(vectors)) for user_id, (names, vectors) in found.items()}, shape


def _thinned(names: list[str], vectors: Tensor) -> Features:
    chosen = torch.linspace(0, len(names) - 1, min(len(names), COMPARED)).round().long().tolist()
    return Features([names[at] for at in chosen], vectors[chosen])


# Figures -------------------------------------------------------------------------------------------------------------


def compare(
    user_id: int, generated: Features, real: Features | None
) -> tuple[FeatureFigures, list[tuple[float, str, str]]]:
    """Return the figures of a user, and which of their images are closest to which real ones."""
    vectors = generated.vectors
    has_real = real is not None and min(len(real.names), len(generated.names)) > NEIGHBOURS_DENSITY
    prdc, discrepancy, pairs = dict.fromkeys(("precision", "recall", "density", "coverage")), None, []
    if real is not None and has_real:
        prdc = precision_recall_density_coverage(real.vectors, vectors)
        discrepancy = kid(real.vectors, vectors)
        way = nearest(real.vectors, real.vectors, 1, is_same=True)[0].median()
        distances, at = nearest(vectors, real.vectors, 1)
        ways = (distances / way).tolist() if way > 0 else distances.tolist()
        pairs = sorted(zip(ways, generated.names, (real.names[i] for i in at.tolist()), strict=True))[:LISTED]
    return FeatureFigures(
        user_id=user_id,
        num_images=len(generated.names),
        num_real=len(real.names) if real else 0,
        diversity=diversity(vectors),
        real_diversity=diversity(real.vectors) if real else None,
        **prdc,
        kid=discrepancy,
        nearest_real=pairs[0][0] if pairs else None,
    ), pairs


def diversity(vectors: Tensor) -> float | None:
    """Return the mean cosine distance of two of the vectors [n, d]; None for fewer than two."""
    number = len(vectors)
    if number < 2:
        return None
    units = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    of_pairs = (units.sum(dim=0).square().sum() - units.square().sum()) / (number * (number - 1))
    return 1 - of_pairs.item()


def nearest(queries: Tensor, others: Tensor, k: int, *, is_same: bool = False) -> tuple[Tensor, Tensor]:
    """Return how far the k-th nearest of `others` [m, d] is from each query [n, d], and which one it is: [n] each.

    is_same: the queries are the others, and none is its own neighbour.
    """
    found = torch.cdist(queries, others, compute_mode="donot_use_mm_for_euclid_dist")
    if is_same:
        found.fill_diagonal_(torch.inf)
    distances, at = found.kthvalue(k, dim=1)
    return distances, at


def precision_recall_density_coverage(real: Tensor, generated: Tensor) -> dict[str, float | None]:
    """Return the four figures of generated vectors [n, d] against real ones [m, d].

    The reach of a vector is the distance to its k-th nearest neighbour among its own kind.
    """
    between = torch.cdist(generated, real, compute_mode="donot_use_mm_for_euclid_dist")  # [n, m]
    reach = {
        (name, k): nearest(vectors, vectors, k, is_same=True)[0]
        for name, vectors in (("real", real), ("generated", generated))
        for k in (NEIGHBOURS_PRECISION, NEIGHBOURS_DENSITY)
    }
    near_real = between <= reach["real", NEIGHBOURS_DENSITY]
    return {
        "precision": _share((between <= reach["real", NEIGHBOURS_PRECISION]).any(dim=1)),
        "recall": _share((between <= reach["generated", NEIGHBOURS_PRECISION].unsqueeze(1)).any(dim=0)),
        "density": near_real.sum().item() / (NEIGHBOURS_DENSITY * len(generated)),
        "coverage": _share(near_real.any(dim=0)),
    }


def _share(which: Tensor) -> float:
    return which.double().mean().item()


def kid(real: Tensor, generated: Tensor) -> float:
    """Return the unbiased squared MMD of two sets of vectors, [m, d] and [n, d], with the kernel (x.y / d + 1)^3."""

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1) ** 3

    def within(vectors: Tensor) -> float:
        values, number = kernel(vectors, vectors), len(vectors)
        return ((values.sum() - values.trace()) / (number * (number - 1))).item()

    return within(real) + within(generated) - 2 * kernel(real, generated).mean().item()


# As text -------------------------------------------------------------------------------------------------------------

_NOTES = """\
diversity: mean cosine distance of two images of the user; in brackets, of two real ones. Far below: little variety.
precision, density: do the images look real? Share within the reach of a real image; and by how many at once (1 = as real).
recall, coverage: are all real looks there? Share of the real images within reach of a generated one; and with one in reach.
KID: distance of the two distributions, 0 = the same, in a unit of these features. Steady from hundreds of images a user on.
nearest real: of the image closest to a real one: how far, 1 = as real images are from each other, 0 = a copy."""


def feature_lines(source: str, report: FeatureReport) -> Iterator[str]:
    """Yield the lines to print of a report on the features that `source` gives."""
    has_real = any(user.num_real for user in report.users)
    yield ""
    yield f"In the {report.dimensions} features of {source}"
    if report.unread:
        yield f"{len(report.unread)} images cannot be read: {listed(report.unread)}"
    head = f"{'user':>6} {'images':>7} {'diversity':>9}"
    columns = ("precision", "recall", "density", "coverage", "KID", "nearest real")
    yield head + (f" {'(real)':>8} {'real':>6} " + " ".join(f"{name:>9}" for name in columns) if has_real else "")
    for user in report.users:
        line = f"{user.user_id:>6} {user.num_images:>7} {_figure(user.diversity):>9}"
        if has_real:
            values = [_figure(value) for value in (user.precision, user.recall, user.density, user.coverage)]
            values += ["-" if user.kid is None else f"{user.kid:.3g}", _figure(user.nearest_real)]
            line += f" {f'({_figure(user.real_diversity)})':>8} {user.num_real:>6} "
            line += " ".join(f"{value:>{max(9, len(name))}}" for name, value in zip(columns, values, strict=True))
        yield line
    if report.closest_to_real:
        yield ""
        yield "Closest to a real image (0 is a copy, 1 as far as real images are from each other)"
        for way, name, real in report.closest_to_real:
            yield f"{way:8.2f}  {name}  {real}"
    yield ""
    for note in _NOTES.splitlines():
        if has_real or note.startswith("diversity"):
            yield f"  {note}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
