"""REINFORCE (Williams 1992): the plain policy gradient, without a ratio.

    L = -A logprob

The gradient is that of the expected reward only for tokens of the current weights: nothing corrects a stale one.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlkit.algorithms.base import LossInputs, LossOutput


@dataclass(frozen=True, slots=True)
class PolicyGradientLoss:
    """-A logprob, per token; for one update a step on samples of the current weights."""

    needs_fresh_samples: ClassVar[bool] = True
    proportional_to_advantage: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]."""
        return LossOutput(per_token=-inputs.advantages * inputs.logprobs)
