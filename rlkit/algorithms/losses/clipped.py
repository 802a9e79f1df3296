"""PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), per token.

    r = exp(logprob - old_logprob)
    L = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

Clip-higher (DAPO, arXiv 2503.14476) is clip_high > clip_low, 0.28 against 0.2. Dual clip (Ye et al. 2019, arXiv
1912.09729, eq. 5): where A < 0, L = min(L, -dual_clip A); often 3 to 10. The log-ratio is clamped to [-20, 20]
before exp: the loss stays finite, with gradient 0 beyond.
"""

import torch
from torch import Tensor

from rlkit.algorithms.base import LossInputs, LossOutput
from rlkit.settings import Checked, number

LOG_RATIO_LIMIT = 20.0


class ClippedLoss(Checked):
    """Clip range [1 - clip_low, 1 + clip_high]; `dual_clip` None is off."""

    proportional_to_advantage = True
    clip_low: float = number(0.2, 0, 1)
    clip_high: float = number(0.2, 0)
    dual_clip: float | None = number(None, 1.01)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]; metrics policy/clip_frac/{low,high} and the k3 estimate policy/kl_old."""
        advantages = inputs.advantages
        log_ratio, ratio = clamped_ratio(inputs.logprobs, inputs.old_logprobs)
        loss, metrics = surrogate(ratio, advantages, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -self.dual_clip * advantages), loss)
        kl_old = (ratio - 1 - log_ratio).detach()
        return LossOutput(per_token=loss, metrics=metrics | {"policy/kl_old": kl_old})


def surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-r A, -clip(r) A) and whether the clip took the gradient away, all [n]."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-ratio * advantages, -clipped * advantages), {
        "policy/clip_frac/low": ((advantages < 0) & (ratio < 1 - clip_low)).float(),
        "policy/clip_frac/high": ((advantages > 0) & (ratio > 1 + clip_high)).float(),
    }


def clamped_ratio(logprobs: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(log ratio clamped to LOG_RATIO_LIMIT, ratio), both [n]."""
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio, log_ratio.exp()
