"""Conditions on scores: what is read is what is meant, and a file never disagrees with a decision."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userdiff.conditions import DEFAULT, Condition, as_written, conditions_on, parse_conditions


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("confidence>=0.9", Condition("confidence", ">=", 0.9)),
        (" margin > .5 ", Condition("margin", ">", 0.5)),
        ("blur_2<=-1e-3", Condition("blur_2", "<=", -0.001)),
        ("distance<4", Condition("distance", "<", 4.0)),
    ],
)
def test_a_condition_is_read(text, condition):
    assert Condition.parse(text) == condition


@pytest.mark.parametrize(
    "text", ["", "confidence", "confidence>=", ">=0.9", "confidence=0.9", "confidence==1", "confidence>=nan", "a>=inf",
             "2d>=1", "a b>=1", "margin>>1", "é>=1", "confidence>=0,9"],
)  # fmt: skip
def test_anything_else_is_none(text):
    with pytest.raises(ValueError, match="needed: a score"):
        Condition.parse(text)


@given(
    st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True),
    st.sampled_from([">=", ">", "<=", "<"]),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_condition_reads_back(name, comparison, bound):
    condition = Condition(name, comparison, bound)
    assert Condition.parse(str(condition)) == condition


def test_conditions_that_mean_the_same_are_the_same():
    assert parse_conditions(["margin>0.50", "confidence>=9e-1", "margin>.5"]) == parse_conditions(
        ["confidence>=0.9", "margin>0.5"]
    )
    assert conditions_on(["confidence", "margin"], parse_conditions([])) == DEFAULT
    assert [str(condition) for condition in DEFAULT] == ["margin>0"]


def test_a_bound_holds_as_it_reads():
    assert Condition.parse("a>=0.9").holds({"a": 0.9})
    assert not Condition.parse("a>0.9").holds({"a": 0.9})
    assert Condition.parse("a<=0.9").holds({"a": 0.9})
    assert not Condition.parse("a<0.9").holds({"a": 0.9})
    assert not any(Condition.parse(f"a{c}0").holds({"a": math.nan}) for c in (">=", ">", "<=", "<"))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_score_that_is_written_survives_a_float32(score):
    written = as_written(score)
    assert as_written(float(np.float32(float(written)))) == written


def test_a_condition_on_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match=r"blur>=1 .* confidence, margin"):
        conditions_on(["confidence", "margin"], parse_conditions(["margin>0", "blur>=1"]))
    with pytest.raises(ValueError, match=r"margin>0 is about no score"):  # said, and not merely the default
        conditions_on(["blur"], parse_conditions(["margin>0"]))
