"""REINFORCE (Williams 1992): the plain policy gradient, and the same with the importance weight of whole sequences.

    L = -A logprob                  PolicyGradientLoss
    L = -sg[w] A logprob            ImportanceWeightedLoss
    w = min(exp(sum_t (logprob_t - behavior_logprob_t)), max_weight)

The first is the gradient of the expected reward for tokens of the current weights only, the second for samples of any
policy mu, where max_weight is null; the variance of w grows exponentially with length, hence the cut.
"""

import math

from torch import Tensor

from rlkit.algorithms.base import LossInputs, LossOutput, group_sum
from rlkit.algorithms.losses.clipped import LOG_RATIO_LIMIT
from rlkit.settings import Checked, number


class PolicyGradientLoss:
    """-A logprob, per token; for one update a step on samples of the current weights."""

    needs_fresh_samples = True
    proportional_to_advantage = True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(per_token=-inputs.advantages * inputs.logprobs)


class ImportanceWeightedLoss(Checked):
    """-w A logprob, per token; `max_weight` null does not cut."""

    proportional_to_advantage = True
    max_weight: float | None = number(2.0, 1)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]; metrics is/weight/mean."""
        weight = sequence_weights(inputs, self.max_weight)[inputs.sequence]
        return LossOutput(per_token=-weight * inputs.advantages * inputs.logprobs, metrics={"is/weight/mean": weight})


def sequence_weights(inputs: LossInputs, limit: float | None) -> Tensor:
    """pi(o) / mu(o) of every sequence, [sequences], at most `limit`, without gradient."""
    log_ratio = group_sum(inputs.logprobs.detach() - inputs.behavior_logprobs, inputs.sequence, inputs.sequences)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=limit or math.inf)
