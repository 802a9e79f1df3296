"""Likelihood rewards: how probable the policy finds the reference answer a* behind a sampled chain of thought z.

With l_t = log pi(a*_t | p, z, a*_<t), teacher-forced, at the sampling temperature, and R(theta) a function of them:

    J = E_z[R(theta)],    grad J = E_z[(R - c) grad log pi(z | p) + grad R]

for any c that does not depend on z ("Likelihood-Based Reward Designs for General LLM Reasoning", arXiv 2602.03979,
eq. 4 and 20). The first term is a policy gradient whose score is R, the second the learner adds (`answer_gradient`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.errors import ConfigError
from rlkit.settings import Checked, choice, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The reference answers behind a step's N chains; m answer tokens end to end."""

    logprobs: Tensor  # [m] float64, l_t; -log V, a uniform guess, where the chain has no place for an answer
    sequence: Tensor  # [m] int64, 0 <= sequence < N
    group: Tensor  # [N] int64, which prompt a chain belongs to
    lengths: Tensor  # [N] float64, tokens of the chain, its delimiter included
    found: Tensor  # [N] bool, whether the chain has a place for the answer
    without_chain: Tensor | None = None  # [N] reward of the answer behind an empty chain


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodReward(Checked):
    """What all of them share; a method gives `reward`, or overrides `scores`.

    The chain is cut behind the first `delimiter`; `opening`, the reference and `closing` are tokenised by themselves
    and appended, and all of their tokens count. (The defaults are VeriFree's: no token of the usual vocabularies holds
    `r>`, so that chain and answer meet at a token boundary.)
    """

    needs_fresh_samples: ClassVar[bool] = False  # as of a loss
    log_scores: ClassVar[bool] = False  # the scores are log-likelihoods, for an advantage that averages likelihoods
    under_reference: ClassVar[bool] = False  # scored under the reference model, where algorithm.kl holds one
    weight: float = number(1.0)
    delimiter: str = "<answer"
    opening: str = ">"
    closing: str = "</answer>"
    missing: str = choice("floor", "drop")  # without a place for the answer: a uniform guess's reward, or no score
    answer_gradient: bool = True
    # Off-policy, grad R is weighed by pi(z) / mu(z), at most this much; null is exact, and of unbounded variance.
    max_importance_weight: float | None = number(2.0, 1)
    # R - R of the reference behind `empty_chain` and the delimiter, clipped to [0, 1] (RLPR).
    subtract_no_chain: bool = False
    empty_chain: str = ""
    # + length_reward * min(|z| - length_target, 0): keeps chains from shrinking.
    length_reward: float = number(0.0)
    length_target: int = number(300, 0)

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if not self.delimiter:
            raise ConfigError("the chain has no end", key="delimiter", value="", expected='text, e.g. "<answer"')
        if self.subtract_no_chain and self.answer_gradient:
            problem, fix = "the difference is clipped: it has no gradient", "set answer_gradient=false, as RLPR"
            raise ConfigError(problem, key="answer_gradient", value=True, fix=fix)

    def reward(self, logprobs: Tensor, sequence: Tensor, count: int) -> Tensor:
        """logprobs [m], sequence [m] -> R [count], differentiable, finite also for a sequence without tokens."""
        raise NotImplementedError

    def scores(self, answers: Answers) -> Tensor:
        """What takes a verifier's place, [N]: R, less the one without a chain, plus the length's."""
        found = self.reward(answers.logprobs, answers.sequence, len(answers.group))
        if answers.without_chain is not None:
            found = (found - answers.without_chain).clamp(0, 1)
        return found + self.length_reward * (answers.lengths - self.length_target).clamp(max=0)

    def shares(self, scores: Tensor, group: Tensor) -> Tensor:
        """Coefficient [N] of grad R_i: 1, or a sample's share of a group's reward."""
        return torch.ones_like(scores)
