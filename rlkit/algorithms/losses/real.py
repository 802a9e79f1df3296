"""REAL, rewards as labels: telling a prompt's right answers from its wrong ones is classification (arXiv 2602.05630).

    s_k = mean_t (logprob_kt - old_logprob_kt),    z_k = s_k / tau
    L_g = log(1 + sum_{k right} exp(-z_k)) + log(1 + sum_{k wrong} exp(z_k))
    loss = sum_g L_g / P

over the P prompts of the update; the 1 is an anchor with logit 0. A group of one label has L_g = 0 and counts in P.
Right: advantage > 0, which for binary rewards and a group-centred advantage is R = 1; of other rewards, what is above
the group's mean. No clipping: |dL_g/ds_k| is 1 / tau times a share of a softmax, so below 1 / tau however far s goes.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rlkit.algorithms.base import group_sum
from rlkit.settings import Checked, number


class Real(Checked):
    """Both sides of a group against the anchor; tau is the temperature of the logits."""

    whole_groups = True
    tau: float = number(0.5, 0.001)

    def __call__(self, scores: Tensor, advantages: Tensor, group: Tensor) -> Tensor:
        """scores [N], advantages [N], group [N] in 0..P-1 -> scalar; 0 with gradient 0 if no group has both labels."""
        right = advantages > 0
        prompts = int(group.max()) + 1
        answers, rights = (group_sum(x.to(scores), group, prompts) for x in (torch.ones_like(right), right))
        mixed = (rights > 0) & (rights < answers)
        kept = mixed[group]
        # Only groups with both labels are left, numbered 0..M-1; a sum over none of them keeps the graph.
        return self.of_mixed((scores / self.tau)[kept], right[kept], (mixed.cumsum(0) - 1)[group[kept]], prompts)

    def of_mixed(self, logits: Tensor, right: Tensor, group: Tensor, prompts: int) -> Tensor:
        """The loss, of the groups that have both labels."""
        below, above = logsumexp(-logits[right], group[right], 0.0), logsumexp(logits[~right], group[~right], 0.0)
        return (below + above).sum() / prompts


class RealBce(Real):
    """Every answer on its own: binary cross-entropy of z_k, mean over the answers of groups with both labels."""

    def of_mixed(self, logits: Tensor, right: Tensor, group: Tensor, prompts: int) -> Tensor:
        return binary_cross_entropy_with_logits(logits, right.to(logits), reduction="sum") / max(1, len(logits))


class RealProduct(Real):
    """L_g = log(1 + sum_{k right} sum_{j wrong} exp(z_j - z_k)): pairs, without an anchor (the paper's ablation)."""

    def of_mixed(self, logits: Tensor, right: Tensor, group: Tensor, prompts: int) -> Tensor:
        pairs = logsumexp(-logits[right], group[right]) + logsumexp(logits[~right], group[~right])
        return pairs.logaddexp(torch.zeros_like(pairs)).sum() / prompts


def logsumexp(values: Tensor, group: Tensor, anchor: float = -torch.inf) -> Tensor:
    """log(exp(anchor) + sum of exp(values) within each group 0..M-1), [M]; every group has a value."""
    count = int(group.max()) + 1 if len(group) else 0
    top = torch.full((count,), anchor, dtype=values.dtype).scatter_reduce(0, group, values.detach(), "amax")
    return top + ((anchor - top).exp() + group_sum((values - top[group]).exp(), group, count)).log()
