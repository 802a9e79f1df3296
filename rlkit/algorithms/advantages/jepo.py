"""JEPO's advantage: what a sample adds to its group's log-mean-exp of log-likelihoods S (arXiv 2602.03979).

    A_i = [log sum_j exp(S_j) - log G] - [log sum_{j != i} exp(S_j) - log(G - 1)]

Equal S give A = 0; no A is below log((G - 1) / G), and a good chain among useless ones is worth its distance to them.
"""

import math

import torch
from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs


class GroupLikelihoodAdvantage:
    """Of scores that are log-likelihoods; needs groups of 2 or more (in a group of 1, A = 0)."""

    minimum_group_size = 2
    log_scores = True

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        advantages = torch.zeros_like(inputs.scores)
        for own in (inputs.group == number for number in inputs.group.unique()):
            scores, size = inputs.scores[own], int(own.sum())
            if size > 1:
                others = scores.repeat(size, 1).fill_diagonal_(-torch.inf).logsumexp(1)
                advantages[own] = scores.logsumexp(0) - others + math.log((size - 1) / size)
        return advantages
