"""Likelihood rewards: methods.md T1.1, equations of arXiv 2602.03979 and the unit tests named there."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.advantages.jepo import GroupLikelihoodAdvantage
from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.base import AdvantageInputs, LossInputs
from rlkit.algorithms.likelihood import AvgLogProb, AvgProb, Jepo, LikelihoodReward, LogProb, Nover, Prob
from rlkit.algorithms.losses.policy_gradient import ImportanceWeightedLoss, PolicyGradientLoss, sequence_weights
from rlkit.errors import ConfigError

PLAIN = (LogProb(), AvgLogProb(), Prob(), AvgProb())
TOKENS = st.lists(st.lists(st.floats(-5, 0), min_size=1, max_size=4), min_size=1, max_size=4)
name_of = lambda x: type(x).__name__  # noqa: E731


def tensors(sequences: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(one, dtype=torch.float64) for one in sequences]


def advantages(scores: list[float], kind: type) -> torch.Tensor:
    values = torch.tensor(scores, dtype=torch.float64)
    inputs = AdvantageInputs(scores=values, group=torch.zeros(len(scores)).long(), lengths=torch.ones_like(values))
    return kind()(inputs)


@given(TOKENS)
@settings(deadline=None, max_examples=50)
def test_rewards_equal_their_definitions(sequences):
    want = {
        LogProb: [sum(s) for s in sequences],
        AvgLogProb: [sum(s) / len(s) for s in sequences],
        Prob: [math.exp(sum(s)) for s in sequences],
        AvgProb: [sum(map(math.exp, s)) / len(s) for s in sequences],
        Jepo: [sum(s) for s in sequences],
    }
    for kind, values in want.items():
        got = torch.stack([kind().reward(one) for one in tensors(sequences)])
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float64))


@given(st.lists(st.floats(-5, 0), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_averages_agree_with_sums_for_answers_of_one_token(tokens):
    # T1.1 unit test 4.
    for one in tensors([[x] for x in tokens]):
        torch.testing.assert_close(LogProb().reward(one), AvgLogProb().reward(one))
        torch.testing.assert_close(Prob().reward(one), AvgProb().reward(one))


class Table:
    """A tabular policy: 3 chains, each with its own answer of two tokens (three chances each), all from `theta`."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.theta = torch.randn(3 + 3 * 2 * 3, dtype=torch.float64, requires_grad=True)
        self.behavior = torch.log_softmax(torch.randn(3, dtype=torch.float64), 0)

    def chains(self) -> torch.Tensor:
        return torch.log_softmax(self.theta[:3], 0)

    def answers(self) -> torch.Tensor:
        """log-probs of the reference's tokens behind every chain, [3, 2]."""
        return torch.log_softmax(self.theta[3:].view(3, 2, 3), -1)[:, :, 0]

    def rewards(self, reward: LikelihoodReward) -> torch.Tensor:
        return torch.stack([reward.reward(answer) for answer in self.answers()])

    def surrogate(self, reward, group, advantage_of, loss, omega_of) -> torch.Tensor:
        """The learner's loss of one group of chains, with everything but log-probs and R(theta) constant."""
        scores = self.rewards(reward).detach()[list(group)]
        one_group = torch.zeros(len(group)).long()
        advantage = advantage_of(AdvantageInputs(scores=scores, group=one_group, lengths=torch.ones_like(scores)))
        inputs = LossInputs(
            logprobs=self.chains()[list(group)],
            old_logprobs=self.behavior[list(group)],
            behavior_logprobs=self.behavior[list(group)],
            advantages=advantage,
            sequence=torch.arange(len(group)),
            sequences=len(group),
        )
        shares = reward.shares(scores) * omega_of(inputs)
        return loss(inputs).per_token.sum() - (shares * self.rewards(reward)[list(group)]).sum()


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("reward", PLAIN, ids=name_of)
def test_expected_surrogate_gradient_is_that_of_the_objective(reward, off_policy):
    """T1.1 unit test 1: E_z[(R - c) grad log pi(z) + grad R] = grad E_z[R], groups of 2 and 3, all enumerated."""
    it = Table()
    exact = torch.autograd.grad((it.chains().exp() * it.rewards(reward)).sum(), it.theta)[0]
    loss = ImportanceWeightedLoss(None) if off_policy else PolicyGradientLoss()
    chance = (it.behavior if off_policy else it.chains().detach()).exp()
    weigh = (lambda inputs: sequence_weights(inputs, None)) if off_policy else (lambda inputs: 1.0)
    for size in (2, 3):
        total = torch.zeros_like(exact)
        for group in itertools.product(range(3), repeat=size):
            value = it.surrogate(reward, group, LeaveOneOutAdvantage(), loss, weigh) / size
            total -= chance[list(group)].prod() * torch.autograd.grad(value, it.theta)[0]
        torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_expected_surrogate_gradient_of_jepo_is_that_of_the_group_objective(size):
    """sum_i A_i grad log pi(z_i) + sum_i softmax_i grad S_i = grad E[log mean exp S], enumerated over groups."""
    it, reward = Table(), Jepo()

    def objective() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for group in itertools.product(range(3), repeat=size):
            chance = it.chains()[list(group)].sum().exp()
            total = total + chance * (it.rewards(reward)[list(group)].logsumexp(0) - math.log(size))
        return total

    exact = torch.autograd.grad(objective(), it.theta)[0]
    total = torch.zeros_like(exact)
    for group in itertools.product(range(3), repeat=size):
        value = it.surrogate(reward, group, GroupLikelihoodAdvantage(), PolicyGradientLoss(), lambda _: 1.0)
        chance = it.chains().detach()[list(group)].sum().exp()
        total -= chance * torch.autograd.grad(value, it.theta)[0]
    torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-12)


