"""RLOO's leave-one-out advantage (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7).

    A_i = R_i - mean of the other samples' scores = n / (n - 1) (R_i - mean_g R)

for n scored samples: the baseline does not depend on sample i, so E[grad A_i log pi(o_i)] is that of E[R], for any n.
"""

from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, centred_scores


class LeaveOneOutAdvantage:
    """Sums to 0 in every group; needs groups of 2 or more (in a group of 1, A = 0)."""

    minimum_group_size = 2
    centred_in_group = True

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        centred, sizes = centred_scores(inputs)
        sizes = sizes.to(centred)
        return centred * (sizes / (sizes - 1).clamp_min(1))[inputs.group]
