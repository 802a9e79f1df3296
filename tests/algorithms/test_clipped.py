"""The clipped surrogate: PPO (arXiv 1707.06347, eq. 7), clip-higher (2503.14476), dual clip (1912.09729, eq. 5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.algorithms.base import LossInputs
from rlkit.algorithms.losses.clipped import ClippedLoss
from rlkit.errors import ConfigError

TOKENS = st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2)), min_size=1, max_size=12)
LOSSES = (ClippedLoss(), ClippedLoss(clip_low=0.2, clip_high=0.28), ClippedLoss(dual_clip=3.0))


def run(loss: ClippedLoss, tokens: list[tuple[float, float, float]]):
    current, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    current.requires_grad_()
    out = loss(
        LossInputs(
            logprobs=current,
            old_logprobs=old,
            behavior_logprobs=old,
            advantages=advantages,
            sequence=torch.zeros(len(tokens), dtype=torch.int64),
            sequences=1,
        )
    )
    return current, out


@given(TOKENS)
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_equation_token_by_token(loss, tokens):
    _, out = run(loss, tokens)
    for got, (current, old, a) in zip(out.per_token.tolist(), tokens, strict=True):
        r = math.exp(current - old)
        want = -min(r * a, min(max(r, 1 - loss.clip_low), 1 + loss.clip_high) * a)
        if loss.dual_clip is not None and a < 0:
            want = min(want, -loss.dual_clip * a)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_one_the_gradient_is_the_policy_gradient_and_nothing_is_clipped(loss):
    tokens = [(-0.5, -0.5, 1.5), (-2.0, -2.0, -0.7), (-1.0, -1.0, 0.0)]
    current, out = run(loss, tokens)
    gradient = torch.autograd.grad(out.per_token.sum(), current)[0]
    assert gradient.tolist() == pytest.approx([-1.5, 0.7, 0.0])
    assert all(float(out.metrics[f"policy/clip_frac/{side}"].sum()) == 0 for side in ("low", "high"))


def test_the_gradient_stops_only_on_the_side_the_advantage_pushes_to():
    grown, shrunk = (-0.1, -1.0), (-1.0, -0.1)
    for (current, old), a, stopped in ((grown, 1, True), (grown, -1, False), (shrunk, -1, True), (shrunk, 1, False)):
        logprobs, out = run(ClippedLoss(), [(current, old, a)])
        gradient = torch.autograd.grad(out.per_token.sum(), logprobs)[0]
        assert (gradient.item() == 0) is stopped
        clipped = out.metrics["policy/clip_frac/high"] + out.metrics["policy/clip_frac/low"]
        assert bool(clipped.item()) is stopped


def test_dual_clip_bounds_a_bad_token_with_a_huge_ratio():
    _, plain = run(ClippedLoss(), [(0.0, -10.0, -1.0)])
    _, dual = run(ClippedLoss(dual_clip=3.0), [(0.0, -10.0, -1.0)])
    assert plain.per_token.item() > 1e4 and dual.per_token.item() == pytest.approx(3.0)


@pytest.mark.parametrize("bad", [{"clip_low": -0.1}, {"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ClippedLoss(**bad)
