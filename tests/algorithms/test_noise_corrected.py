"""Corrections of verifier noise (arXiv 2510.00915): unbiased, undone by normalisation, and the estimate of rho1."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import inputs

from rlkit.algorithms.advantages.grpo import GroupNormalizedAdvantage
from rlkit.algorithms.advantages.noise_corrected import Backward, Forward
from rlkit.algorithms.advantages.reinforce_plus_plus import BatchNormalizedAdvantage
from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.base import AdvantageInputs
from rlkit.errors import ConfigError, TrainingError

NAN = float("nan")
RATES = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45))
GROUPS = st.lists(st.lists(st.integers(0, 1).map(float), min_size=1, max_size=6), min_size=1, max_size=5)


def both(rho0: float, rho1: float, **more: object) -> tuple[Backward, Forward]:
    rates = {"false_positive_rate": rho0, "false_negative_rate": rho1}
    return Backward(**rates), Forward(**rates, **more)


@given(GROUPS, RATES, st.floats(0.5, 3.0))
@settings(max_examples=80, deadline=None)
def test_backward_equals_a_loop_with_the_equation(groups, rates, scale):
    rho0, rho1 = rates
    want = []
    for scores in groups:
        hats = [(score - rho0) / (1 - rho0 - rho1) for score in scores]
        for i, hat in enumerate(hats):
            others = hats[:i] + hats[i + 1 :]
            want.append((hat - (sum(others) / len(others) if others else 0.0)) / scale)
    got = Backward(false_positive_rate=rho0, false_negative_rate=rho1, scale=scale)(inputs(groups))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(GROUPS, RATES)
@settings(max_examples=40, deadline=None)
def test_backward_in_groups_of_two_and_more_is_leave_one_out_on_another_scale(groups, rates):
    """The baseline takes rho0's shift out again: a fact of the equation that its users should know."""
    given_ = inputs([[*scores, 1.0] for scores in groups])
    want = LeaveOneOutAdvantage()(given_) / (1 - sum(rates))
    torch.testing.assert_close(both(*rates)[0](given_), want, rtol=1e-9, atol=1e-9)


@given(GROUPS, RATES, st.sampled_from(["one", "sensitivity", "youden"]))
@settings(max_examples=60, deadline=None)
def test_forward_weighs_a_sample_by_its_own_verdict(groups, rates, scale):
    rho0, rho1 = rates
    divisor = {"one": 1.0, "sensitivity": 1 - rho1, "youden": 1 - rho0 - rho1}[scale]
    want = [(rho1 if score else rho1 - 1) / divisor for scores in groups for score in scores]
    got = both(rho0, rho1, scale=scale)[1](inputs(groups))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_forwards_dead_groups_push_and_no_false_negatives_train_on_failures_only():
    got = both(0.1, 0.2)[1](inputs([[0.0, 0.0], [1.0, 1.0]]))
    assert got.tolist() == pytest.approx([-0.8, -0.8, 0.2, 0.2])
    assert both(0.1, 0.0)[1](inputs([[0.0, 1.0]])).tolist() == [-1.0, 0.0]


def exact_gradient(truth: torch.Tensor, logprobs: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((logprobs.exp() * truth).sum(), theta, retain_graph=True)[0]


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize(("rho0", "rho1"), [(0.1, 0.2), (0.2, 0.4), (0.0, 0.3)])
def test_expected_gradients_over_samples_and_errors_are_exact(samples, rho0, rho1):
    """Every group of a bandit with four arms and every pattern of errors, weighed by its probability.

    backward: the gradient of E[R*]; forward: times 1 - rho0 - rho1, which s = youden takes away; and so for leave-one-
    out on the noisy scores: with such errors it is short of scale only.
    """
    torch.manual_seed(0)
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)
    truth = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    logprobs = torch.log_softmax(theta, 0)
    exact = exact_gradient(truth, logprobs, theta)
    backward, forward = both(rho0, rho1)
    youden = 1 - rho0 - rho1
    candidates = [(backward, 1.0), (forward, youden), (both(rho0, rho1, scale="youden")[1], 1.0)]
    if samples > 1:
        candidates.append((LeaveOneOutAdvantage(), youden))
    for advantage, scale in candidates:
        surrogate = torch.zeros((), dtype=torch.float64)
        for arms in itertools.product(range(4), repeat=samples):
            chosen = list(arms)
            for verdicts in itertools.product((0.0, 1.0), repeat=samples):
                said_right = [1 - rho1 if truth[arm] else rho0 for arm in chosen]
                errors = math.prod(p if v else 1 - p for p, v in zip(said_right, verdicts, strict=True))
                probability = errors * logprobs.detach()[chosen].sum().exp()
                surrogate = surrogate + probability * (advantage(inputs([list(verdicts)])) * logprobs[chosen]).mean()
        got = torch.autograd.grad(surrogate, theta, retain_graph=True)[0]
        torch.testing.assert_close(got, scale * exact, rtol=0, atol=1e-12)


