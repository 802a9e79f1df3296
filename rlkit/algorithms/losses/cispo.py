"""CISPO: clipped importance weights on REINFORCE (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    w = sg[clip(r, 1 - clip_low, 1 + clip_high)],    L = -w A logprob

with r = exp(logprob - old_logprob) and sg a stop-gradient: the weight is bounded, and every token keeps its gradient.
The upper bound of 5 is ScaleRL's (arXiv 2510.13786).
"""

import torch

from rlkit.algorithms.base import LossInputs, LossOutput
from rlkit.algorithms.losses.clipped import clamped_ratio
from rlkit.settings import Checked, number


class ClippedImportanceLoss(Checked):
    """Importance weight within [1 - clip_low, 1 + clip_high]."""

    proportional_to_advantage = True
    clip_low: float = number(1.0, 0, 1)
    clip_high: float = number(4.0, 0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]; metrics policy/clip_frac/{low,high} and the k3 estimate policy/kl_old."""
        log_ratio, ratio = clamped_ratio(inputs.logprobs.detach(), inputs.old_logprobs)
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        metrics = {
            "policy/clip_frac/low": (ratio < 1 - self.clip_low).float(),
            "policy/clip_frac/high": (ratio > 1 + self.clip_high).float(),
            "policy/kl_old": torch.expm1(log_ratio) - log_ratio,
        }
        return LossOutput(per_token=-weight * inputs.advantages * inputs.logprobs, metrics=metrics)
