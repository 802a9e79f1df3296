"""GSPO: a ratio of whole sequences (Zheng et al. 2025, arXiv 2507.18071, eq. 7; token form eq. 14).

    s_i   = exp( (1 / |o_i|) sum_t (logprob_it - old_logprob_it) )
    s_it  = sg[s_i] exp(logprob_it - sg[logprob_it])
    L_it  = max(-s_it A_i, -clip(s_it, 1 - clip_low, 1 + clip_high) A_i)

Every token has its sequence's ratio and is clipped or not together with it. With SequenceMeanTokenMean
sum_t L_it / |o_i| is the paper's sequence loss. The mean makes the ratio tighter by about |o_i|, hence the bounds.
"""

import torch

from rlkit.algorithms.base import LossInputs, LossOutput, group_mean
from rlkit.algorithms.losses.clipped import LOG_RATIO_LIMIT, surrogate
from rlkit.settings import Checked, number


class SequenceClippedLoss(Checked):
    """Clip range [1 - clip_low, 1 + clip_high] of the sequence's ratio."""

    proportional_to_advantage = True
    clip_low: float = number(3e-4, 0, 1)
    clip_high: float = number(4e-4, 0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]; metrics policy/clip_frac/{low,high} and the k3 estimate policy/kl_old."""
        logprobs = inputs.logprobs
        log_ratio = logprobs.detach() - inputs.old_logprobs
        mean = group_mean(log_ratio, inputs.sequence, inputs.sequences)[inputs.sequence]
        ratio = mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * (logprobs - logprobs.detach()).exp()
        loss, metrics = surrogate(ratio, inputs.advantages, self.clip_low, self.clip_high)
        kl_old = torch.expm1(log_ratio.clamp(max=LOG_RATIO_LIMIT)) - log_ratio
        return LossOutput(per_token=loss, metrics=metrics | {"policy/kl_old": kl_old})
