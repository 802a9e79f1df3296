"""From token losses to one loss: the weight w_i of each sequence's tokens in an update.

    loss = sum_i w_i sum_t m_it L_it,    |o_i| = sum_t m_it

with m the loss mask, L the per-token loss and B = #{i : |o_i| > 0} over ALL sequences of the optimiser step. A fully
masked sequence has weight 0 and is not in B; one whose advantage is 0 counts with its length.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rlkit.algorithms.base import group_sum
from rlkit.settings import Checked, number


class TokenMean:
    """w_i = 1 / sum_j |o_j|: every token of the step counts the same (DAPO, arXiv 2503.14476, eq. 8)."""

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: o.sum())


class SequenceMeanTokenMean:
    """w_i = 1 / (B |o_i|): every sequence counts the same (original GRPO, arXiv 2402.03300, eq. 3)."""

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: b * o)


class SequenceMeanTokenSum:
    """w_i = 1 / B: the sequence's summed loss, averaged over sequences: the plain policy gradient's scale."""

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: b)


class ConstantLength(Checked):
    """w_i = 1 / (B max_length), so that no length is preferred (Dr. GRPO, arXiv 2503.20783)."""

    # Tokens, `${rollout.max_completion_tokens}` in a recipe: sets the scale only, bounds nothing.
    max_length: int = number(dataclasses.MISSING, 1)

    def __call__(self, lengths: Tensor) -> Tensor:
        return _weights(lengths, lambda o, b: b * self.max_length)


class PromptMean:
    """w_i = 1 / (G sum_{j of i's group} |o_j|), G groups with tokens: every prompt counts the same."""

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
