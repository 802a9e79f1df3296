"""KL estimates against enumerated policies: values and expected gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.base import AdvantageInputs
from rlkit.algorithms.kl import ESTIMATORS, KLInReward, KLPenalty, NoKL, kl_estimate
from rlkit.errors import ConfigError

LOGITS = st.lists(st.floats(-2, 2), min_size=5, max_size=5)


def policies(a, b):
    theta = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor(b, dtype=torch.float64), 0)
    return theta, torch.log_softmax(theta, 0), reference


def expected(logprobs, reference, estimator):
    """E over every action of the policy; the sampling distribution is a constant."""
    return (logprobs.detach().exp() * kl_estimate(logprobs, reference, estimator)).sum()


@given(a=LOGITS, b=LOGITS)
@settings(max_examples=50, deadline=None)
def test_k1_and_k3_are_unbiased_and_k2_is_second_order(a, b):
    _, lp, ref = policies(a, b)
    kl = (lp.exp() * (lp - ref)).sum().item()
    assert expected(lp, ref, "k1").item() == pytest.approx(kl, abs=1e-12)
    assert expected(lp, ref, "k3").item() == pytest.approx(kl, abs=1e-12)
    near = lp.detach() + 1e-3 * (ref - lp.detach())
    near = torch.log_softmax(near, 0)
    small = (near.exp() * (near - lp.detach())).sum().item()
    assert expected(near, lp.detach(), "k2").item() == pytest.approx(small, rel=0.02, abs=1e-12)


@given(a=LOGITS, b=LOGITS)
@settings(max_examples=50, deadline=None)
def test_expected_gradients_are_those_of_the_docstring(a, b):
    theta, lp, ref = policies(a, b)
    zero = torch.zeros_like(theta)
    reverse = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), theta, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - lp)).sum(), theta, retain_graph=True)[0]
    for estimator, want in (("k1", zero), ("k2", reverse), ("k3", forward)):
        got = torch.autograd.grad(expected(lp, ref, estimator), theta, retain_graph=True)[0]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@given(st.lists(st.floats(-60, 0, width=32), min_size=1, max_size=20), st.floats(-3, 3, width=32))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k2_and_k3_are_never_negative_and_zero_at_equality(dtype, logprobs, shift):
    lp = torch.tensor(logprobs, dtype=dtype)
    for scale in (1.0, 1e-3, 1e-6):
        for estimator in ("k2", "k3"):
            assert (kl_estimate(lp, lp + shift * scale, estimator) >= 0).all()
    for estimator in ESTIMATORS:
        assert kl_estimate(lp, lp.clone(), estimator).abs().max() == 0


def test_k3_keeps_its_digits_for_small_log_ratios():
    """exp(d) - 1 - d in float32 would be 0 or noise here; the truth is d^2 / 2."""
    got = kl_estimate(torch.tensor([0.0]), torch.tensor([1e-3]), "k3")
    assert got.item() == pytest.approx(0.5e-6, rel=1e-3)


@pytest.mark.parametrize("gap", [500.0, -500.0])
def test_k3_is_finite_and_flat_beyond_the_limit(gap):
    lp = torch.tensor([-1.0, -1.0 + 1e-9], requires_grad=True)
    out = KLPenalty(coefficient=0.1, log_ratio_limit=8.0)(lp, lp.detach() + gap)
    out.per_token.sum().backward()
    d = torch.tensor(8.0 if gap > 0 else -8.0)
    torch.testing.assert_close(out.metrics["policy/kl_ref"], (d.exp() - 1 - d).expand(2))
    assert lp.grad.tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_coefficient_scales_the_term_and_not_the_metric(estimator):
    g = torch.Generator().manual_seed(0)
    lp = (-torch.rand(6, generator=g)).requires_grad_()
    ref = -torch.rand(6, generator=g)
    one, half = KLPenalty(1.0, estimator)(lp, ref), KLPenalty(0.5, estimator)(lp, ref)
    torch.testing.assert_close(half.per_token, 0.5 * one.per_token)
    torch.testing.assert_close(one.metrics["policy/kl_ref"], one.per_token.detach())
    assert torch.equal(one.metrics["policy/kl_ref"], half.metrics["policy/kl_ref"])
    assert one.per_token.requires_grad and not one.metrics["policy/kl_ref"].requires_grad


def test_no_gradient_reaches_the_reference():
    lp, ref = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    KLPenalty(1.0)(lp, ref).per_token.sum().backward()
    assert ref.grad is None and lp.grad.count_nonzero() == 3


def test_no_kl_is_zero_without_a_reference():
    lp = torch.full((4,), -1.0, requires_grad=True)
    out = NoKL()(lp, lp)
    assert out.per_token.tolist() == [0] * 4 and not out.per_token.requires_grad
    assert not out.metrics and not NoKL.needs_reference and KLPenalty.needs_reference


def test_no_tokens():
    assert KLPenalty(0.1)(torch.zeros(0), torch.zeros(0)).per_token.shape == (0,)


@pytest.mark.parametrize(
    ("settings_", "key"),
    [
        ({"coefficient": -0.1}, "coefficient"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"estimator": "k4"}, "estimator"),
        ({"estimator": "k1", "coefficient": 0.1}, "estimator"),
        ({"log_ratio_limit": 0.0}, "log_ratio_limit"),
    ],
)
def test_bad_settings_are_refused(settings_, key):
    with pytest.raises(ConfigError, match=f"{key} = "):
        KLPenalty(**settings_)


@given(a=LOGITS, b=LOGITS)
@settings(max_examples=30, deadline=None)
def test_k1_in_the_reward_gives_the_gradient_of_the_penalised_objective(a, b):
    """grad (E[R] - c KL(pi, ref)) = E[(R - c (log pi - log ref)) grad log pi], with RLOO over two samples."""
    theta, lp, ref = policies(a, b)
    reward, c = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.2], dtype=torch.float64), 0.3
    objective = (lp.exp() * (reward - c * (lp - ref))).sum()
    (exact,) = torch.autograd.grad(objective, theta, retain_graph=True)
    penalty = KLInReward(coefficient=c)(lp.detach(), ref).per_token
    surrogate = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            scores = (reward - penalty)[torch.tensor([i, j])]
            inputs = AdvantageInputs(scores=scores, group=torch.zeros(2).long(), lengths=torch.ones(2))
            advantages = LeaveOneOutAdvantage()(inputs)
            chance = (lp[i] + lp[j]).detach().exp()
            surrogate = surrogate + chance * (advantages[0] * lp[i] + advantages[1] * lp[j]) / 2
    (found,) = torch.autograd.grad(surrogate, theta)
    torch.testing.assert_close(found, exact, atol=1e-10, rtol=1e-6)
