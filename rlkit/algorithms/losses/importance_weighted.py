"""REINFORCE with the importance weight of whole sequences: exact off-policy, where it is not cut.

    w_i = min(exp(sum_t (logprob_it - behavior_logprob_it)), max_weight),    L_it = -sg[w_i] A_i logprob_it

With max_weight null the expected gradient over samples of mu is the policy gradient of pi; the weights' variance grows
exponentially with length, hence the cut, which biases towards mu.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlkit.algorithms.base import LossInputs, LossOutput, group_sum
from rlkit.algorithms.losses.clipped import LOG_RATIO_LIMIT
from rlkit.settings import Checked, number


@dataclass(frozen=True, slots=True)
class ImportanceWeightedLoss(Checked):
    """-w A logprob, per token; `max_weight` null does not cut."""

    proportional_to_advantage: ClassVar[bool] = True
    max_weight: float | None = number(2.0, 1)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]; metrics is/weight/mean."""
        weight = sequence_weights(inputs, self.max_weight)[inputs.sequence]
        return LossOutput(per_token=-weight * inputs.advantages * inputs.logprobs, metrics={"is/weight/mean": weight})


def sequence_weights(inputs: LossInputs, limit: float | None) -> Tensor:
    """pi(o) / mu(o) of every sequence, [sequences], at most `limit`, without gradient."""
    log_ratio = group_sum(inputs.logprobs.detach() - inputs.behavior_logprobs, inputs.sequence, inputs.sequences)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=limit or math.inf)