def test_baselines_change_no_expected_gradient():
    """T1.1 unit test 2: RLOO sums to 0, and any constant c gives the same expectation."""
    assert abs(float(advantages([-3.0, -0.5, -1.25], LeaveOneOutAdvantage).sum())) < 1e-12
    it, reward = Table(), LogProb()
    found = []
    for c in (0.0, 7.0):
        total = torch.zeros_like(it.theta)
        for z in range(3):
            r = it.rewards(reward)[z]
            value = (r.detach() - c) * it.chains()[z] + r
            total += it.chains().detach()[z].exp() * torch.autograd.grad(value, it.theta)[0]
        found.append(total)
    torch.testing.assert_close(*found)


def test_jepo_advantages_at_the_edges():
    # T1.1 unit test 3.
    torch.testing.assert_close(advantages([-2.0] * 4, GroupLikelihoodAdvantage), torch.zeros(4, dtype=torch.float64))
    one_good = advantages([0.0] + [-900.0] * 3, GroupLikelihoodAdvantage)
    assert float(one_good[0]) > 800
    torch.testing.assert_close(one_good[1:], torch.full((3,), math.log(3 / 4), dtype=torch.float64))
    assert advantages([-1.0], GroupLikelihoodAdvantage).tolist() == [0.0]


@given(st.lists(st.floats(-30, 0), min_size=2, max_size=6))
@settings(deadline=None, max_examples=50)
def test_jepo_advantage_and_shares_equal_their_definitions(scores):
    size, likelihood = len(scores), [math.exp(s) for s in scores]
    want = [
        math.log(sum(likelihood) / size) - math.log(sum(x for j, x in enumerate(likelihood) if j != i) / (size - 1))
        for i in range(size)
    ]
    got = advantages(scores, GroupLikelihoodAdvantage)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    values = torch.tensor(scores, dtype=torch.float64)
    torch.testing.assert_close(Jepo().shares(values), values.exp() / values.exp().sum())


def scores_of(reward: LikelihoodReward, logprobs, lengths, found=None, without=None) -> torch.Tensor:
    found = torch.tensor(found if found else [True] * len(lengths))
    return reward.scores(tensors(logprobs), torch.tensor(lengths, dtype=torch.float64), found, without)


def test_difference_to_the_answer_without_a_chain_is_clipped():
    # RLPR: clip(with - without, 0, 1).
    difference = AvgProb(answer_gradient=False, subtract_no_chain=True)
    without = torch.tensor([math.log(0.5)], dtype=torch.float64)
    got = scores_of(difference, [[math.log(0.9)], [math.log(0.2)]], [5, 5], without=without)
    torch.testing.assert_close(got, torch.tensor([0.4, 0.0], dtype=torch.float64))
    with pytest.raises(ConfigError, match="clipped"):
        AvgProb(subtract_no_chain=True)


def test_length_reward_is_linear_below_its_target():
    # R_l = r min(|z| - l0, 0).
    got = scores_of(LogProb(length_reward=0.01, length_target=100), [[0.0], [0.0], [0.0]], [40, 100, 900])
    torch.testing.assert_close(got, torch.tensor([-0.6, 0.0, 0.0], dtype=torch.float64))


def test_nover_ranks_perplexity_and_gates_the_format():
    # Chains of 10, 100 and 1000 tokens and one without a place; perplexities e^(2/2), e^(3/3), e^(6/4).
    logprobs = [[-2.0], [-3.0, -3.0], [-6.0], [-0.1]]
    got = scores_of(Nover(), logprobs, [10, 100, 1000, 5], [True, True, True, False])
    # Rank: two share the best (1), the third has n - 2 of n. Efficiency: 10 and 100 beat the 1000 in both.
    want = [1 + 1 + 1 / 2, 1 + 1 + 1 / 2, 1 + 1 / 3 + 0, 0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert scores_of(Nover(), [[-1.0]] * 2, [1, 1], [False, False]).tolist() == [0.0, 0.0]
    assert scores_of(Nover(), [[-1.0]], [1]).tolist() == [2.0]
    with pytest.raises(ConfigError, match="ranks"):
        Nover(answer_gradient=True)


def test_importance_weights_are_those_of_whole_sequences_and_cut():
    current = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([-1.5, -2.5, -0.1], dtype=torch.float64)
    inputs = LossInputs(
        logprobs=current,
        old_logprobs=behavior,
        behavior_logprobs=behavior,
        advantages=torch.tensor([2.0, 2.0, 3.0], dtype=torch.float64),
        sequence=torch.tensor([0, 0, 1]),
        sequences=2,
    )
    ImportanceWeightedLoss(None)(inputs).per_token.sum().backward()
    want = torch.tensor([-2 * math.e, -2 * math.e, -3 * math.exp(-0.4)], dtype=torch.float64)
    torch.testing.assert_close(current.grad, want)
    cut = ImportanceWeightedLoss(2.0)(inputs).per_token
    torch.testing.assert_close(cut.detach()[:2], torch.tensor([2.0 * 2 * 1, 2.0 * 2 * 2], dtype=torch.float64))
