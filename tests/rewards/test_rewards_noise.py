"""Injected verifier errors and appeals, through the pool: rates, determinism, what stays unscored, the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from rewards import RewardError, Sample, Score, VerifierPool, build

EXACT = {"_target_": "rewards.exact.ExactMatch", "extract": "whole"}
NOISE = {"_target_": "rewards.noise_injection.NoiseInjection", "reward": EXACT}
BEHAVE = {"_target_": "user_rewards.Misbehave"}


def samples(count: int, first: int = 0) -> list[Sample]:
    """Every other one right; places in the run differ, texts hardly."""
    return [
        Sample("q", "1" if i % 2 else "0", "1", {}, "stop", 1, key=f"{i // 8}/{i % 8}")
        for i in range(first, first + count)
    ]


def scored(spec: dict[str, Any], given: Sequence[Sample], **more: Any) -> list[Score]:
    with VerifierPool(spec, **more) as pool:
        return pool.score_sync(given)


def noisy(rho0: float, rho1: float, **more: Any) -> dict[str, Any]:
    return {**NOISE, "false_positive_rate": rho0, "false_negative_rate": rho1, **more}


def test_errors_come_at_their_rates_beside_the_truth() -> None:
    spec = {"correct": noisy(0.1, 0.3), "clean": {**EXACT, "weight": 0}}
    count = 4000
    scores = scored(spec, samples(count))
    for truth, rate in ((0.0, 0.1), (1.0, 0.3)):
        of_kind = [s for s in scores if s.parts["clean"] == truth]
        flipped = sum(s.score != truth for s in of_kind) / len(of_kind)
        assert len(of_kind) == count // 2 and {s.score for s in of_kind} == {0.0, 1.0}
        assert flipped == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / len(of_kind)))
    assert all(s.parts["correct"] == s.score and s.reason is None for s in scores)


def test_errors_are_of_each_sample_and_the_same_in_every_process_and_order() -> None:
    given = samples(400)
    spec = {"correct": noisy(0.4, 0.4)}
    first = [s.score for s in scored(spec, given, workers=1, batch_size=400)]
    assert [s.score for s in scored(spec, given[::-1], workers=2, batch_size=7)] == first[::-1]
    assert [s.score for s in scored({"correct": noisy(0.4, 0.4, seed=1)}, given)] != first
    alike = [given[i] for i in range(1, 400, 2)]  # same prompt, same completion, other places
    assert len({s.score for s in scored(spec, alike)}) == 2


def test_without_rates_it_is_the_verdict_and_with_both_at_one_its_opposite() -> None:
    given = samples(20)
    truth = [float(i % 2) for i in range(20)]
    assert [s.score for s in scored({"correct": noisy(0, 0)}, given)] == truth
    assert [s.score for s in scored({"correct": noisy(1, 1)}, given)] == [1 - t for t in truth]


@pytest.mark.parametrize("correct_at", [1.0, 0.5])
def test_a_partial_score_is_a_verdict_by_its_threshold(correct_at: float) -> None:
    reward = build({"a": noisy(0, 0, reward=BEHAVE, correct_at=correct_at)}).functions[0]
    assert reward(Sample("", "value 0.7", None, {}, "stop", 1)) == float(correct_at == 0.5)


@pytest.mark.parametrize(
    ("completion", "says"),
    [("none", "returned None"), ("value nan", "NaN"), ("raise", "told to"), ("unscorable", "no such reference"),
     ("segfault", "signal 11"), ("spin", "timeout")],
)  # fmt: skip
def test_what_the_reward_cannot_score_stays_unscored(completion: str, says: str) -> None:
    """Never 0, which an error could even turn into 1."""
    spec = {"correct": noisy(1, 1, reward=BEHAVE)}
    (score,) = scored(spec, [Sample("", completion, None, {}, "stop", 1)], timeout_s=0.5)
    assert score.score is None and says in (score.reason or "")


def test_answers_to_vote_on_and_warm_up_are_the_rewards_own() -> None:
    math_verify = {"_target_": "rewards.math_verify.MathVerify"}
    spec = {"correct": noisy(1, 1, reward=math_verify)}
    with VerifierPool(spec) as pool:
        (score,) = pool.score_sync([Sample("", r"\boxed{1/2}", "0.5", {}, "stop", 1)])
        assert pool.extracts_answers and score.answer is not None and score.score == 0.0
    with VerifierPool({"correct": noisy(0, 0, reward=BEHAVE)}) as pool:
        assert not pool.extracts_answers
    for wrapper in (noisy(0, 0, reward={"_target_": "user_rewards.BreaksAtStart", "how": "raise"}),
                    appeals(appeal={"_target_": "user_rewards.BreaksAtStart", "how": "raise"})):  # fmt: skip
        with pytest.raises(RewardError, match="no judge here"):
            VerifierPool({"correct": wrapper})


APPEALS = {"_target_": "rewards.noise_injection.Appeals", "rule": EXACT, "appeal": EXACT}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (noisy(-0.1, 0), "false_positive_rate"),
        (noisy(0, 1.1), "false_negative_rate"),
        ({**NOISE, "false_positive_rate": 0.1}, "false_negative_rate"),
        (noisy(0, 0, reward={**EXACT, "extrct": "boxed"}), "did you mean 'extract'"),
        (noisy(0, 0, reward={"weight": 1}), "_target_"),
        (noisy(0, 0, rewrd=EXACT), "did you mean 'reward'"),
        ({"_target_": "rewards.noise_injection.Appeals", "rule": EXACT, "appeal": EXACT, "fraction": 2}, "fraction"),
        ({"_target_": "rewards.noise_injection.Appeals", "rule": EXACT}, "appeal"),
        (noisy(0, 0, correct_at=None), "correct_at"),
        (noisy(0, 0, correct_at="right"), "correct_at"),
        ({**APPEALS, "max_calls": -1}, "max_calls"),
        ({**APPEALS, "max_calls": "many"}, "max_calls"),
    ],
)
def test_wrong_settings_say_what_to_mend(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(RewardError, match=f"(?s)'correct'.*{says}"):
        build({"correct": spec})


def appeals(**more: Any) -> dict[str, Any]:
    """Of a rule that misses half of what is right; the appeal knows."""
    return {
        "_target_": "rewards.noise_injection.Appeals",
        "rule": noisy(0, 0.5),
        "appeal": EXACT,
        "fraction": 0.3,
        **more,
    }


def test_a_fraction_of_the_rules_negatives_is_judged_again() -> None:
    spec = {"correct": noisy(0, 0.5), "appeal": appeals(weight=0), "clean": {**EXACT, "weight": 0}}
    scores = scored(spec, samples(4000))
    assert all(s.score is not None for s in scores)
    negatives = [s for s in scores if s.score == 0]
    assert all(s.parts["appeal"] is None for s in scores if s.score == 1)
    asked = [s for s in negatives if s.parts["appeal"] is not None]
    share = len(asked) / len(negatives)
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(negatives)))
    assert all(s.parts["appeal"] == s.parts["clean"] for s in asked)
    assert {s.parts["appeal"] for s in asked} == {0.0, 1.0}
    again = scored(spec, samples(4000)[::-1], workers=1)
    assert [s.parts for s in again[::-1]] == [s.parts for s in scores]


def test_flipping_gives_those_their_point_and_no_others() -> None:
    spec = {"correct": appeals(flip=True), "rule": noisy(0, 0.5, weight=0), "appeal": appeals(weight=0)}
    scores = scored(spec, samples(1000))
    assert any(s.score != s.parts["rule"] for s in scores)
    for s in scores:
        assert s.score == max(s.parts["rule"] or 0.0, s.parts["appeal"] or 0.0)


@pytest.mark.parametrize("flip", [False, True])
def test_past_the_budget_nobody_is_asked(flip: bool) -> None:
    """Counted over batches, each in a process of its own."""
    spec = {"correct": EXACT, "appeal": appeals(weight=0, fraction=1.0, max_calls=10, flip=flip)}
    with VerifierPool(spec, workers=1, batch_size=4) as pool:
        scores = [s for part in range(5) for s in pool.score_sync(samples(20, first=20 * part))]
    rule = [s.score for s in scored({"correct": noisy(0, 0.5)}, samples(100), workers=1)]
    if flip:
        assert sum(s.parts["appeal"] or 0.0 for s in scores) - sum(r or 0.0 for r in rule) in range(1, 11)
    else:
        asked = [i for i, s in enumerate(scores) if s.parts["appeal"] is not None]
        assert asked == [i for i, r in enumerate(rule) if r == 0][:10]


def test_an_appeal_that_fails_is_no_verdict() -> None:
    broken = {"correct": EXACT, "appeal": appeals(weight=0, fraction=1.0, rule=EXACT, appeal=BEHAVE)}
    (score,) = scored(broken, [Sample("", "raise", "1", {}, "stop", 1)])
    assert score.score == 0.0 and score.parts["appeal"] is None and "told to" in (score.reason or "")
