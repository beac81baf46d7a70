"""What `userdiff inspect` says: the figures of a dataset as text, and what each of them can tell."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from userdiff.text import count, listed
from userdiff.tools import inspect as inspection
from userdiff.tools.inspect import Pair, Report, UserFigures
from userdiff.tools.similarity import Similarity

USERS_SHOWN = 100

_WIDTH = 110  # of the notes

_NOTES = {
    "flat": f"contrast below {inspection.FLAT_CONTRAST:g} levels of 255: empty, or failed. Copies and likeness are "
    "sought among the others.",
    "copies": f"images with a near-copy among their user's others: made {inspection.SIDE}x{inspection.SIDE} and grey, brightness and contrast apart, "
    f"they differ by {inspection.COPY_DIFFERENCE:g} standard deviations at most. Many mean little variety, or seeds that "
    "repeat; none does not prove variety, and a copy that is shifted or mirrored is not seen.",
    "shared": "images with a near-copy among other users' images. The condition may have been ignored or users mixed "
    "up; or the images are merely simple, such as a few strokes on black.",
    "odd": f"images whose brightness or contrast is over {inspection.ODD_SPREADS:g} robust standard deviations from "
    f"their user's median (from {inspection.ODD_IMAGES} images a user on). Worth a look, not necessarily bad.",
    "brightness, contrast": "mean ± standard deviation over the images, in levels of 255. They say nothing of identity.",
    "own": "share of the images whose most similar one in the dataset, compared in the same way, is of the same user. "
    "Near chance: the condition has no effect that shows at that size. Near 100 %: users differ, or each has little "
    "variety. It cannot tell who is who: two users swapped as a whole look as good. Real images can (--real).",
    "most like": "the other user who has most of the rest. One who has much of it is a twin of this user, or the two "
    "were mixed up.",
    "real own": "the same, sought among real images: does the user look most like their real self? A rough measure, "
    "to be read against chance and the other users: it is no classifier, and what differs in position is not alike.",
}


def report_lines(name: str, report: Report) -> Iterator[str]:
    """Yield the lines to print for a dataset called `name`: a table, the worst cases, what the figures can tell."""
    yield f"{name}: {count(report.num_images, 'image')} of {count(len(report.users), 'user')}"
    if report.damaged:
        yield f"{len(report.damaged)} more cannot be read: {listed(report.damaged)}"
    yield ""
    yield from _table(report)
    yield ""
    yield from _verdict(report.users)
    lists = {
        "Closest within a user (difference, in standard deviations: 0 is equal, 1.4 unrelated)": map(
            _pair, report.closest_within
        ),
        "Closest across users (difference, as above)": map(_pair, report.closest_across),
        "Flattest (contrast)": (f"{one.value:8.1f}  {one.name}" for one in report.flattest),
        "Oddest (robust standard deviations)": (f"{one.value:8.1f}  {one.name}  {one.what}" for one in report.oddest),
    }
    for title, lines in lists.items():
        yield from ("", title, *(list(lines) or ["    none"]))
    yield from _notes(report)


def report_json(report: Report, features: Any = None) -> bytes:
    """Return all figures of a report, for every user, as JSON; features: a dataclass of more figures."""
    limits = {name: getattr(inspection, name) for name in ("COPY_DIFFERENCE", "FLAT_CONTRAST", "ODD_SPREADS")}
    more = {} if features is None else {"features": asdict(features)}
    return (json.dumps({"limits": limits, **asdict(report), **more}, indent=1) + "\n").encode()


def _table(report: Report) -> Iterator[str]:
    has_real = any(user.real for user in report.users)
    head = f"{'user':>6} {'images':>7} {'flat':>5} {'copies':>6} {'shared':>6} {'odd':>4}  {'brightness':>10}"
    head += f"  {'contrast':>10} {'own':>6}  {'most like':<14}"
    yield (head + (f" {'real own':>8}  most like real" if has_real else "")).rstrip()
    for user in _shown(report.users):
        line = f"{user.user_id:>6} {user.num_images:>7} {user.num_flat:>5} {user.num_copies:>6} {user.num_shared:>6}"
        line += f" {user.num_odd:>4}  {_spread(user.brightness):>10}  {_spread(user.contrast):>10}"
        line += f" {_own(user.generated):>6}  {_other(user.generated):<14}"
        yield (line + (f" {_own(user.real):>8}  {_other(user.real)}" if has_real else "")).rstrip()
    if len(report.users) > USERS_SHOWN:
        yield f"and {len(report.users) - USERS_SHOWN} more users, whose own share is no lower"


def _shown(users: Sequence[UserFigures]) -> Sequence[UserFigures]:
    """Choose whom the table shows: all, or where they are many those least like themselves."""

    def own_share(user: UserFigures) -> float:
        found = user.real or user.generated
        return found.own if found and found.chance else 2.0  # nothing is known of them

    return users if len(users) <= USERS_SHOWN else sorted(users, key=own_share)[:USERS_SHOWN]


def _spread(mean_and_deviation: tuple[float, float]) -> str:
    return "{:.0f} ± {:>2.0f}".format(*mean_and_deviation)


def _own(found: Similarity | None) -> str:
    return f"{found.own:.0%}" if found and found.chance else "-"  # without a chance: nothing of theirs to be found


def _other(found: Similarity | None) -> str:
    return f"{found.other} ({found.other_share:.0%})" if found and found.other is not None else "-"


def _verdict(users: Sequence[UserFigures]) -> Iterator[str]:
    """Sum up over all users whom their images are like, among the generated ones and the real ones."""
    for whose in ("generated", "real"):
        found = {user.user_id: getattr(user, whose) for user in users}
        known = {user_id: one for user_id, one in found.items() if one and one.chance}
        if not known:
            continue
        own = sum(one.own for one in known.values()) / len(known)
        chance = sum(one.chance for one in known.values()) / len(known)
        yield f"The most similar {whose} image is of the same user: {own:.0%}, by chance {chance:.0%}"
        mistaken = [f"{user_id} (like {one.other})" for user_id, one in known.items() if one.other_share >= one.own]
        yield f"  Users no more like themselves than like another: {listed(mistaken) if mistaken else 'none'}"


def _pair(pair: Pair) -> str:
    same = "same pixels" if pair.has_same_pixels else ""
    return f"{pair.difference:8.2f}  {'  '.join(pair.names)}  {same}".rstrip()


def _notes(report: Report) -> Iterator[str]:
    yield ""
    yield "What these figures can tell"
    for name, text in _NOTES.items():
        if name != "real own" or any(user.real for user in report.users):
            yield from wrap(f"{name}: {text}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    num_full = report.num_images - sum(user.num_flat for user in report.users)
    if report.num_compared < num_full:
        yield f"  {report.num_compared} of {num_full} images, evenly chosen, were compared with each other."
