"""Conditions that an image's scores have to meet: `confidence>=0.9`."""

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(>=|<=|>|<)\s*(\S+)\s*", re.ASCII)


@dataclass(frozen=True, order=True, slots=True)
class Condition:
    """A bound that a score has to keep."""

    score: str
    """Its name."""
    comparison: str
    """`>=`, `<=`, `>` or `<`."""
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse `confidence>=0.9`; raises ValueError."""
        match = _CONDITION.fullmatch(text)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise ValueError(
                f"{text!r} is no condition, needed: a score, >=, >, <= or <, and a number: confidence>=0.9"
            )
        return cls(match[1], match[2], bound)

    def __str__(self) -> str:
        """Return what `parse` takes, the same for conditions that mean the same."""
        short = f"{self.bound:g}"
        bound = short if float(short) == self.bound else repr(self.bound)
        return f"{self.score}{self.comparison}{bound}"

    def holds(self, scores: Mapping[str, float]) -> bool:
        """Return whether an image with these scores meets the condition; a score that is NaN meets none."""
        return bool(_COMPARISONS[self.comparison](scores[self.score], self.bound))


DEFAULT = (Condition("margin", ">", 0.0),)
"""The user's own class is the most probable one."""


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Parse conditions, all of which have to hold; none may be given. Raises ValueError."""
    return tuple(sorted({Condition.parse(text) for text in texts}))


def conditions_on(names: Collection[str], given: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """Return the conditions on the scores of these names: those given, else DEFAULT.

    Raises ValueError where one is about a score that there is not.
    """
    for condition in given or DEFAULT:
        if condition.score not in names:
            known = ", ".join(names)
            if not given:
                raise ValueError(f"missing; this judge gives {known}, needed: a condition on one of them")
            raise ValueError(f"{condition} is about no score of this judge, which gives {known}")
    return given or DEFAULT


def as_written(score: float) -> str:
    """Return a score as files have it: six significant digits, which a float32 keeps.

    What is compared with a bound is this number, so that a file and a decision never disagree.
    """
    return f"{score:.6g}"
