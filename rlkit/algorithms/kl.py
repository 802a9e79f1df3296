"""Penalty against a reference model: three per-token estimates of KL(pi || ref), see `ESTIMATORS`.

d = ref_logprob - logprob, at a token sampled from pi (Schulman 2020, "Approximating KL Divergence"): k1 and k3 are
unbiased, k2 and k3 >= 0. As a loss on such tokens, in expectation (stale tokens bias each by the ratio, which is not
applied here), grad k1 is 0: only noise, refused as a penalty; grad k2 = -d grad logprob is that of KL(pi || ref), and
grad k3 = (1 - exp(d)) grad logprob, GRPO's, that of KL(ref || pi), equal to first order near pi = ref.

In k3, d is clamped to [-log_ratio_limit, log_ratio_limit] before exp: finite, with gradient 0 beyond.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rlkit.algorithms.base import LossOutput
from rlkit.errors import ConfigError
from rlkit.settings import Checked, choice, number

# Name -> estimate of (d [n], d clamped [n]); exp(d) - 1 - d would lose every digit of a small d.
ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda d, _: -d,
    "k2": lambda d, _: 0.5 * d.square(),
    "k3": lambda _, clamped: torch.expm1(clamped) - clamped,
}
NOISE_AS_LOSS = frozenset({"k1"})  # estimates whose gradient has expectation 0


class KL(Protocol):
    """A term added to the per-token loss or, summed over a sequence's tokens, taken off its score."""

    needs_reference: ClassVar[bool]  # the learner must load a reference model and give its log-probs
    in_reward: ClassVar[bool]

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> LossOutput:
        """Both [n]; returns the term of every token [n] and its metrics."""


class NoKL:
    """No penalty and no reference model: zeros without gradient, no metrics."""

    needs_reference: ClassVar[bool] = False
    in_reward: ClassVar[bool] = False

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> LossOutput:
        return LossOutput(per_token=torch.zeros_like(logprobs, requires_grad=False))


class KLPenalty(Checked):
    """coefficient * estimate, per token; with coefficient 0 it only measures. ConfigError for k1 as a penalty."""

    needs_reference: ClassVar[bool] = True
    in_reward: ClassVar[bool] = False
    coefficient: float = number(0.0, 0)
    estimator: str = choice("k3", "k1", "k2")
    log_ratio_limit: float = number(10.0, 0.01)  # nats

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator in NOISE_AS_LOSS and self.coefficient > 0 and not self.in_reward:
            fix = "estimator=k2 has the gradient of the same KL; k1 belongs in the reward (KLInReward)"
            problem = "as a loss, its expected gradient is 0"
            raise ConfigError(problem, key="estimator", value=self.estimator, fix=fix)

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> LossOutput:
        """Both [n] in nats, the reference constant; policy/kl_ref [n] is without the coefficient."""
        estimate = kl_estimate(logprobs, reference_logprobs, self.estimator, self.log_ratio_limit)
        return LossOutput(per_token=self.coefficient * estimate, metrics={"policy/kl_ref": estimate.detach()})


class KLInReward(KLPenalty):
    """R_i - coefficient * sum_t estimate_it takes the place of the score R_i, before the advantage.

    The estimate is of the sampling policy (its own log-probs) against the reference, a constant: with k1 its sum
    is log pi(o_i) - log ref(o_i), and the expected gradient that of E[R] - coefficient KL(pi || ref) exactly
    (RLOO, arXiv 2402.14740, and REINFORCE++, arXiv 2501.03262, take it so). Reported rewards are without it.
    """

    in_reward: ClassVar[bool] = True
    estimator: str = choice("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str, log_ratio_limit: float = 10.0) -> Tensor:
    """k1, k2 or k3 of every token [n], in nats; no gradient to the reference. KeyError for another estimator."""
    difference = reference_logprobs.detach() - logprobs
    return ESTIMATORS[estimator](difference, difference.clamp(-log_ratio_limit, log_ratio_limit))
