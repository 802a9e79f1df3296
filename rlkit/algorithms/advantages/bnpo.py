"""BNPO, Beta normalization policy optimization (arXiv 2506.02864); TRL's loss_type="bnpo" is something else.

    p_g = mean of group g's scores; m, s2 = mean and unbiased variance of p over the step's groups
    k = m (1 - m) / s2 - 1,    alpha = max(1 + k m / 3, 1),    beta = max(1 + k (1 - m) / 3, 1)
    A_i = (R_i - p_g) / f(p_g),    f the density of Beta(alpha, beta)

alpha = beta = 1 is REINFORCE with the group's mean as baseline, 3/2 is GRPO times pi / 8.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlkit.algorithms.base import AdvantageInputs, centred_scores, group_mean
from rlkit.errors import ConfigError, TrainingError
from rlkit.settings import Checked, number


class Bnpo(Checked):
    """Scores from `low` to `high` are mapped to [0, 1], others and NaN refused (TrainingError); p is their mean.

    rewards: the rewards whose advantages, each under its own alpha and beta, are averaged; none: the total score's.
    maximum_weight: clamp of 1 / f, which is infinite where p is 0 or 1 (A is exactly 0 there, as in a group of 1).
    """

    minimum_group_size = 2
    needs_verdicts = True
    rewards: Sequence[str] = ()
    low: float = number(0.0)
    high: float = number(1.0)
    maximum_weight: float = number(1e6, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise ConfigError("no room", key="low, high", value=(self.low, self.high), expected="low < high")

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """scores or parts [N], group [N] -> advantages [N]; sums to 0 in every group."""
        chosen = [inputs.parts[name] for name in self.rewards] or [inputs.scores]
        return torch.stack([self._advantages(values, inputs) for values in chosen]).mean(dim=0)

    def _advantages(self, values: Tensor, inputs: AdvantageInputs) -> Tensor:
        outside = ~((values >= self.low) & (values <= self.high))
        if outside.any():
            found, bounds = values[outside][:3].tolist(), f"algorithm.advantage.low to high: {self.low} to {self.high}"
            raise TrainingError("out of bounds", key="scores", value=found, expected=bounds)
        scores = (values - self.low) / (self.high - self.low)
        centred, sizes = centred_scores(replace(inputs, scores=scores))
        rates = group_mean(scores, inputs.group, len(sizes)).clamp(0, 1)
        return centred * inverse_density(rates, *prior(rates)).clamp_max(self.maximum_weight)[inputs.group]


def prior(rates: Tensor) -> tuple[float, float]:
    """(alpha, beta) of the groups' rates [groups]; (1, 1) for one group, for equal rates and for s2 >= m (1 - m)."""
    if len(rates) < 2 or (variance := float(rates.var())) <= 1e-12:  # what rounding leaves of equal ones
        return 1.0, 1.0
    mean = float(rates.mean())
    k = mean * (1 - mean) / variance - 1
    return max(1 + k * mean / 3, 1.0), max(1 + k * (1 - mean) / 3, 1.0)


def inverse_density(rates: Tensor, alpha: float, beta: float) -> Tensor:
    """1 / f of rates [groups]; infinite where f is 0."""
    log_density: Tensor = torch.distributions.Beta(*rates.new_tensor([alpha, beta])).log_prob(rates)
    return (-log_density).exp()
