"""RLOO, REINFORCE++, GSPO, CISPO: their equations (cited in the modules) and expected gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.algorithms.advantages.grpo import GroupNormalizedAdvantage
from rlkit.algorithms.advantages.reinforce_plus_plus import (
    BatchNormalizedAdvantage,
    BatchNormalizedGroupBaselineAdvantage,
)
from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.aggregation import SequenceMeanTokenMean, SequenceMeanTokenSum
from rlkit.algorithms.base import AdvantageInputs, LossInputs
from rlkit.algorithms.losses.cispo import ClippedImportanceLoss
from rlkit.algorithms.losses.clipped import ClippedLoss
from rlkit.algorithms.losses.gspo import SequenceClippedLoss
from rlkit.algorithms.losses.policy_gradient import PolicyGradientLoss
from rlkit.errors import ConfigError

SCORES = st.lists(st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=5), min_size=1, max_size=4)
SEQUENCES = st.lists(
    st.tuples(st.floats(-2, 2), st.lists(st.tuples(st.floats(-2.5, 0), st.floats(-2.5, 0)), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)
LOSSES = (
    PolicyGradientLoss(),
    ClippedLoss(),
    ClippedLoss(dual_clip=3.0),
    ClippedImportanceLoss(),
    SequenceClippedLoss(),
)


def advantage_inputs(groups: list[list[float]], lengths: list[int] | None = None) -> AdvantageInputs:
    flat = [(score, number) for number, scores in enumerate(groups) for score in scores]
    return AdvantageInputs(
        scores=torch.tensor([s for s, _ in flat], dtype=torch.float64),
        group=torch.tensor([g for _, g in flat]),
        lengths=torch.tensor(lengths or [1 + i % 3 for i in range(len(flat))], dtype=torch.float64),
    )


def loss_inputs(sequences, current: torch.Tensor) -> LossInputs:
    """sequences: [(advantage, [(logprob, old), ...]), ...]; current [n] takes the place of the log-probs."""
    owner = [i for i, (_, tokens) in enumerate(sequences) for _ in tokens]
    old = torch.tensor([b for _, tokens in sequences for _, b in tokens], dtype=torch.float64)
    return LossInputs(
        logprobs=current,
        old_logprobs=old,
        behavior_logprobs=old,
        advantages=torch.tensor([sequences[i][0] for i in owner], dtype=torch.float64),
        sequence=torch.tensor(owner),
        sequences=len(sequences),
    )


@given(SCORES)
@settings(max_examples=60, deadline=None)
def test_rloo_is_the_difference_to_the_mean_of_the_others(groups):
    want = [s - (sum(scores) - s) / (len(scores) - 1) for scores in groups for s in scores]
    given_ = advantage_inputs(groups)
    got = LeaveOneOutAdvantage()(given_)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    sizes = torch.bincount(given_.group)[given_.group]
    torch.testing.assert_close(got, MeanCentredAdvantage()(given_) * sizes / (sizes - 1), rtol=1e-12, atol=1e-12)


@given(SCORES)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("centre", [False, True])
def test_reinforce_plus_plus_whitens_over_tokens(centre, groups):
    given_ = advantage_inputs(groups)
    got = (BatchNormalizedGroupBaselineAdvantage if centre else BatchNormalizedAdvantage)()(given_)
    x = [s - (sum(scores) / len(scores) if centre else 0.0) for scores in groups for s in scores]
    tokens = torch.tensor(
        [v for v, n in zip(x, given_.lengths.int().tolist(), strict=True) for _ in range(n)], dtype=torch.float64
    )
    spread = float(tokens.max() - tokens.min())
    if spread < 1e-12:
        assert (got.abs() < 1e-6).all()
        return
    want = (torch.tensor(x, dtype=torch.float64) - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert float((got * given_.lengths).sum()) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: type(x).__name__)
def test_expected_gradient_with_rloo_is_the_policy_gradient_at_ratio_one(loss):
    """Enumerated policy over sequences of two tokens, groups of two: exact to 1e-12, scale 1.

    GSPO's documented scale is 1 / |o|: its sequence mean has the mean token's gradient.
    """
    torch.manual_seed(1)
    theta = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)  # row 0: first token; then by the first
    rewards = torch.rand(3, 3, dtype=torch.float64)
    logp = torch.log_softmax(theta, 1)
    sequences = list(itertools.product(range(3), repeat=2))

    def tokens_of(sequence):
        return torch.stack([logp[0, sequence[0]], logp[(sequence[0] + 1) % 3, sequence[1]]])

    value = sum(tokens_of(s).sum().exp() * rewards[s] for s in sequences)
    exact = torch.autograd.grad(value, theta, retain_graph=True)[0]
    sequence_level = isinstance(loss, SequenceClippedLoss)
    weights = (SequenceMeanTokenMean if sequence_level else SequenceMeanTokenSum)()(torch.tensor([2.0, 2.0]))
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(sequences, repeat=2):
        advantage = LeaveOneOutAdvantage()(advantage_inputs([[float(rewards[s]) for s in pair]]))
        current = torch.cat([tokens_of(s) for s in pair])
        plain = [
            (float(a), [(0.0, float(x)) for x in tokens_of(s).detach()]) for a, s in zip(advantage, pair, strict=True)
        ]
        out = loss(loss_inputs(plain, current))
        probability = current.detach().sum().exp()
        total = total + probability * (out.per_token * weights.repeat_interleave(2)).sum()
    gradient = -torch.autograd.grad(total, theta)[0]
    torch.testing.assert_close(gradient * (2.0 if sequence_level else 1.0), exact, rtol=0, atol=1e-12)


@given(SEQUENCES)
@settings(max_examples=80, deadline=None)
def test_gspo_equals_a_loop_over_sequences(sequences):
    loss = SequenceClippedLoss(clip_low=0.1, clip_high=0.3)
    current = torch.tensor([a for _, tokens in sequences for a, _ in tokens], dtype=torch.float64, requires_grad=True)
    out = loss(loss_inputs(sequences, current))
    values, gradients = [], []
    for advantage, tokens in sequences:
        s = math.exp(sum(a - b for a, b in tokens) / len(tokens))
        values += [max(-s * advantage, -min(max(s, 0.9), 1.3) * advantage)] * len(tokens)
        stopped = (advantage > 0 and s > 1.3) or (advantage < 0 and s < 0.9)
        gradients += [0.0 if stopped else -s * advantage] * len(tokens)
    torch.testing.assert_close(out.per_token.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(out.per_token.sum(), current)[0]
    torch.testing.assert_close(got, torch.tensor(gradients, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(SEQUENCES)
@settings(max_examples=80, deadline=None)
def test_cispo_keeps_a_bounded_gradient_on_every_token(sequences):
    loss = ClippedImportanceLoss(clip_low=0.4, clip_high=0.5)
    current = torch.tensor([a for _, tokens in sequences for a, _ in tokens], dtype=torch.float64, requires_grad=True)
    out = loss(loss_inputs(sequences, current))
    want = [-min(max(math.exp(a - b), 0.6), 1.5) * adv for adv, tokens in sequences for a, b in tokens]
    got = torch.autograd.grad(out.per_token.sum(), current)[0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_gspo_on_one_token_is_ppos_clip():
    sequences = [(1.0, [(-0.5, -0.9)]), (-1.0, [(-0.5, -0.4)])]
    current = torch.tensor([-0.5, -0.5], dtype=torch.float64)
    a = SequenceClippedLoss(clip_low=0.2, clip_high=0.2)(loss_inputs(sequences, current))
    b = ClippedLoss()(loss_inputs(sequences, current))
    torch.testing.assert_close(a.per_token, b.per_token)


@pytest.mark.parametrize("loss", [ClippedImportanceLoss, SequenceClippedLoss])
def test_bounds_out_of_range_are_refused(loss):
    for bad in ({"clip_low": -0.1}, {"clip_low": 1.1}, {"clip_high": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            loss(**bad)


ADVANTAGES = [
    MeanCentredAdvantage(),
    GroupNormalizedAdvantage(),
    LeaveOneOutAdvantage(),
    BatchNormalizedAdvantage(),
    BatchNormalizedGroupBaselineAdvantage(),
]


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=lambda x: type(x).__name__)
@given(st.lists(st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_groups_of_any_sizes_side_by_side_have_finite_advantages(advantage, groups):
    got = advantage(advantage_inputs(groups))
    assert bool(torch.isfinite(got).all())
    if not isinstance(advantage, BatchNormalizedAdvantage):  # those shift a batch to mean 0
        parts = got.split([len(g) for g in groups])
        assert all(bool((a == 0).all()) for a, g in zip(parts, groups, strict=True) if len(set(g)) == 1)
