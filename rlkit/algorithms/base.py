"""The seams of an algorithm: what an advantage, a loss and an old-policy anchor are given and return.

Shapes
    N  sequences (rollouts) of one learner step, over all ranks
    n  loss tokens of one micro-batch: completions laid end to end, masked tokens left out
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rlkit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """The scored samples of a whole learner step (never a micro-batch, never one rank's share).

    Attributes:
        scores: [N] float64, finite; unscored samples are not among them.
        group: [N] int64, which prompt a sample belongs to, 0 <= group < number of prompts.
        lengths: [N] float64, loss tokens of every sequence.
        parts: the named rewards behind the scores, [N] each; NaN where one has no say.

    Example: two prompts, three samples each, one right answer in the first and none in the second:
        scores = [1, 0, 0, 0, 0, 0], group = [0, 0, 0, 1, 1, 1]
    """

    scores: Tensor
    group: Tensor
    lengths: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Advantage(Protocol):
    """Scores -> advantages [N], constant over the tokens of a sequence."""

    minimum_group_size: ClassVar[int]

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """Return [N] float64."""


class GroupFilter(Protocol):
    """Whether a scored group is trained on; one that is not is dropped, and the next prompt takes its place."""

    def __call__(self, scores: Tensor) -> bool:
        """scores [n] of the group's scored samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss sees of one micro-batch.

    Attributes:
        logprobs: [n] under the current weights, with gradient.
        old_logprobs: [n] the anchor of the ratio, constant.
        behavior_logprobs: [n] as the engine reported them, constant.
        advantages: [n] constant.
        sequence: [n] int64, which of the micro-batch's sequences a token belongs to, ascending.
        sequences: how many there are.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    sequence: Tensor
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of every token (to be MINIMISED; the aggregation weighs it) and diagnostics.

    Attributes:
        per_token: [n]
        metrics: name -> [n] values without gradient, reported as their mean over all loss tokens.
    """

    per_token: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """Per-token surrogate. A sequence-level loss sums over `sequence` inside; groups may be split.

    Optional attributes of the class, False where missing:
        needs_fresh_samples: refused with stale tokens or several updates a step.
        proportional_to_advantage: a sequence with A = 0 has loss and gradient 0, so it need not be computed.
    """

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Return the loss of every token."""


class Aggregation(Protocol):
    """Weights [N] of each sequence's tokens, from the lengths of ALL sequences of the update."""

    def __call__(self, lengths: Tensor) -> Tensor:
        """lengths [N] -> weight of every token of sequence i, [N]."""


class OldPolicy(Protocol):
    """Whose log-probs are the denominator of the ratio.

    Attributes:
        uses_current_weights: the anchor is the policy at the start of the batch. With one update a
            batch its log-probs equal the current ones, so no extra forward is spent.
        exact_only_at_lag_zero: refused when tokens may be older than the weights.
    """

    uses_current_weights: ClassVar[bool]
    exact_only_at_lag_zero: ClassVar[bool]

    def __call__(self, behavior_logprobs: Sequence[Tensor], rescore: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Old log-probs of every sequence, [T_i] each; `rescore` is a no-grad forward of the policy."""


def group_sum(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sum of `values` [N] within each group, [count]."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, group, values)


def group_mean(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Mean of `values` [N] within each group, [count]; 0 for an empty group."""
    return group_sum(values, group, count) / group_sum(torch.ones_like(values), group, count).clamp_min(1)


def constant_groups(values: Tensor, group: Tensor, count: int) -> Tensor:
    """True for groups whose values are all exactly equal, [count] bool.

    Exact comparison, not a variance: (0.1 + 0.1 + 0.1) / 3 is not 0.1 in floating point.
    """
    low = torch.full((count,), torch.inf, dtype=values.dtype, device=values.device)
    high = (-low).scatter_reduce(0, group, values, "amax")
    return low.scatter_reduce(0, group, values, "amin") == high


def centred_scores(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """scores [N] less their group's mean, exactly 0 where a group is constant; and every group's size."""
    scores, group = inputs.scores, inputs.group
    sizes = group.bincount()
    centred = scores - group_mean(scores, group, len(sizes))[group]
    return centred.masked_fill(constant_groups(scores, group, len(sizes))[group], 0.0), sizes


def in_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ConfigError unless low <= value <= high (nan is not) and value is finite."""
    if not (low <= value <= high and value < float("inf")):
        expected = f"a finite number >= {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise ConfigError("out of range", key=key, value=value, expected=expected)
