"""What `userdiff judge` says: whose images are taken for whose, and how many would pass at which thresholds."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userdiff.conditions import Condition
from userdiff.judge.ratings import Ratings
from userdiff.judge.scores import CONFIDENCE, MARGIN, NO_CLASS
from userdiff.text import count, listed

QUANTILES = (0.05, 0.25, 0.5, 0.75)
LADDERS = {  # thresholds that are told of, for the scores of a classifier
    CONFIDENCE: (0.5, 0.8, 0.9, 0.95, 0.99, 0.999),
    MARGIN: (0.0, 0.5, 0.8, 0.9, 0.95, 0.99),
}
_OTHER_LADDER = (0.1, 0.25, 0.5, 0.75, 0.9)  # for another score: quantiles of all images
_MAX_SHOWN = 100  # users in a table
_MAX_CLASSES = 24  # of a matrix that fits a terminal


def report(ratings: Ratings, classes: Mapping[int, int], num_images: int) -> dict[str, Any]:
    """Return all figures as JSON takes them.

    num_images: how many accepted images of each user are wanted. `candidates` is how many have to be made for that, on
    average, at the rate found: None where no image passes.
    """
    users = []
    for user_id in np.unique(ratings.user_ids).tolist():
        is_user = ratings.user_ids == user_id
        table = ratings.table[is_user]
        predicted = None if ratings.predicted is None else ratings.predicted[is_user]
        users.append(
            {
                "user_id": user_id,
                "num_images": len(table),
                "class": classes.get(user_id) if predicted is not None else None,
                "right": None if predicted is None else float((predicted == classes[user_id]).mean()),
                "predicted": None if predicted is None else _counts(predicted),
                "num_not_finite": int((~np.isfinite(table)).any(axis=1).sum()),
                "quantiles": {
                    name: {f"{q:g}": _finite(_quantile(table[:, at], q)) for q in QUANTILES}
                    for at, name in enumerate(ratings.names)
                },
                "accepted": _passing(ratings.names, table, ratings.conditions, num_images),
                "thresholds": {
                    name: [
                        {
                            "at_least": bound,
                            **_passing(ratings.names, table, [Condition(name, ">=", bound)], num_images),
                        }
                        for bound in _ladder(ratings, name)
                    ]
                    for name in ratings.names
                },
            }
        )
    return {
        "num_images": len(ratings.table),
        "unread": ratings.unread,
        "scores": list(ratings.names),
        "accept": [str(condition) for condition in ratings.conditions],
        "num_images_per_user": num_images,
        "users": users,
    }


def _counts(values: NDArray[np.int64]) -> dict[str, int]:
    found, counts = np.unique(values[values != NO_CLASS], return_counts=True)
    return {str(value): int(number) for value, number in zip(found, counts, strict=True)}


def _quantile(values: NDArray[np.float64], q: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, q)) if len(known) else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ladder(ratings: Ratings, name: str) -> Sequence[float]:
    if name in LADDERS and ratings.predicted is not None:
        return LADDERS[name]
    values = ratings.table[:, ratings.names.index(name)]
    return sorted({float(f"{_quantile(values, q):.3g}") for q in _OTHER_LADDER})


def _passing(
    names: Sequence[str], table: NDArray[np.float64], conditions: Sequence[Condition], num_images: int
) -> dict[str, Any]:
    passes = [all(c.holds(dict(zip(names, row, strict=True))) for c in conditions) for row in table.tolist()]
    rate = sum(passes) / len(passes)
    return {"rate": rate, "candidates": math.ceil(num_images / rate) if rate else None}


# As text -------------------------------------------------------------------------------------------------------------


def report_lines(name: str, source: str, figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines to print for a dataset called `name`, judged by `source`."""
    users = figures["users"]
    yield f"{name}: {count(figures['num_images'], 'image')} of {count(len(users), 'user')}, judged by {source}"
    if figures["unread"]:
        yield f"{len(figures['unread'])} more cannot be read: {listed(figures['unread'])}"
    if not_finite := sum(user["num_not_finite"] for user in users):
        yield f"{not_finite} have scores that are not finite; a job rejects such"
    shown = sorted(users, key=lambda user: user["accepted"]["rate"])[:_MAX_SHOWN]
    shown.sort(key=lambda user: user["user_id"])
    yield ""
    yield from _table(figures, shown)
    for score in figures["scores"]:
        yield ""
        yield from _thresholds(figures, shown, score)
    if users[0]["predicted"] is not None:
        yield ""
        yield from _confusion(users)


