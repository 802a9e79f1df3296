"""Losses of a clipped importance ratio r = exp(logprob - old_logprob), per token; sg is a stop-gradient.

PPO's surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), `ClippedLoss`:

    L = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

    clip-higher (DAPO, arXiv 2503.14476): clip_high > clip_low, 0.28 against 0.2.
    dual clip (Ye et al. 2019, arXiv 1912.09729, eq. 5): A < 0: L = min(L, -dual_clip A); dual_clip is often 3 to 10.

GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 7; token form eq. 14), `SequenceClippedLoss`, the same with

    s_it = sg[s_i] exp(logprob_it - sg[logprob_it]),    s_i = exp( (1 / |o_i|) sum_t (logprob_it - old_logprob_it) )

in the place of r: every token has its sequence's ratio, the geometric mean over tokens, and is clipped or not together
with it. The mean makes the ratio tighter by about |o_i|: the published bounds are 3e-4 and 4e-4, not 0.2. Pair it with
SequenceMeanTokenMean, with which sum_t L_it / |o_i| is the paper's sequence loss.

CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5), `ClippedImportanceLoss`, clips the weight of REINFORCE:

    L = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob

The weight is bounded, and every token keeps its gradient. In practice there is no lower bound (clip_low = 1) and a
generous upper one, near 5 in ScaleRL (arXiv 2510.13786).

Log-ratios are clamped to [-20, 20] before exp: the loss stays finite, with gradient 0 beyond.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.algorithms.base import LossInputs, LossOutput, group_mean
from rlkit.settings import Checked, number

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class ClippedLoss(Checked):
    """Clip range [1 - clip_low, 1 + clip_high]; `dual_clip` None is off."""

    proportional_to_advantage: ClassVar[bool] = True
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


@dataclass(frozen=True, slots=True)
class SequenceClippedLoss(Checked):
    """Clip range [1 - clip_low, 1 + clip_high] of the sequence's ratio."""

    proportional_to_advantage: ClassVar[bool] = True
    clip_low: float = number(3e-4, 0, 1)
    clip_high: float = number(4e-4, 0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        logprobs = inputs.logprobs
        log_ratio = logprobs.detach() - inputs.old_logprobs
        mean = group_mean(log_ratio, inputs.sequence, inputs.sequences)[inputs.sequence]
        ratio = mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * (logprobs - logprobs.detach()).exp()
        loss, metrics = surrogate(ratio, inputs.advantages, self.clip_low, self.clip_high)
        kl_old = torch.expm1(log_ratio.clamp(max=LOG_RATIO_LIMIT)) - log_ratio
        return LossOutput(per_token=loss, metrics=metrics | {"policy/kl_old": kl_old})


@dataclass(frozen=True, slots=True)
class ClippedImportanceLoss(Checked):
    """Importance weight within [1 - clip_low, 1 + clip_high]."""

    proportional_to_advantage: ClassVar[bool] = True
    clip_low: float = number(1.0, 0, 1)
    clip_high: float = number(4.0, 0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        log_ratio, ratio = clamped_ratio(inputs.logprobs.detach(), inputs.old_logprobs)
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        metrics = {
            "policy/clip_frac/low": (ratio < 1 - self.clip_low).float(),
            "policy/clip_frac/high": (ratio > 1 + self.clip_high).float(),
            "policy/kl_old": torch.expm1(log_ratio) - log_ratio,
        }
        return LossOutput(per_token=-weight * inputs.advantages * inputs.logprobs, metrics=metrics)


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
