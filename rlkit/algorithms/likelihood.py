"""Likelihood rewards: how probable the policy finds the reference answer a* behind a sampled chain of thought z.

With l_t = log pi(a*_t | p, z, a*_<t), teacher-forced, at the sampling temperature, and R(theta) a function of them:

    J = E_z[R(theta)],    grad J = E_z[(R - c) grad log pi(z | p) + grad R]

for any c that does not depend on z ("Likelihood-Based Reward Designs for General LLM Reasoning", arXiv 2602.03979,
eq. 4 and 20). The first term is a policy gradient whose score is R, the second the learner adds (`answer_gradient`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkit.errors import ConfigError
from rlkit.settings import Checked, choice, number


class LikelihoodReward(Checked, kw_only=True):
    """What all of them share; a method gives `reward`, or overrides `compared`.

    The chain is cut behind the first `delimiter`; `opening`, the reference and `closing` are tokenised by themselves
    and appended, and all of their tokens count. (The defaults are VeriFree's: no usual vocabulary has a token `r>`.)
    """

    needs_fresh_samples = False  # as of a loss
    log_scores = False  # the scores are log-likelihoods, for an advantage that averages likelihoods
    under_reference = False  # scored under the reference model, where algorithm.kl holds one
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
        super().__post_init__()
        if not self.delimiter:
            raise ConfigError("the chain has no end", key="delimiter", value="", expected='text, e.g. "<answer"')
        if self.subtract_no_chain and self.answer_gradient:
            problem, fix = "the difference is clipped: it has no gradient", "set answer_gradient=false, as RLPR"
            raise ConfigError(problem, key="answer_gradient", value=True, fix=fix)

    def reward(self, logprobs: Tensor) -> Tensor:
        """R of one chain, differentiable, from its answer's logprobs [m], m > 0."""
        raise NotImplementedError

    def scores(
        self, answers: Sequence[Tensor], lengths: Tensor, found: Tensor, without_chain: Tensor | None = None
    ) -> Tensor:
        """What takes a verifier's place, [n]: R of a prompt's n chains, less that without a chain, plus the length's.

        answers: log-probs [m] of the reference behind every chain, of a uniform guess where it has no place;
        lengths [n] of the chains in tokens; found [n]: has a place; without_chain [m]: behind an empty chain.
        """
        scores = self.compared(answers, lengths, found)
        if without_chain is not None:
            scores = (scores - self.reward(without_chain)).clamp(0, 1)
        return scores + self.length_reward * (lengths - self.length_target).clamp(max=0)

    def compared(self, answers: Sequence[Tensor], lengths: Tensor, found: Tensor) -> Tensor:
        """R [n] of all chains of a prompt."""
        return torch.stack([self.reward(logprobs) for logprobs in answers])

    def shares(self, scores: Tensor) -> Tensor:
        """Coefficients [n] of a prompt's grad R_i: 1, or a sample's share of a group's reward."""
        return torch.ones_like(scores)


class LogProb(LikelihoodReward):
    """The answer's log-probability, <= 0 (eq. 7 to 10, as the next three); grad R is that of fine-tuning on it."""

    def reward(self, logprobs: Tensor) -> Tensor:
        return logprobs.sum()


class AvgLogProb(LikelihoodReward):
    """The answer's log-probability a token, <= 0."""

    def reward(self, logprobs: Tensor) -> Tensor:
        return logprobs.mean()


class Prob(LikelihoodReward):
    """The answer's probability (VeriFree): what a 0/1 reward expects of a sampled answer; vanishes for long ones."""

    def reward(self, logprobs: Tensor) -> Tensor:
        return logprobs.sum().exp()


class AvgProb(LikelihoodReward):
    """Mean probability of the answer's tokens (RLPR)."""

    def reward(self, logprobs: Tensor) -> Tensor:
        return logprobs.exp().mean()


class Jepo(LogProb):
    """JEPO's reward of a whole group (eq. 11), a tighter lower bound of log E_z pi(a* | p, z).

        S_i = sum_t l_it,    R_group = log (1 / G) sum_i exp(S_i),    grad R_group = sum_i softmax(S)_i grad S_i

    The scores are S_i; `GroupLikelihoodAdvantage` makes the advantages of them. Off-policy, the weight of R_group would
    be the product of all G chains' weights: only fresh samples.
    """

    needs_fresh_samples = True
    log_scores = True

    def shares(self, scores: Tensor) -> Tensor:
        return scores.softmax(0)


class Nover(LikelihoodReward):
    """NOVER (arXiv 2505.16022): ranks of the reference's perplexity, and shorter chains where they are better.

        ppl_i        = exp( -mean_t l_it / max(1, 1 + log10 |z_i|) )
        reasoning_i  = (n - #{j : ppl_j < ppl_i}) / n
        efficiency_i = #{j : |z_j| > |z_i| and ppl_j > ppl_i} / (n - 1)
        R_i          = format_weight + reasoning_weight * reasoning_i + efficiency_weight * efficiency_i

    over the n chains of a group that have a place for the answer; the others have R = 0 (the format gate). Constants
    and definitions are those of the authors' code; equal perplexities share the better rank here. Scored under the
    reference model where `algorithm.kl` holds one, as theirs, and under the current policy otherwise.
    """

    under_reference = True
    answer_gradient: bool = False
    format_weight: float = number(1.0, 0)
    reasoning_weight: float = number(1.0, 0)
    efficiency_weight: float = number(1.0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_gradient or self.subtract_no_chain:
            expected = "this and subtract_no_chain false: ranks have no gradient"
            raise ConfigError("not for ranks", key="answer_gradient", value=self.answer_gradient, expected=expected)

    def compared(self, answers: Sequence[Tensor], lengths: Tensor, found: Tensor) -> Tensor:
        likelihood = torch.stack([logprobs.mean() for logprobs in answers])
        perplexity = (-likelihood / (1 + lengths.log10()).clamp_min(1)).exp()
        beats = found[:, None] & found & (perplexity[:, None] < perplexity)  # [n, n]: row beats column
        n = int(found.sum())
        reasoning = 1 - beats.sum(0) / max(n, 1)
        efficiency = (beats & (lengths[:, None] < lengths)).sum(1) / max(n - 1, 1)
        weighed = self.format_weight + self.reasoning_weight * reasoning + self.efficiency_weight * efficiency
        return (found * weighed).to(lengths)
