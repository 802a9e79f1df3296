"""Specifications: what is refused, and how parts become a total."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards
from rewards import RewardError, Sample, build
from rewards.spec import Measurement, RewardSet, Weight, total

BEHAVE = {"_target_": "user_rewards.Misbehave"}
EQUALS = {"_target_": "user_rewards.equals"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "empty"),
        ([], "expected a mapping"),
        ({"a": 3}, "expected a name and a mapping with _target_"),
        ({"a": {"weight": 1}}, "_target_=None must be an import path"),
        ({"a": {"target": "x.Y"}}, r"keys \['target'\]: _target_=None"),
        ({"a": {"_target_": "Plain"}}, "import path"),
        ({"a": {**BEHAVE, "weight": math.nan}}, "must be a finite number"),
        ({"a": {**BEHAVE, "weight": "1"}}, "must be a finite number"),
        ({"a": {**BEHAVE, "weight": True}}, "must be a finite number"),
        ({"a": {**EQUALS, "factor": math.nan}}, "JSON values only"),
        ({"a": {"_target_": "no_such_module.X"}}, "no_such_module"),
        ({"a": {"_target_": "user_rewards.Misbehav"}}, "did you mean 'Misbehave'"),
        ({"a": {**EQUALS, "facter": 2.0}}, "did you mean 'factor'"),
        ({"a": {"_target_": "rewards.math_verify.MathVerify", "strickt": 1}}, "mean 'strict'"),
        ({"a": {"_target_": "user_rewards.BreaksAtStart"}}, "missing a required argument: 'how'"),
        ({"a": {"_target_": "rewards.math_verify.MathVerify", "extract": "bxed"}}, "'bxed'"),
        ({"a": {"_target_": "pathlib.Path"}}, "not callable"),
    ],
)
def test_wrong_specification_says_what_to_mend(spec: Any, says: str) -> None:
    with pytest.raises(RewardError, match="(?s)" + says.replace("(", r"\(")):
        build(spec)


def test_one_specification_per_import_path(sample: Callable[..., Sample]) -> None:
    rewards = build(
        {
            "function": {"_target_": "user_rewards.equals", "factor": 0.5, "weight": 2},
            "object": {**BEHAVE, "weight": -1.0},
        }
    )
    measured = rewards.measure(sample("value 3", "value 3"))
    assert measured.parts == {"function": 0.5, "object": 3.0}
    assert total(rewards.weights, measured) == (2 * 0.5 - 3.0, measured.parts, None)


@pytest.mark.parametrize(
    ("completion", "says"),
    [
        ("value nan", "NaN from reward 'a'"),
        ("value inf", "inf from reward 'a'"),
        ("none", "reward 'a' returned None"),
        ("text", "returned str"),
        ("unscorable", "no such reference"),
        ("raise", "ValueError: told to"),
        ("sys.exit", "SystemExit"),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_missing_part_is_never_zero(completion: str, says: str, weight: float, sample: Callable[..., Sample]) -> None:
    rewards = build({"a": {**BEHAVE, "weight": weight}, "b": EQUALS})
    measured = rewards.measure(sample(completion, completion))
    assert measured.parts == {"a": None, "b": 1.0}
    score, parts, reason = total(rewards.weights, measured)
    assert score == (None if weight else 1.0) and parts == measured.parts
    assert reason is not None and says in reason


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(st.tuples(finite, st.none() | finite), min_size=1, max_size=5))
def test_total_is_the_weighted_sum_or_none(rows: list[tuple[float, float | None]]) -> None:
    weights = [Weight(str(i), w) for i, (w, _) in enumerate(rows)]
    parts = {str(i): part for i, (_, part) in enumerate(rows)}
    score, same, reason = total(weights, Measurement(parts, {}, None))
    assert same == parts
    if any(part is None and weight != 0 for weight, part in rows):
        assert score is None and reason
    else:
        assert score == sum(weight * part for weight, part in rows if part is not None)


def test_overflowing_sum_is_none() -> None:
    measured = Measurement({"a": 1e3, "b": 1.0}, {}, None)
    score, _, reason = total([Weight("a", 1e308), Weight("b", 1e308)], measured)
    assert score is None and reason is not None and "inf" in reason


def test_a_forged_value_outside_the_bounds_is_refused() -> None:
    rewards = build({"m": {"_target_": "rewards.math_verify.MathVerify"}})
    score, parts, reason = total(rewards.weights, Measurement({"m": 1e9, "forged": 1.0}, {}, None))
    assert score is None and parts == {"m": None} and reason is not None and "outside its bounds" in reason


def test_the_package_stands_alone_and_is_light() -> None:
    """Neither torch nor rlkit, and the verifier libraries only in the workers."""
    code = """
import importlib, pkgutil, sys, rewards
for module in pkgutil.iter_modules(rewards.__path__):
    importlib.import_module(f"rewards.{module.name}")
heavy = {"torch", "rlkit", "sympy", "math_verify", "reasoning_gym", "numpy"}
print(*(heavy & set(sys.modules)))
"""
    root = Path(rewards.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


class _VotesBadly:
    def __call__(self, sample: Sample) -> float:
        return 1.0

    def answer(self, sample: Sample) -> str:
        raise KeyError("no answer here")


def test_an_answer_that_raises_costs_the_part_and_is_told() -> None:
    mine = RewardSet((Weight("mine", 1.0, answers=True),), (_VotesBadly(),))
    sample = Sample("p", "c", "c", {}, "stop", 1)
    score, parts, reason = total(mine.weights, mine.measure(sample))
    assert (score, parts) == (None, {"mine": None})
    assert reason is not None and "no answer here" in reason
