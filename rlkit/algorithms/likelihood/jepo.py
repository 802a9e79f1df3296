"""JEPO's reward of a whole group (arXiv 2602.03979, eq. 11): a tighter lower bound of log E_z pi(a* | p, z).

    S_i = sum_t l_it,    R_group = log (1 / G) sum_i exp(S_i),    grad R_group = sum_i softmax(S)_i grad S_i

The scores are S_i; `advantages.jepo` makes the advantages of them. Off-policy, the weight of R_group would be the
product of all G chains' weights: only fresh samples.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.algorithms.likelihood.plain import LogProb


@dataclass(frozen=True, slots=True, kw_only=True)
class Jepo(LogProb):
    """S_i, whose gradient has the weight softmax(S)_i within the group."""

    needs_fresh_samples: ClassVar[bool] = True
    log_scores: ClassVar[bool] = True

    def shares(self, scores: Tensor, group: Tensor) -> Tensor:
        """S [N], group [N] -> softmax of S within each group, [N]."""
        mass = torch.stack([scores[group == own].logsumexp(0) for own in group])
        return (scores - mass).exp()
