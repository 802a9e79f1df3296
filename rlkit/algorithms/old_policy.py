"""Old-policy anchors: whose log-probs stand in the ratio's denominator."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor


class RolloutAnchor:
    """The engine's own log-probs: the ratio holds engine mismatch and staleness together. Costs nothing."""

    uses_current_weights: ClassVar[bool] = False
    exact_only_at_lag_zero: ClassVar[bool] = False

    def __call__(self, behavior_logprobs: Sequence[Tensor], rescore: Callable[[], list[Tensor]]) -> list[Tensor]:
        return list(behavior_logprobs)


class RecomputeAnchor:
    """The learner's weights before the batch's first update.

    Exact when every token was sampled by those weights (lag 0). At lag > 0 it is a *proximal* anchor (AReaL's decoupled
    PPO): the ratio starts at 1 whatever the tokens' age, so that clipping is silently off. Hence refused there.
    """

    uses_current_weights: ClassVar[bool] = True
    exact_only_at_lag_zero: ClassVar[bool] = True

    def __call__(self, behavior_logprobs: Sequence[Tensor], rescore: Callable[[], list[Tensor]]) -> list[Tensor]:
        return rescore()
