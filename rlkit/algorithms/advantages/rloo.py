"""RLOO's leave-one-out advantage (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7).

    A_i = R_i - mean of the other samples' scores = n / (n - 1) (R_i - mean_g R)

for a prompt with n scored samples. The baseline of sample i does not depend on it, so the expected
gradient of A_i log pi(o_i) is that of E[R] exactly, whatever n is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, constant_groups, group_count, group_mean, group_sum


@dataclass(frozen=True, slots=True)
class LeaveOneOutAdvantage:
    """A_i = R_i - mean of the others; needs groups of 2 or more (in a group of 1, A = 0)."""

    minimum_group_size: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N], group [N] -> advantages [N]; sums to 0 in every group."""
        scores, group = inputs.scores, inputs.group
        count = group_count(group)
        sizes = group_sum(scores.new_ones(len(scores)), group, count)
        centred = scores - group_mean(scores, group, count)[group]
        advantages = centred * (sizes / (sizes - 1).clamp_min(1))[group]
        return advantages.masked_fill(constant_groups(scores, group, count)[group], 0.0)