def _table(figures: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    scores, wanted = figures["scores"], figures["num_images_per_user"]
    quantiles = " ".join(f"{f'{q:.0%}':>8}" for q in QUANTILES)
    yield f"Accepted: {' and '.join(figures['accept'])}. Candidates: how many to make, on average, for {wanted} accepted"
    yield f"{'':31}" + "".join(f"  {f'{score}, quantiles':^{len(quantiles)}}" for score in scores)
    yield (
        f"{'user':>6} {'images':>7} {'right':>6} {'accepted':>9}"
        + f"  {quantiles}" * len(scores)
        + f" {'candidates':>11}"
    )
    for user in shown:
        right = "-" if user["right"] is None else f"{user['right']:.0%}"
        line = f"{user['user_id']:>6} {user['num_images']:>7} {right:>6} {user['accepted']['rate']:>9.0%}"
        for score in scores:
            values = user["quantiles"][score].values()
            line += "  " + " ".join(f"{'-' if value is None else f'{value:.3g}':>8}" for value in values)
        yield f"{line} {_candidates(user['accepted']):>11}"
    if len(figures["users"]) > len(shown):
        yield f"and {len(figures['users']) - len(shown)} more users, of whom no fewer are accepted"
    all_images = sum(user["num_images"] for user in figures["users"])
    mean = sum(user["accepted"]["rate"] * user["num_images"] for user in figures["users"]) / all_images
    num_right = [user["right"] * user["num_images"] for user in figures["users"] if user["right"] is not None]
    is_right = f"{sum(num_right) / all_images:.0%}" if num_right else "-"
    yield f"{'all':>6} {all_images:>7} {is_right:>6} {mean:>9.0%}"


def _thresholds(figures: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], score: str) -> Iterator[str]:
    """Yield the share of each user's images that reach each bound, and what the bounds cost."""
    bounds = [step["at_least"] for step in shown[0]["thresholds"][score]]
    yield f"Share of a user's images with {score} of at least"
    yield f"{'user':>6}" + "".join(f" {bound:>9g}" for bound in bounds)
    for user in shown:
        yield f"{user['user_id']:>6}" + "".join(f" {step['rate']:>9.1%}" for step in user["thresholds"][score])
    of_all = [[user["thresholds"][score][at] for user in figures["users"]] for at in range(len(bounds))]
    totals = [
        None if any(s["candidates"] is None for s in steps) else sum(s["candidates"] for s in steps) for steps in of_all
    ]
    yield f"candidates for {figures['num_images_per_user']} of every user:"
    yield f"{'':6}" + "".join(f" {'none pass' if total is None else total:>9}" for total in totals)


def _candidates(passing: Mapping[str, Any]) -> str:
    return "none pass" if passing["candidates"] is None else str(passing["candidates"])


def _confusion(users: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield how many images of each user are taken for which class; of many classes, the most frequent mistakes."""
    user_of = {user["class"]: user["user_id"] for user in users}
    classes = sorted({int(number) for user in users for number in user["predicted"]} | set(user_of))
    if len(classes) <= _MAX_CLASSES and len(users) <= _MAX_CLASSES:
        yield "Images of a user (down) that are taken for user (across)"
        yield f"{'':6}" + "".join(f" {user_of.get(number, f'c{number}')!s:>5}" for number in classes)
        for user in users:
            found = user["predicted"]
            yield f"{user['user_id']:>6}" + "".join(f" {found.get(str(number), 0) or '.':>5}" for number in classes)
        if unknown := [number for number in classes if number not in user_of]:
            yield f"c{unknown[0]} and the like are classes of the judge that no user of this dataset has"
        return
    mistakes = [
        (number / user["num_images"], user["user_id"], user_of.get(int(taken), f"class {taken}"))
        for user in users
        for taken, number in user["predicted"].items()
        if int(taken) != user["class"]
    ]
    yield "Most often taken for another (all in --json)"
    for share, user_id, other in sorted(mistakes, key=lambda mistake: -mistake[0])[:10]:
        yield f"{user_id:>6} for {other}: {share:.1%}"


def report_json(figures: Mapping[str, Any]) -> bytes:
    """Return the figures as JSON."""
    return (json.dumps(figures, indent=1) + "\n").encode()


def check_plot() -> None:
    """Raise ValueError where `plot` cannot draw."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed, needed: pip install 'userdiff[plot]'")


def plot(path: Path, ratings: Ratings) -> None:
    """Write a picture of the scores: a row of axes for each, a box for each user."""
    from matplotlib.figure import Figure

    users = np.unique(ratings.user_ids).tolist()
    figure = Figure(figsize=(max(6, 0.25 * len(users)), 3 * len(ratings.names)), layout="constrained")
    axes = figure.subplots(len(ratings.names), squeeze=False)[:, 0]
    for at, (name, axis) in enumerate(zip(ratings.names, axes, strict=True)):
        values = ratings.table[:, at]
        axis.boxplot(
            [values[(ratings.user_ids == user_id) & np.isfinite(values)] for user_id in users],
            tick_labels=[str(user_id) for user_id in users],
            flierprops={"marker": ".", "markersize": 3},
        )
        axis.set_ylabel(name)
        for condition in ratings.conditions:
            if condition.score == name:
                axis.axhline(condition.bound, color="tab:red", linewidth=1, label=str(condition))
                axis.legend(loc="lower right")
    axes[-1].set_xlabel("user")
    figure.savefig(path, dpi=120)
