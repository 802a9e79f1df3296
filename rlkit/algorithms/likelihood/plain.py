"""Rewards of one chain by itself (arXiv 2602.03979, eq. 7 to 10), of the answer's log-probs l_t in nats.

LogProb     R = sum_t l_t                  grad R is that of fine-tuning on (p, z, a*)
AvgLogProb  R = (1 / |a*|) sum_t l_t
Prob        R = exp(sum_t l_t)             VeriFree; a 0/1 reward's expectation over a sampled answer
AvgProb     R = (1 / |a*|) sum_t exp(l_t)  RLPR
"""

from dataclasses import dataclass

from torch import Tensor

from rlkit.algorithms.base import group_mean, group_sum
from rlkit.algorithms.likelihood.base import LikelihoodReward


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProb(LikelihoodReward):
    """The answer's log-probability, <= 0."""

    def reward(self, logprobs: Tensor, sequence: Tensor, count: int) -> Tensor:
        return group_sum(logprobs, sequence, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class AvgLogProb(LikelihoodReward):
    """The answer's log-probability a token, <= 0."""

    def reward(self, logprobs: Tensor, sequence: Tensor, count: int) -> Tensor:
        return group_mean(logprobs, sequence, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prob(LikelihoodReward):
    """The answer's probability; vanishes for long answers."""

    def reward(self, logprobs: Tensor, sequence: Tensor, count: int) -> Tensor:
        return group_sum(logprobs, sequence, count).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class AvgProb(LikelihoodReward):
    """Mean probability of the answer's tokens."""

    def reward(self, logprobs: Tensor, sequence: Tensor, count: int) -> Tensor:
        return group_mean(logprobs.exp(), sequence, count)
