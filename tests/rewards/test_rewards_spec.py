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
from rewards import RewardError, RewardSet, Sample, build
from rewards.spec import Measurement, NamedReward

BEHAVE = {"_target_": "user_rewards.Misbehave"}
EQUALS = {"_target_": "user_rewards.equals"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "empty"),
        ([], "expected a mapping"),
        ({"a": 3}, "expected a mapping with _target_"),
        ({"a": {"weight": 1}}, "no _target_"),
        ({"a": {"target": "x.Y"}}, "should read '_target_'"),
        ({"a": {"_target_": "Plain"}}, "import path"),
        ({"a": {**BEHAVE, "weight": math.nan}}, "must be finite"),
        ({"a": {**BEHAVE, "weight": "1"}}, "must be a number"),
        ({"a": {**BEHAVE, "weight": True}}, "must be a number"),
        ({"a": {**BEHAVE, "weight": 0}}, "every reward has weight 0"),
        ({"a": {"_target_": "no_such_module.X"}}, "no_such_module"),
        ({"a": {"_target_": "user_rewards.Misbehav"}}, "did you mean 'Misbehave'"),
        ({"a": {**EQUALS, "facter": 2.0}}, "did you mean 'factor'"),
        ({"a": {"_target_": "rewards.math_verify.MathVerify", "strickt": 1}}, "mean 'strict'"),
        ({"a": {"_target_": "user_rewards.BreaksAtStart"}}, "needs the setting 'how'"),
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
    assert rewards.total(measured) == (2 * 0.5 - 3.0, None)


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
    total, reason = rewards.total(measured)
    assert total == (None if weight else 1.0)
    assert reason is not None and says in reason


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(st.tuples(finite, st.none() | finite), min_size=1, max_size=5))
def test_total_is_the_weighted_sum_or_none(rows: list[tuple[float, float | None]]) -> None:
    rewards = RewardSet(tuple(NamedReward(str(i), w, lambda _: 0.0) for i, (w, _) in enumerate(rows)))
    parts = {str(i): part for i, (_, part) in enumerate(rows)}
    total, reason = rewards.total(Measurement(dict(parts), {}, None))
    if any(part is None and weight != 0 for weight, part in rows):
        assert total is None and reason
    else:
        assert total == sum(weight * part for weight, part in rows if part is not None)


def test_overflowing_sum_is_none() -> None:
    rewards = RewardSet(tuple(NamedReward(name, 1e308, lambda _: 0.0) for name in "ab"))
    total, reason = rewards.total(Measurement({"a": 1e3, "b": 1.0}, {}, None))
    assert total is None and reason is not None and "inf" in reason


def test_a_forged_value_outside_the_bounds_is_refused() -> None:
    rewards = build({"m": {"_target_": "rewards.math_verify.MathVerify"}})
    total, reason = rewards.total(Measurement({"m": 1e9}, {}, None))
    assert total is None and reason is not None and "outside its bounds" in reason


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
