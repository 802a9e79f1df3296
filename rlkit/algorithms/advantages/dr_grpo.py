"""Dr. GRPO's advantage: centred on the group mean, not divided (Liu et al. 2025, arXiv 2503.20783).

    A_i = R_i - mean_g R

Paired with a constant denominator, `aggregation.ConstantLength`. RLOO's advantage is n / (n - 1) times this one.
"""

from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, centred_scores


class MeanCentredAdvantage:
    """Sums to 0 in every group; needs groups of 2 or more (a group of 1 has A = 0)."""

    minimum_group_size = 2
    centred_in_group = True

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        return centred_scores(inputs)[0]