def test_sampled_gradients_agree_with_the_exact_one_within_four_standard_errors():
    """Monte Carlo, 20,000 groups of 8; as a check of the check, the uncorrected scores do not agree."""
    torch.manual_seed(0)
    rho0, rho1, groups, size = 0.1, 0.2, 20_000, 8
    theta = torch.tensor([0.3, -0.5, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    truth = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    logprobs = torch.log_softmax(theta, 0)
    exact = exact_gradient(truth, logprobs, theta)
    probabilities = logprobs.detach().exp()
    arms = torch.multinomial(probabilities, groups * size, replacement=True)
    said_right = torch.where(truth[arms] == 1, 1 - rho1, rho0)
    scores = torch.bernoulli(said_right)
    given_ = AdvantageInputs(
        scores=scores, group=torch.arange(groups).repeat_interleave(size), lengths=torch.ones_like(scores)
    )
    gradients = torch.eye(4, dtype=torch.float64)[arms] - probabilities  # of the sampled arm's log-prob
    backward, forward = both(rho0, rho1, scale="youden")

    def z_scores(advantage) -> torch.Tensor:
        estimates = (advantage(given_)[:, None] * gradients).reshape(groups, size, 4).mean(1)
        return (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(groups))

    for corrected in (backward, forward):
        assert float(z_scores(corrected).abs().max()) < 4
    assert float(z_scores(LeaveOneOutAdvantage()).abs().max()) > 10


@given(GROUPS, st.floats(0.2, 5.0), st.floats(-2.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_normalising_undoes_any_correction_of_the_scores(groups, slope, shift):
    """Why the correction is an advantage: before a z-score it is a no-op, of a group or of a batch."""
    plain, mapped = inputs(groups), inputs([[slope * s + shift for s in scores] for scores in groups])
    for normalised in (GroupNormalizedAdvantage(epsilon=0.0), BatchNormalizedAdvantage(epsilon=0.0)):
        torch.testing.assert_close(normalised(mapped), normalised(plain), rtol=1e-6, atol=1e-6)


def test_metrics_tell_what_the_correction_does():
    given_ = inputs([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    backward, forward = (advantage.observe(given_) for advantage in both(0.1, 0.2))
    assert backward["advantage/correction/cosine"] == pytest.approx(1.0)
    assert backward["advantage/correction/max_absdiff"] == pytest.approx(1 / 0.7 - 1)
    corrected, plain = both(0.1, 0.2)[1](given_), LeaveOneOutAdvantage()(given_)
    cosine = torch.nn.functional.cosine_similarity(corrected, plain, dim=0)
    assert forward["advantage/correction/cosine"] == pytest.approx(float(cosine))
    assert 0 < forward["advantage/correction/cosine"] < 1
    assert forward["advantage/correction/max_absdiff"] == pytest.approx(float((corrected - plain).abs().max()))
    assert forward["advantage/correction/false_negative_rate"] == 0.2
    dead = both(0.1, 0.2)[0].observe(inputs([[1.0, 1.0]]))
    assert "advantage/correction/cosine" not in dead
    assert both(0.0, 0.0)[0].observe(given_)["advantage/correction/max_absdiff"] == 0.0


def test_other_scores_are_refused():
    for advantage in both(0.1, 0.2):
        with pytest.raises(TrainingError, match=r"scores = \[0.01\].*(?s:.)*0 or 1"):
            advantage.observe(inputs([[1.0, 0.0, 0.01]]))


@pytest.mark.parametrize("component", [Backward, Forward])
def test_rates_that_cannot_be_corrected_are_refused(component):
    for bad in (
        {"false_positive_rate": 0.5, "false_negative_rate": 0.5},
        {"false_positive_rate": -0.1, "false_negative_rate": 0.5},
        {"false_negative_rate": 1.2},
        {"false_negative_rate": None},
    ):
        with pytest.raises(ConfigError, match="false_"):
            component(**bad)


def simulated(truth_rate: float, rho0: float, rho1: float, fraction: float, count: int, seed: int) -> AdvantageInputs:
    """Verdicts of a noisy rule, and of perfect appeals on a fraction of its negatives."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(3, count, dtype=torch.float64, generator=generator)
    truth = u[0] < truth_rate
    scores = torch.where(truth, u[1] >= rho1, u[1] < rho0).double()
    appeal = torch.where((scores == 0) & (u[2] < fraction), truth.double(), NAN)
    return AdvantageInputs(
        scores=scores, group=torch.arange(count) // 8, lengths=torch.ones_like(scores), parts={"appeal": appeal}
    )


@pytest.mark.parametrize("truth_rate", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(("rho0", "rho1"), [(0.0, 0.1), (0.1, 0.2), (0.2, 0.4)])
def test_the_estimate_converges_to_the_share_of_misses_among_all_it_counts(truth_rate, rho0, rho1):
    """The limit is a rho1 / (a + (1 - a) rho0), a the true pass rate: exact without false positives, else too low."""
    size, fraction = 400_000, 0.1
    advantage = Forward(estimate="appeal", decay=0.0)
    advantage.observe(simulated(truth_rate, rho0, rho1, fraction, size, seed=3))
    limit = truth_rate * rho1 / (truth_rate + (1 - truth_rate) * rho0)
    assert limit == pytest.approx(rho1) if rho0 == 0 else limit < rho1
    # Delta method for FN = wrong * overturned / asked; the counts of right and wrong add at most 1 / sqrt(size).
    wrong = truth_rate * rho1 + (1 - truth_rate) * (1 - rho0)
    share = truth_rate * rho1 / wrong
    right = 1 - wrong
    asked_error = math.sqrt(share * (1 - share) / (size * wrong * fraction))
    error = wrong * asked_error * right / (truth_rate * rho1 + right) ** 2 + 1 / math.sqrt(size)
    assert 4 * error < 0.03
    assert advantage.rho1 == pytest.approx(limit, abs=4 * error)


def test_the_running_average_converges_over_many_small_steps():
    """60 steps of 1,024 samples at the paper's q = 0.1 and decay 0.9: within 0.03, which is two standard errors."""
    advantage = Forward(estimate="appeal")
    for step in range(60):
        advantage.observe(simulated(0.4, 0.1, 0.2, 0.1, 1024, seed=step))
    assert advantage.rho1 == pytest.approx(0.4 * 0.2 / (0.4 + 0.6 * 0.1), abs=0.03)


def test_one_step_of_the_estimate_by_hand():
    """4 wrong, 2 asked, 1 overturned: FN = 2; 2 right; (2 + a) / (2 + 2 + 2a)."""
    given_ = inputs([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]], appeal=[1.0, 0.0, NAN, NAN, NAN, NAN])
    share = (2 + 1e-5) / (4 + 2e-5)
    fresh = Backward(false_positive_rate=0.1, estimate="appeal")
    fresh.observe(given_)
    assert fresh.rho1 == pytest.approx(share)
    started = Backward(false_positive_rate=0.1, false_negative_rate=0.3, estimate="appeal")
    assert started.observe(given_)["advantage/correction/false_negative_rate"] == pytest.approx(0.27 + 0.1 * share)
    expected = (given_.scores - 0.1) / (0.9 - started.rho1)
    torch.testing.assert_close(started(given_), (expected - expected.mean()) * 6 / 5)
    # the same evidence where the score was put right after the appeal (Appeals with flip)
    flipped = inputs([[1.0, 0.0, 0.0, 0.0, 1.0, 1.0]], appeal=[1.0, 0.0, NAN, NAN, NAN, NAN])
    again = Backward(estimate="appeal")
    again.observe(flipped)
    assert again.rho1 == pytest.approx(share)


@pytest.mark.parametrize(
    ("scores", "appeal"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.0, NAN]),  # nothing right and nothing overturned: a / 2a would say 0.5
        ([0.0, 0.0, 1.0], [NAN, NAN, NAN]),  # nothing asked: would say 0
    ],
)
def test_a_step_without_evidence_leaves_the_estimate(scores, appeal):
    for start in (None, 0.25):
        advantage = Forward(false_negative_rate=start, estimate="appeal")
        advantage.observe(inputs([scores], appeal=appeal))
        assert advantage.rho1 == (start or 0.0) and advantage.state == {}


def test_where_nothing_is_wrong_nothing_is_missed():
    advantage = Forward(false_negative_rate=0.5, estimate="appeal")
    advantage.observe(inputs([[1.0, 1.0]], appeal=[NAN, NAN]))
    assert advantage.rho1 == pytest.approx(0.45, abs=1e-5)


def test_an_estimate_near_one_keeps_the_divisor_away_from_zero():
    all_missed = inputs([[0.0, 0.0]], appeal=[1.0, 1.0])
    for advantage in (Backward(false_positive_rate=0.2, estimate="appeal"), Forward(scale="youden", estimate="appeal")):
        advantage.observe(all_missed)
        assert advantage.rho1 > 0.99 and advantage(all_missed).isfinite().all()
        assert float(advantage(all_missed).abs().max()) <= 1.2 / 0.05


def test_going_on_from_the_state_as_json_equals_going_on():
    steps = [simulated(0.4, 0.1, 0.2, 0.1, 256, seed=s) for s in range(6)]
    whole, first, second = (Forward(estimate="appeal") for _ in range(3))
    for step in steps:
        whole.observe(step)
    for step in steps[:3]:
        first.observe(step)
    second.state.update(json.loads(json.dumps(first.state)))
    for step in steps[3:]:
        second.observe(step)
    assert second.state == whole.state and whole.state
