"""How messages write counts, ids and refusals, and how ids are read back."""

import argparse
from collections.abc import Iterable, Sequence

MAX_USERS = 2**24
_MAX_DIGITS = 4000  # Python refuses to read longer numbers


def printable(text: str) -> str:
    """Escape what does not print, such as a line break in a file's name, or what moves a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def count(number: int, what: str, plural: str = "") -> str:
    """Return a number with its noun: `1 image`, `2 images`."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def listed(names: Sequence[str], number: int = 0, limit: int = 20) -> str:
    """Return the first `limit` names, separated by commas, and how many more there are.

    number: of all names, where these are only some.
    """
    more = max(number, len(names)) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def refusal(error: OSError) -> str:
    """Return what a file system refused, and for which file."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def id_range(text: str) -> range:
    """Parse one id or one range of ids: `5`, `10-15`; raises argparse's error otherwise."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or max(len(first), len(last)) > _MAX_DIGITS:
        hint = f"; with spaces: {' '.join(text.split(','))}" * ("," in text)
        raise argparse.ArgumentTypeError(f"{text!r} is not an id (5) or a range of ids (10-15){hint}")
    ids = range(int(first), int(last or first) + 1)
    if ids.start >= ids.stop:
        raise argparse.ArgumentTypeError(f"{text!r} runs backwards, write {last}-{first}")
    if ids.stop - ids.start > MAX_USERS:
        raise argparse.ArgumentTypeError(f"{text!r} names more than {MAX_USERS} users")
    return ids


def format_ids(ids: Iterable[int]) -> str:
    """Return ids as `--user_ids` takes them: `1-3 5`."""
    runs: list[list[int]] = []
    for user_id in sorted(ids):
        if runs and user_id == runs[-1][1] + 1:
            runs[-1][1] = user_id
        else:
            runs.append([user_id, user_id])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
