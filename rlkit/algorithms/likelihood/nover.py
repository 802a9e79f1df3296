"""NOVER's reward (arXiv 2505.16022): ranks of the reference's perplexity, and shorter chains where they are better.

    ppl_i        = exp( -mean_t l_it / max(1, 1 + log10 |z_i|) )
    reasoning_i  = (n - #{j : ppl_j < ppl_i}) / n
    efficiency_i = #{j : |z_j| > |z_i| and ppl_j > ppl_i} / (n - 1)
    R_i          = format_weight + reasoning_weight * reasoning_i + efficiency_weight * efficiency_i

over the n chains of a group that have a place for the answer; the others have R = 0 (the format gate). Constants and
definitions are those of the authors' code; equal perplexities share the better rank here. Scored under the reference
model where `algorithm.kl` holds one, as theirs, and under the current policy otherwise. No gradient through the answer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.algorithms.base import group_mean
from rlkit.algorithms.likelihood.base import Answers, LikelihoodReward
from rlkit.errors import ConfigError
from rlkit.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class Nover(LikelihoodReward):
    """Rank of the perplexity + efficiency + format, within the group."""

    under_reference: ClassVar[bool] = True
    answer_gradient: bool = False
    format_weight: float = number(1.0, 0)
    reasoning_weight: float = number(1.0, 0)
    efficiency_weight: float = number(1.0, 0)

    def __post_init__(self) -> None:
        LikelihoodReward.__post_init__(self)
        if self.answer_gradient or self.subtract_no_chain:
            expected = "this and subtract_no_chain false: ranks have no gradient"
            raise ConfigError("not for ranks", key="answer_gradient", value=self.answer_gradient, expected=expected)

    def scores(self, answers: Answers) -> Tensor:
        """[N], in [0, sum of the weights] before the length's."""
        found, length = answers.found, answers.lengths
        likelihood = group_mean(answers.logprobs, answers.sequence, len(found))
        perplexity = (-likelihood / (1 + length.log10()).clamp_min(1)).exp()
        scores = torch.zeros_like(perplexity)
        for number_of_group in answers.group.unique():
            own = found & (answers.group == number_of_group)
            ppl, tokens, n = perplexity[own], length[own], int(own.sum())
            better = ppl[:, None] < ppl
            reasoning, efficiency = (
                1 - better.sum(0) / max(n, 1),
                (better & (tokens[:, None] < tokens)).sum(1) / max(n - 1, 1),
            )
            total = self.format_weight + self.reasoning_weight * reasoning + self.efficiency_weight * efficiency
            scores[own] = total.to(scores)
        return scores + self.length_reward * (length - self.length_target).clamp(max=0)
