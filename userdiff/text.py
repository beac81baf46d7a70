"""What stands in a command line as text: paths, numbers, and users as ids and ranges."""

import argparse
from collections.abc import Iterable
from pathlib import Path

MAX_USERS = 2**24
_MAX_DIGITS = 4000  # Python refuses to read longer numbers


def path(text: str) -> Path:
    """Parse a path for argparse; an empty one, as of a shell variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path; the current folder is .")
    return Path(text)


def whole_number(text: str) -> int:
    """Parse an int for argparse, which prints the message of what is raised here."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def natural_number(text: str) -> int:
    """Parse an int from 1 for argparse."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, needed: 1 or more")
    return value


def number(text: str) -> float:
    """Parse a float for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def id_range(text: str) -> range:
    """Parse one id or one range of ids: `5`, `10-15`."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or max(len(first), len(last)) > _MAX_DIGITS:
        hint = f"; with spaces: {' '.join(text.split(','))}" * ("," in text)
        raise argparse.ArgumentTypeError(f"{text!r} is not an id (5) or a range of ids (10-15), ids start at 1{hint}")
    ids = range(int(first), int(last or first) + 1)
    if ids.start >= ids.stop:
        raise argparse.ArgumentTypeError(f"{text!r} runs backwards, write {last}-{first}")
    if ids.stop - ids.start > MAX_USERS:
        raise argparse.ArgumentTypeError(f"{text!r} names more than {MAX_USERS} users")
    return ids


def format_ids(ids: Iterable[int]) -> str:
    """Write ids the way `--user_ids` reads them: `1-3 5`."""
    runs: list[list[int]] = []
    for user_id in sorted(ids):
        if runs and user_id == runs[-1][1] + 1:
            runs[-1][1] = user_id
        else:
            runs.append([user_id, user_id])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
