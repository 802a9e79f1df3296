"""REINFORCE++'s batch-normalised advantage (Hu et al. 2025, arXiv 2501.03262), and its baseline form.

    x_i = R_i                    REINFORCE++: one sample a prompt is enough
    x_i = R_i - mean_g R         REINFORCE++-baseline
    A_i = (x_i - m) / sqrt(v + epsilon)

with mean m and unbiased variance v over all loss TOKENS of the step: a sequence of length l counts l times. A step
whose x are all equal has A = 0 exactly.
"""

import torch
from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, centred_scores
from rlkit.settings import Checked, number


class BatchNormalizedAdvantage(Checked):
    """Scores whitened over the step's tokens."""

    minimum_group_size = 1
    epsilon: float = number(1e-8, 0, 1)

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores [N], lengths [N] -> advantages [N]; their mean over tokens is 0."""
        values, lengths = self.baselined(inputs), inputs.lengths
        if not len(values) or bool((values == values[0]).all()):
            return torch.zeros_like(values)
        tokens = lengths.sum()
        centred = values - (values * lengths).sum() / tokens
        variance = (centred.square() * lengths).sum() / (tokens - 1).clamp_min(1)
        return centred / (variance + self.epsilon).sqrt()

    def baselined(self, inputs: AdvantageInputs) -> Tensor:
        """x [N]."""
        return inputs.scores


class BatchNormalizedGroupBaselineAdvantage(BatchNormalizedAdvantage):
    """Scores centred on their group's mean, then whitened over the step's tokens."""

    minimum_group_size = 2

    def baselined(self, inputs: AdvantageInputs) -> Tensor:
        return centred_scores(inputs)[0]
