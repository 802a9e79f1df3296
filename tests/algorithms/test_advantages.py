"""GRPO's advantage (arXiv 2402.03300, section 4.1.2) and Dr. GRPO's (arXiv 2503.20783)."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.algorithms.advantages.grpo import GroupNormalizedAdvantage
from rlkit.algorithms.base import AdvantageInputs

BOTH = (GroupNormalizedAdvantage(), MeanCentredAdvantage())
GROUPS = st.lists(st.lists(st.integers(-8, 8).map(lambda x: x / 4), min_size=2, max_size=6), min_size=1, max_size=5)


def inputs(groups: list[list[float]]) -> AdvantageInputs:
    flat = [(score, number) for number, scores in enumerate(groups) for score in scores]
    return AdvantageInputs(
        scores=torch.tensor([s for s, _ in flat], dtype=torch.float64),
        group=torch.tensor([g for _, g in flat]),
        lengths=torch.ones(len(flat), dtype=torch.float64),
    )


@given(GROUPS)
@settings(max_examples=60, deadline=None)
def test_equal_a_loop_over_groups_with_the_equation(groups):
    """A_i = (R_i - mean) / (std + epsilon) with n - 1; A_i = R_i - mean."""
    normalised, centred = [], []
    for scores in groups:
        mean, std = statistics.fmean(scores), statistics.stdev(scores)
        centred += [s - mean for s in scores]
        normalised += [(s - mean) / (std + 1e-6) for s in scores]
    for advantage, expected in zip(BOTH, (normalised, centred), strict=True):
        want = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(advantage(inputs(groups)), want, rtol=1e-9, atol=1e-9)


@given(GROUPS)
@settings(max_examples=60, deadline=None)
def test_sum_to_zero_in_every_group_and_vanish_in_constant_ones(groups):
    given_ = inputs([*groups, [0.1, 0.1, 0.1]])  # 0.1 three times: the mean is not 0.1 in floating point
    for advantage in BOTH:
        out = advantage(given_)
        for number in range(len(groups) + 1):
            assert out[given_.group == number].sum().item() == pytest.approx(0.0, abs=1e-9)
        assert (out[-3:] == 0).all()


@given(GROUPS, st.floats(0.5, 4.0), st.floats(-3.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_only_grpo_is_unchanged_by_an_affine_map_of_the_scores(groups, scale, shift):
    before, mapped = inputs(groups), inputs([[scale * s + shift for s in scores] for scores in groups])
    grpo, dr_grpo = BOTH
    torch.testing.assert_close(grpo(mapped), grpo(before), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dr_grpo(mapped), scale * dr_grpo(before), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("samples", [2, 3])
def test_dr_grpos_expected_gradient_is_the_policy_gradient_times_n_minus_1_over_n(samples):
    """Every group of an enumerated policy, weighed by its probability, against autograd of E[R]."""
    torch.manual_seed(0)
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.25, -0.5], dtype=torch.float64)
    logprobs = torch.log_softmax(theta, 0)
    exact = torch.autograd.grad((logprobs.exp() * rewards).sum(), theta, retain_graph=True)[0]
    surrogate = torch.zeros((), dtype=torch.float64)
    for actions in itertools.product(range(4), repeat=samples):
        chosen = list(actions)
        advantage = MeanCentredAdvantage()(inputs([rewards[chosen].tolist()]))
        probability = logprobs.detach()[chosen].sum().exp()
        surrogate = surrogate + probability * (advantage * logprobs[chosen]).mean()
    expected = torch.autograd.grad(surrogate, theta)[0]
    torch.testing.assert_close(expected, (samples - 1) / samples * exact, rtol=0, atol=1e-12)
