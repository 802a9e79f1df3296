"""JEPO's advantage: what a sample adds to its group's log-mean-exp (arXiv 2602.03979, section on JEPO).

    A_i = [log sum_j exp(S_j) - log G] - [log sum_{j != i} exp(S_j) - log(G - 1)]

of log-likelihoods S. Equal S give A = 0. It is > 0 for a sample above the others' mean likelihood and never below
log((G - 1) / G): a useless chain costs little, a good one among useless ones is worth its distance to them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs


@dataclass(frozen=True, slots=True)
class GroupLikelihoodAdvantage:
    """R(all G) - R(the others), both log-mean-exps; needs groups of 2 or more (in a group of 1, A = 0)."""

    minimum_group_size: ClassVar[int] = 2
    log_scores: ClassVar[bool] = True

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N] log-likelihoods, group [N] -> advantages [N]."""
        advantages = torch.zeros_like(inputs.scores)
        for group in inputs.group.unique():
            own = (inputs.group == group).nonzero().squeeze(1)
            scores, size = inputs.scores[own], torch.tensor(float(len(own)), dtype=torch.float64)
            if len(own) > 1:
                others = scores.repeat(len(own), 1).fill_diagonal_(-torch.inf).logsumexp(1)
                advantages[own] = scores.logsumexp(0) - size.log() - others + (size - 1).log()
        return advantages
