"""Advantages of a sample within its group, the samples of one prompt.

    GroupNormalizedAdvantage   A_i = (R_i - mean_g R) / (std_g R + epsilon)
    MeanCentredAdvantage       A_i = R_i - mean_g R
    LeaveOneOutAdvantage       A_i = R_i - mean of the others = n / (n - 1) (R_i - mean_g R)
    GroupLikelihoodAdvantage   A_i = [log sum_j exp(R_j) - log n] - [log sum_{j != i} exp(R_j) - log(n - 1)]

GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2) divides by the unbiased standard deviation (n - 1): up to
epsilon, no increasing affine map of a group's scores changes A, and reward corrections of that kind are undone.

Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) does not: it would weigh very easy and very hard prompts up. Its loss has a
constant denominator, `aggregation.ConstantLength`.

RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7), for n scored samples: the baseline does not depend on sample i, so
E[grad A_i log pi(o_i)] is that of E[R], for any n.

JEPO (arXiv 2602.03979): what a sample adds to its group's log-mean-exp, R being log-likelihoods. No A is below
log((n - 1) / n), and a good chain among useless ones is worth its distance to them.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, centred_scores, group_sum
from rlkit.settings import Checked, number


@dataclass(frozen=True, slots=True)
class MeanCentredAdvantage(Checked):
    """A_i = R_i - group mean; needs groups of 2 or more (a group of 1, or of equal scores, has A = 0 exactly)."""

    minimum_group_size: ClassVar[int] = 2
    centred_in_group: ClassVar[bool] = True

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N], group [N] -> advantages [N]; sums to 0 in every group."""
        return self.scaled(*centred_scores(inputs), inputs.group)

    def scaled(self, centred: Tensor, sizes: Tensor, group: Tensor) -> Tensor:
        """centred scores [N], sizes [groups], group [N] -> advantages [N]."""
        return centred


@dataclass(frozen=True, slots=True)
class GroupNormalizedAdvantage(MeanCentredAdvantage):
    """A_i = (R_i - mean) / (std + epsilon) within the group."""

    epsilon: float = number(1e-6, 0, 1)

    def scaled(self, centred: Tensor, sizes: Tensor, group: Tensor) -> Tensor:
        variance = group_sum(centred.square(), group, len(sizes)) / (sizes - 1).clamp_min(1)
        normalised = centred / (variance.sqrt()[group] + self.epsilon)
        return normalised.masked_fill(centred == 0, 0.0)  # 0 / 0 of a constant group, where epsilon is 0


@dataclass(frozen=True, slots=True)
class LeaveOneOutAdvantage(MeanCentredAdvantage):
    """A_i = R_i - mean of the others."""

    def scaled(self, centred: Tensor, sizes: Tensor, group: Tensor) -> Tensor:
        sizes = sizes.to(centred)
        return centred * (sizes / (sizes - 1).clamp_min(1))[group]


@dataclass(frozen=True, slots=True)
class GroupLikelihoodAdvantage:
    """R(all G) - R(the others), both log-mean-exps; needs groups of 2 or more (in a group of 1, A = 0)."""

    minimum_group_size: ClassVar[int] = 2
    log_scores: ClassVar[bool] = True

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N] log-likelihoods, group [N] -> advantages [N]."""
        advantages = torch.zeros_like(inputs.scores)
        for own in (inputs.group == g for g in inputs.group.unique()):
            scores, size = inputs.scores[own], int(own.sum())
            if size > 1:
                others = scores.repeat(size, 1).fill_diagonal_(-torch.inf).logsumexp(1)
                advantages[own] = scores.logsumexp(0) - others + math.log((size - 1) / size)
        return advantages
