"""From token losses to one loss: the weight of each sequence's tokens in an update.

    loss = sum_i w_i sum_t m_it L_it,    |o_i| = sum_t m_it

with m the loss mask, L the per-token loss and B = #{i : |o_i| > 0} over ALL sequences of the optimiser step:

    TokenMean              w_i = 1 / sum_j |o_j|
    SequenceMeanTokenMean  w_i = 1 / (B |o_i|)
    SequenceMeanTokenSum   w_i = 1 / B
    ConstantLength         w_i = 1 / (B max_length)
    PromptMean             w_i = 1 / (G sum_{j of i's group} |o_j|),   G = number of groups with tokens

A fully masked sequence has weight 0 and is not in B; one whose advantage is 0 counts with its length.

Sources: original GRPO is SequenceMeanTokenMean (Shao et al. 2024, arXiv 2402.03300, eq. 3), DAPO is TokenMean (Yu et
al. 2025, arXiv 2503.14476, eq. 8), Dr. GRPO is ConstantLength (Liu et al. 2025, arXiv 2503.20783).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rlkit.algorithms.base import group_sum
from rlkit.settings import Checked, number


class TokenMean:
    """Every token of the step counts the same: long sequences weigh more."""

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: o.sum())


class SequenceMeanTokenMean:
    """Every sequence counts the same: a token of a long sequence weighs less."""

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: b * o)


class SequenceMeanTokenSum:
    """The sequence's summed loss, averaged over sequences: the plain policy gradient's scale."""

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: b)


class ConstantLength(Checked):
    """SequenceMeanTokenSum divided by a constant, so that no length is preferred (Dr. GRPO)."""

    # Tokens, `${rollout.max_completion_tokens}` in a recipe: sets the scale only, bounds nothing.
    max_length: int = number(dataclasses.MISSING, 1)

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: b * self.max_length)


class PromptMean:
    """Every prompt counts the same, however many samples it was given; its tokens share that weight."""

    needs_groups = True

    def __call__(self, lengths: Tensor, group: Tensor) -> Tensor:
        """group [N]: any number that tells the prompts apart."""
        place = group.unique(return_inverse=True)[1]
        tokens = group_sum(lengths.double(), place, len(group))  # [N]; 0 beyond the last group
        return _weights(lengths, lambda o, b: (tokens > 0).sum() * tokens[place])


def _weights(lengths: Tensor, denominator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """lengths [N] -> w [N] float64: 1 / denominator(lengths, B), 0 for no tokens."""
    counts = lengths.detach().to(torch.float64)
    kept = counts > 0
    divisor = denominator(counts, kept.sum().to(torch.float64)).expand_as(counts)
    return torch.where(kept, 1.0 / divisor.masked_fill(~kept, 1.0), 0.0)
