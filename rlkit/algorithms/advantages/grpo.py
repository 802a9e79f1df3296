"""GRPO's group-normalised advantage (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    A_i = (R_i - mean_g R) / (std_g R + epsilon)

over the samples of one prompt, with the unbiased standard deviation (n - 1). A group of equal scores has A = 0 exactly.
"""

from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, centred_scores, group_sum
from rlkit.settings import Checked, number


class GroupNormalizedAdvantage(Checked):
    """Sums to 0 in every group; needs groups of 2 or more."""

    minimum_group_size = 2
    centred_in_group = True
    epsilon: float = number(1e-6, 0, 1)

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        centred, sizes = centred_scores(inputs)
        variance = group_sum(centred.square(), inputs.group, len(sizes)) / (sizes - 1).clamp_min(1)
        normalised = centred / (variance.sqrt()[inputs.group] + self.epsilon)
        return normalised.masked_fill(centred == 0, 0.0)  # 0 / 0 of a constant group, where epsilon is 0
