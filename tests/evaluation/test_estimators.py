"""avg@k, pass@k, maj@k: against enumeration."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.evaluation.estimators import estimate, majority_score, pass_at_k, summarise
from rlkit.types import Verdict


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_equals_enumeration(correct, k):
    # Chen et al. 2021 eq. 1: the share of k-subsets that hold a correct sample.
    if k > len(correct):
        return
    subsets = list(combinations(correct, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(expected)


def test_standard_error_is_over_prompts():
    result = estimate([0.0, 1.0, 1.0, 0.0])
    assert result == pytest.approx((0.5, (1 / 3 / 4) ** 0.5))


def verdict(score: float | None, answer: str | None) -> Verdict:
    return Verdict(score=score, answer=answer)


def test_majority_with_ties_and_silence():
    one = [verdict(1, "7"), verdict(0, "8"), verdict(1, "7"), verdict(0, None)]
    assert majority_score(one, [1, 0, 1, 0]) == 1
    tied = [verdict(1, "7"), verdict(0, "8")]
    assert majority_score(tied, [1, 0]) == 0.5
    assert majority_score([verdict(0, None)], [0]) == 0


def test_unscored_samples_are_left_out_never_zero():
    rows = [[verdict(1, "7"), verdict(None, None)], [verdict(1, "7"), verdict(0, "8")]]
    result = summarise(rows, samples=2, correct_at=1.0)
    assert result["avg@2"][0] == 0.75
    assert result["pass@2"][0] == 1 and math.isnan(result["pass@2"][1])  # of one prompt
