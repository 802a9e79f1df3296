"""BNPO (arXiv 2506.02864): the equations cited in the module, and what its density does at its edges."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import inputs

from rlkit.algorithms.advantages.bnpo import Bnpo, inverse_density, prior
from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.errors import ConfigError, TrainingError

NAN = float("nan")
BINARY = st.lists(st.lists(st.integers(0, 1).map(float), min_size=2, max_size=6), min_size=1, max_size=6)
FRACTIONAL = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=6)


def density(p: float, alpha: float, beta: float) -> float:
    norm = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
    return p ** (alpha - 1) * (1 - p) ** (beta - 1) / norm


@given(BINARY)
@settings(max_examples=80, deadline=None)
def test_equals_a_loop_over_groups_with_the_equation(groups):
    rates = [statistics.fmean(scores) for scores in groups]
    alpha = beta = 1.0
    if len(groups) > 1 and statistics.variance(rates) > 0:
        mean = statistics.fmean(rates)
        k = mean * (1 - mean) / statistics.variance(rates) - 1
        alpha, beta = max(1 + k * mean / 3, 1), max(1 + k * (1 - mean) / 3, 1)
    want = []
    for scores, p in zip(groups, rates, strict=True):
        weight = 0.0 if p in (0, 1) else min(1 / density(p, alpha, beta), 1e6)
        want += [weight * (score - p) for score in scores]
    got = Bnpo()(inputs(groups))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(FRACTIONAL)
@settings(max_examples=80, deadline=None)
def test_is_finite_sums_to_zero_in_every_group_and_vanishes_in_constant_ones(groups):
    given_ = inputs([*groups, [0.1, 0.1, 0.1], [0.0, 0.0], [1.0, 1.0]])
    got = Bnpo()(given_)
    assert got.isfinite().all() and (got[-7:] == 0).all()
    for number in range(len(groups)):
        part = got[given_.group == number]
        assert float(part.sum()) == pytest.approx(0.0, abs=1e-9 * max(1.0, float(part.abs().max())))
        if len(set(groups[number])) == 1:
            assert (part == 0).all()


@given(st.floats(0.01, 0.99))
def test_one_is_reinforce_and_three_halves_is_grpo_times_pi_over_8(p):
    rates = torch.tensor([p], dtype=torch.float64)
    assert float(inverse_density(rates, 1.0, 1.0)) == pytest.approx(1.0, rel=1e-12)
    want = math.pi / 8 / math.sqrt(p * (1 - p))
    assert float(inverse_density(rates, 1.5, 1.5)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [(2.0, 5.0), (0.5, 0.5), (8.0, 1.0)])
def test_the_priors_parameters_are_recovered_from_many_prompts(a, b):
    torch.manual_seed(0)
    alpha, beta = prior(torch.distributions.Beta(a, b).sample((200_000,)).double())
    assert 3 * (alpha - 1) == pytest.approx(a, rel=0.03)
    assert 3 * (beta - 1) == pytest.approx(b, rel=0.03)


@pytest.mark.parametrize(
    "groups",
    [
        [[1.0, 0.0, 0.0]],  # one prompt
        [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0, 0.0, 0.0]],  # equal rates: zero variance
        [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]],  # unbiased variance 1/3 > m (1 - m) = 2/9
    ],
)
def test_without_a_prior_it_is_reinforce_with_the_groups_mean(groups):
    given_ = inputs(groups)
    assert prior(torch.tensor([statistics.fmean(g) for g in groups], dtype=torch.float64)) == (1.0, 1.0)
    torch.testing.assert_close(Bnpo()(given_), MeanCentredAdvantage()(given_), rtol=1e-12, atol=1e-12)


def test_equal_rates_but_for_rounding_count_as_equal():
    rates = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    assert float(rates.var()) > 0 and prior(rates) == (1.0, 1.0)


def test_the_weight_is_clamped():
    rare = [[1.0] * 15 + [0.0]] * 40 + [[1.0] + [0.0] * 15]
    plain, clamped = Bnpo()(inputs(rare)), Bnpo(maximum_weight=2.0)(inputs(rare))
    assert float(plain[-16]) > 5 and float(clamped[-16]) == pytest.approx(2.0 * 15 / 16)


def test_scores_are_mapped_by_their_bounds():
    """An affine map of the scores, and of the bounds, changes nothing."""
    groups = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.5]]
    mapped = inputs([[3 * s - 1 for s in scores] for scores in groups])
    torch.testing.assert_close(Bnpo(low=-1.0, high=2.0)(mapped), Bnpo()(inputs(groups)), rtol=1e-9, atol=1e-12)
    with pytest.raises(TrainingError, match=r"scores = \[2.0, -1.0, 2.0\].*(?s:.)*algorithm.advantage.low"):
        Bnpo()(mapped)
    with pytest.raises(ConfigError, match="low < high"):
        Bnpo(low=1.0, high=0.0)


def test_several_rewards_are_averaged_each_under_its_own_prior():
    right, form = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    groups = [[0.0] * 4] * 2  # the total is not read
    got = Bnpo(rewards=["right", "form"])(inputs(groups, right=right, form=form))
    each = [Bnpo()(inputs([values[:4], values[4:]])) for values in (right, form)]
    torch.testing.assert_close(got, (each[0] + each[1]) / 2)


def test_a_part_that_a_sample_lacks_is_refused():
    with pytest.raises(TrainingError, match="nan"):
        Bnpo(rewards=["part"])(inputs([[0.0] * 3], part=[1.0, 0.0, NAN]))


def test_a_group_of_one_has_no_advantage():
    assert (Bnpo()(inputs([[1.0], [0.0]])) == 0).all()
