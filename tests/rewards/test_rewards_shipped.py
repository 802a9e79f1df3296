"""The shipped rewards and the answer extraction, called directly."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import RewardError, Sample, Unscorable
from rewards.exact import ExactMatch, to_fraction
from rewards.extraction import extract, last_number
from rewards.format import Format
from rewards.length import OverlongPenalty
from rewards.math_verify import MathVerify
from rewards.reasoning_gym import ReasoningGym

Make = Callable[..., Sample]


@pytest.mark.parametrize(
    ("text", "method", "marker", "found"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", "boxed", "", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "boxed", "", "1"),
        (r"\boxed{\{1, 2\}}", "boxed", "", r"\{1, 2\}"),
        ("no box", "boxed", "", None),
        ("12 apples, 1,234.50 left.", "last_number", "", "1,234.50"),
        ("7-3", "last_number", "", "3"),
        ("it is -3.", "last_number", "", "-3"),
        ("half: 1/2", "last_number", "", "1/2"),
        ("", "last_number", "", None),
        ("a #### 5 #### 6 \nmore", "delimiter", "####", "6"),
        ("a", "delimiter", "####", None),
        ("<answer>1</answer><answer> 2 </answer>", "tag", "answer", "2"),
        ("<answer>1", "tag", "answer", None),
        ("x=1 x=2", "regex", r"x=(\d)", "2"),
        ("  all \n", "whole", "", "all"),
        ("   ", "whole", "", None),
    ],
)
def test_extract(text: str, method: str, marker: str, found: str | None) -> None:
    assert extract(text, method, marker) == found


@given(st.text(alphabet="-+.,/0123456789 a"), st.integers(-(10**9), 10**9))
def test_the_last_number_is_found(noise: str, number: int) -> None:
    assert last_number(f"{noise} is {number}") == str(number)
    assert last_number(f"{noise} is {number:,}.") == f"{number:,}"


@given(st.text(alphabet="\\boxed{}()a1 "), st.text(alphabet="a1{} +-").map(lambda t: t.strip()))
def test_a_balanced_box_is_found_whole(noise: str, inner: str) -> None:
    depth = 0
    for char in inner:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            return
    if depth == 0 and inner:
        assert extract(f"{noise} \\boxed{{{inner}}}", "boxed") == inner


@pytest.mark.parametrize(
    ("reference", "completion", "score"),
    [
        ("18", r"\boxed{18}", 1.0),
        ("18", r"\boxed{18.0}", 1.0),
        ("1,234", r"\boxed{1234}", 1.0),
        ("1/2", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"\boxed{1/2}", 1.0),
        (r"$\sqrt{8}$", r"\boxed{2\sqrt{2}}", 1.0),
        (r"\boxed{x^2-1}", r"\boxed{(x-1)(x+1)}", 1.0),
        (r"8 \%", r"\boxed{8\%}", 1.0),
        ("62.5%", r"\boxed{62.5\%}", 1.0),
        ("18", r"\boxed{19}", 0.0),
        ("18", "18", 0.0),
        ("18", r"\boxed{}", 0.0),
        ("18", r"\boxed{\frac{}{}}", 0.0),
    ],
)
def test_math_verify(reference: str, completion: str, score: float, sample: Make) -> None:
    assert MathVerify()(sample(completion, reference)) == score


@pytest.mark.parametrize("extract_by", ["last_number", "auto"])
def test_math_verify_extraction(extract_by: str, sample: Make) -> None:
    assert MathVerify(extract=extract_by)(sample("2 and 16 make 18", "18")) == 1.0


@pytest.mark.parametrize("reference", [None, "", r"m_{\max }=n^{2}-n-1"])
def test_math_verify_without_a_gold_is_unscorable(reference: str | None, sample: Make) -> None:
    with pytest.raises(Unscorable):
        MathVerify()(sample(r"\boxed{1}", reference))


def test_math_answers_that_are_equal_are_the_same_vote(sample: Make) -> None:
    votes = {MathVerify().answer(sample(rf"\boxed{{{a}}}")) for a in ("1/2", r"\frac12", "0.5")}
    assert len(votes) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1,234.50", "2469/2"), ("3/4", "3/4"), ("12%", "12"), ("5.", "5"), ("1/0", None),
     ("a", None), ("1e999999999", None)],
)  # fmt: skip
def test_to_fraction(text: str, value: str | None) -> None:
    assert (None if value is None else str(to_fraction(text))) == value


def test_exact_match(sample: Make) -> None:
    text = ExactMatch(marker="####", ignore_case=True)
    assert text(sample("so #### New  York", "new york")) == 1.0
    assert text(sample("so New York", "new york")) == 0.0
    number = ExactMatch(marker="####", numeric=True)
    assert number(sample("#### $1,000.00", "1000")) == 1.0
    assert number(sample("#### 1000.02", "1000")) == 0.0
    assert number(sample("#### many", "1000")) == 0.0
    assert number.answer(sample("#### 2/4")) == "1/2"
    with pytest.raises(Unscorable):
        number(sample("#### 1", "many"))
    with pytest.raises(RewardError, match="marker"):
        ExactMatch()


def test_format(sample: Make) -> None:
    tags = Format(tags=["think", "answer"])
    assert tags(sample("<think>\na</think> so <answer>1</answer>")) == 1.0
    assert tags(sample("<answer>1</answer><think>a</think>")) == 0.0
    assert tags(sample("<think><answer>1</answer></think>")) == 0.0
    assert tags(sample("<think>a</think><answer>1</answer><answer>2</answer>")) == 0.0
    assert Format(pattern="a.*z")(sample("a\nz")) == 1.0
    assert Format(pattern="a")(sample("ab")) == 0.0
    for wrong in ({}, {"pattern": "("}, {"tags": "think"}):
        with pytest.raises(RewardError):
            Format(**wrong)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 2000))
def test_overlong_penalty(cache: int, free: int, tokens: int) -> None:
    limit = cache + free
    sample = Sample("", "", None, {}, "stop", tokens)
    penalty = OverlongPenalty(max_tokens=limit, cache_tokens=cache)(sample)
    if tokens <= free:
        assert penalty == 0.0
    elif tokens >= limit:
        assert penalty == -1.0
    else:
        assert penalty == pytest.approx((limit - cache - tokens) / cache)


def test_overlong_penalty_refuses_no_interval() -> None:
    with pytest.raises(RewardError, match="cache_tokens"):
        OverlongPenalty(max_tokens=5, cache_tokens=6)


def _entry(name: str) -> dict[str, object]:
    import reasoning_gym

    entry = reasoning_gym.create_dataset(name, seed=3, size=1)[0]
    return json.loads(json.dumps(entry))  # type: ignore[no-any-return]


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "spiral_matrix", "rearc"])
def test_reasoning_gym_after_json(task: str, sample: Make) -> None:
    entry = _entry(task)
    gold = "1" if entry["answer"] is None else entry["answer"]
    reward = ReasoningGym(task)
    right = sample(f"<answer>{gold}</answer>", gold, metadata=entry["metadata"])
    assert reward(right) == 1.0
    assert reward.answer(right) == str(gold).strip()
    wrong = sample("<answer>17 18 x</answer>", gold, metadata=entry["metadata"])
    assert reward(wrong) < 1.0
    assert reward(sample(str(gold), gold, metadata=entry["metadata"])) == 0.0


def test_reasoning_gym_settings(sample: Make) -> None:
    with pytest.raises(RewardError, match="did you mean 'chain_sum'"):
        ReasoningGym("chainsum").warm_up()
    several = ReasoningGym(["chain_sum", "gcd"], extract="whole")
    several.warm_up()
    assert several(sample("5", "5", metadata={"source_dataset": "gcd"})) == 1.0
    with pytest.raises(Unscorable, match="source_dataset"):
        several(sample("5", "5", metadata={"source_dataset": "lcm"}))
