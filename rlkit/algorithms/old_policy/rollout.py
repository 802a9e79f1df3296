"""Anchor on the engine's own log-probs: the ratio holds engine mismatch and staleness together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RolloutAnchor:
    """old = behavior_logprobs, as reported when the token was sampled. Costs nothing."""

    uses_current_weights: ClassVar[bool] = False
    exact_only_at_lag_zero: ClassVar[bool] = False

    def __call__(self, behavior_logprobs: Sequence[Tensor], rescore: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the behaviour log-probs, [T_i] each."""
        return list(behavior_logprobs)
