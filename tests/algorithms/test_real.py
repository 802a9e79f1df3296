"""REAL (arXiv 2602.05630): labels, both log-partition functions, the bound on a sequence's gradient, its variants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.algorithms.base import AdvantageInputs
from rlkit.algorithms.losses.real import Real, RealBce, RealProduct
from rlkit.errors import ConfigError

LOSSES = [Real, RealBce, RealProduct]
# Groups of (score, right?); |s| up to 40 at tau 0.1 is a logit of 400, beyond exp in float32 and near it in float64.
GROUPS = st.lists(
    st.lists(st.tuples(st.floats(-40, 40), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
)
TAU = st.sampled_from([0.1, 0.5, 2.0])


def inputs(groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with gradient, the centred advantage of the binary rewards, groups."""
    group = torch.tensor([g for g, one in enumerate(groups) for _ in one])
    scores = torch.tensor([s for one in groups for s, _ in one], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([float(y) for one in groups for _, y in one], dtype=torch.float64)
    centred = AdvantageInputs(scores=rewards, group=group, lengths=torch.ones(len(group)))
    return scores, MeanCentredAdvantage()(centred), group


def value_and_gradient(loss, groups) -> tuple[float, list[float]]:
    scores, advantages, group = inputs(groups)
    out = loss(scores, advantages, group)
    assert out.shape == ()
    return out.item(), torch.autograd.grad(out, scores)[0].tolist()


def lse(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def by_loop(loss, groups) -> float:
    """The definition, group by group and answer by answer."""
    tau, total, answers = loss.tau, 0.0, 0
    for one in groups:
        right, wrong = [s / tau for s, y in one if y], [s / tau for s, y in one if not y]
        if not right or not wrong:
            continue
        answers += len(one)
        if isinstance(loss, RealBce):
            total += sum(lse([0.0, -z]) for z in right) + sum(lse([0.0, z]) for z in wrong)
        elif isinstance(loss, RealProduct):
            total += lse([0.0] + [j - k for k in right for j in wrong])
        else:
            total += lse([0.0] + [-z for z in right]) + lse([0.0, *wrong])
    return total / (max(1, answers) if isinstance(loss, RealBce) else len(groups))


@pytest.mark.parametrize("kind", LOSSES)
@given(GROUPS, TAU)
@settings(max_examples=50, deadline=None)
def test_equals_a_loop_over_groups_and_answers(kind, groups, tau):
    value, _ = value_and_gradient(kind(tau=tau), groups)
    assert value == pytest.approx(by_loop(kind(tau=tau), groups), rel=1e-12, abs=1e-12)


@given(GROUPS, TAU)
@settings(max_examples=50, deadline=None)
def test_weight_of_every_answer_has_the_closed_form_and_is_below_one_over_tau(groups, tau):
    """methods: right (1/tau) e^{-s/tau} / (1 + sum_right e^{-s/tau}), wrong with the other sign; over P."""
    _, gradient = value_and_gradient(Real(tau=tau), groups)
    want = []
    for one in groups:
        for s, y in one:
            sign = -1.0 if y else 1.0
            same = [sign * other / tau for other, label in one if label == y]
            mixed = len(same) < len(one)
            want.append(sign * math.exp(sign * s / tau - lse([0.0, *same])) / tau / len(groups) if mixed else 0.0)
    assert gradient == pytest.approx(want, rel=1e-9, abs=1e-15)
    assert all(abs(g) * len(groups) <= 1 / tau * (1 + 1e-12) for g in gradient)


@pytest.mark.parametrize("kind", LOSSES)
@given(GROUPS, TAU)
@settings(max_examples=40, deadline=None)
def test_gradient_pushes_right_answers_up_and_wrong_ones_down(kind, groups, tau):
    _, gradient = value_and_gradient(kind(tau=tau), groups)
    for (_, y), g in zip([answer for one in groups for answer in one], gradient, strict=True):
        assert math.isfinite(g) and (g <= 0 if y else g >= 0)


def test_gradient_at_the_first_update():
    """s = 0: (1/tau) / (1 + right) and (1/tau) / (1 + wrong), and a loss that says nothing but the counts."""
    groups = [[(0.0, True), (0.0, False), (0.0, False), (0.0, False)], [(0.0, True), (0.0, True), (0.0, False)]]
    value, gradient = value_and_gradient(Real(tau=0.5), groups)
    assert value == pytest.approx((math.log(2) + math.log(4) + math.log(3) + math.log(2)) / 2)
    assert gradient == pytest.approx([-2 / 2 / 2, *[2 / 4 / 2] * 3, *[-2 / 3 / 2] * 2, 2 / 2 / 2])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("extreme", [700.0, 1e6, 1e300])
def test_extreme_scores_overflow_nowhere(kind, extreme):
    worst = [[(-extreme, True), (-extreme, True), (extreme, False), (0.0, False)]]
    value, gradient = value_and_gradient(kind(tau=0.5), worst)
    assert math.isfinite(value) and value > 0
    assert gradient[0] < 0 < gradient[2]
    scale = len(worst[0]) if kind is RealBce else 1
    assert max(map(abs, gradient)) * scale <= 2.0 + 1e-12
    best = [[(extreme, True), (-extreme, False)]]
    value, gradient = value_and_gradient(kind(tau=0.5), best)
    assert value == pytest.approx(0, abs=1e-12) and gradient == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
@given(GROUPS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_does_not_matter(kind, groups, random):
    scores, advantages, group = inputs(groups)
    order = list(range(len(group)))
    random.shuffle(order)
    names = list(range(len(groups)))
    random.shuffle(names)
    loss = kind()
    moved = loss(scores[order], advantages[order], torch.tensor(names)[group[order]])
    straight = loss(scores, advantages, group)
    torch.testing.assert_close(moved, straight, rtol=1e-12, atol=1e-12)
    a, b = (torch.autograd.grad(out, scores, retain_graph=True)[0] for out in (moved, straight))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", LOSSES)
def test_groups_of_one_label_have_no_gradient_and_count_in_the_denominator(kind):
    mixed, dead = [(0.3, True), (-0.2, False)], [(0.7, True), (0.1, True)]
    alone, gradient = value_and_gradient(kind(), [mixed])
    value, both = value_and_gradient(kind(), [mixed, dead, [(1.0, False)], dead])
    prompts = 1 if kind is RealBce else 4  # cross-entropy is a mean over answers of groups with both labels
    assert value == pytest.approx(alone / prompts, rel=1e-12)
    assert both[:2] == pytest.approx([g / prompts for g in gradient], rel=1e-12) and both[2:] == [0.0] * 5


@pytest.mark.parametrize("kind", LOSSES)
def test_no_group_with_both_labels_gives_zero_and_keeps_the_graph(kind):
    value, gradient = value_and_gradient(kind(), [[(0.3, True)], [(0.1, False), (5.0, False)]])
    assert value == 0.0 and gradient == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", LOSSES)
def test_bad_temperature_is_refused(kind):
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="tau"):
            kind(tau=bad)


def test_weight_of_a_rare_right_answer_is_bounded_where_z_scores_grow():
    """One right answer of n: GRPO's advantage grows as sqrt(n), REAL's weight at s = 0 stays (1/tau) / 2."""
    for n in (2, 8, 64):
        _, gradient = value_and_gradient(Real(), [[(0.0, True), *[(0.0, False)] * (n - 1)]])
        assert gradient[0] == pytest.approx(-1.0)
        assert sum(gradient[1:]) == pytest.approx(2 * (n - 1) / n)
