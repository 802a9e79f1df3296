"""The seams of an algorithm: what an advantage, a loss and an old-policy anchor are given and return.

Shapes: N sequences (rollouts) of one learner step, over all ranks; n loss tokens of one micro-batch, end to end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """The scored samples of a whole learner step (never a micro-batch, never one rank's share).

    Example: two prompts of three samples, one right answer: scores [1, 0, 0, 0, 0, 0], group [0, 0, 0, 1, 1, 1].
    """

    scores: Tensor  # [N] float64, finite; unscored samples are not among them
    group: Tensor  # [N] int64, which prompt a sample belongs to, 0 <= group < number of prompts
    lengths: Tensor  # [N] float64, loss tokens of every sequence
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # the named rewards, [N] each; NaN: has no say


class Advantage(Protocol):
    """Scores -> advantages [N], constant over the tokens of a sequence.

    Optional: `observe(inputs)`, called before it in every step, gives metrics and may change `state` (floats, kept in
    checkpoints). Optional attributes of the class, False where missing:
        needs_verdicts: scores are verifiers' alone, without likelihoods and penalties.
        needs_binary_scores: and they are one reward's verdict, 0 or 1.
        uses_uniform_groups: a group of one verdict has a gradient, so no filter may drop it.
        centred_in_group: A > 0 just where a sample's score is above its group's mean; A = 0 throughout where all are
            equal. Then the sign of A is a label, which a `GroupLoss` reads.
    """

    minimum_group_size: ClassVar[int]

    def __call__(self, inputs: AdvantageInputs) -> Tensor: ...  # [N] float64


class GroupFilter(Protocol):
    """Whether a scored group is trained on; one that is not is dropped, and the next prompt takes its place."""

    def __call__(self, scores: Tensor) -> bool:
        """scores [n] of the group's scored samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss sees of one micro-batch; everything but `logprobs` is constant."""

    logprobs: Tensor  # [n] under the current weights, with gradient
    old_logprobs: Tensor  # [n] the anchor of the ratio
    behavior_logprobs: Tensor  # [n] as the engine reported them
    advantages: Tensor  # [n]
    sequence: Tensor  # [n] int64, which of the micro-batch's sequences a token belongs to, ascending
    sequences: int  # how many there are


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of every token and diagnostics."""

    per_token: Tensor  # [n], to be MINIMISED; the aggregation weighs it
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # [n] each, no gradient; reported as token means


class Loss(Protocol):
    """Per-token surrogate. A sequence-level loss sums over `sequence` inside; groups may be split.

    Optional attributes of the class, False where missing:
        needs_fresh_samples: refused with stale tokens or several updates a step.
        proportional_to_advantage: a sequence with A = 0 has loss and gradient 0, so it need not be computed.
    """

    def __call__(self, inputs: LossInputs) -> LossOutput: ...


class GroupLoss(Protocol):
    """The other kind of loss: of an update, in one call that sees every sequence of every group, over all ranks.

    The learner back-propagates its derivatives by the sequences' scores, which are s_k = mean over loss tokens of
    (logprob - old_logprob); the aggregation weighs KL and entropy only. A group whose advantages are all 0 must have
    derivative 0 (it is left out where learner.skip_zero_advantage allows; its scores read 0), and still counts in P.
    """

    whole_groups: ClassVar[bool]  # True, which is what tells it from a `Loss`

    def __call__(self, scores: Tensor, advantages: Tensor, group: Tensor) -> Tensor:
        """scores [N] float64 with gradient, advantages [N], group [N] int64 in 0..P-1 (all occur) -> scalar loss.

        P counts ALL prompts of the update: the loss is divided by it already.
        """


class Aggregation(Protocol):
    """Weights [N] of each sequence's tokens, from the lengths of ALL sequences of the update."""

    def __call__(self, lengths: Tensor) -> Tensor:
        """lengths [N] -> weight of every token of sequence i, [N]; where needs_groups is set, also given group [N]."""


class OldPolicy(Protocol):
    """Whose log-probs are the denominator of the ratio."""

    # The anchor is the policy at the start of the batch: its first update needs no extra forward, later ones do.
    uses_current_weights: ClassVar[bool]
    exact_only_at_lag_zero: ClassVar[bool]  # refused when tokens may be older than the weights

    def __call__(self, behavior_logprobs: Sequence[Tensor], rescore: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Old log-probs of every sequence, [T_i] each; `rescore` is a no-grad forward of the policy."""


def group_sum(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sum of `values` [N] within each group, [count]."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, group, values)


def group_mean(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Mean of `values` [N] within each group, [count]; 0 for an empty group."""
    return group_sum(values, group, count) / group_sum(torch.ones_like(values), group, count).clamp_min(1)


def constant_groups(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Groups whose values are all equal, [count] bool; exactly so: (0.1 + 0.1 + 0.1) / 3 is not 0.1 in floats."""
    low = torch.full((count,), torch.inf, dtype=values.dtype, device=values.device)
    high = (-low).scatter_reduce(0, group, values, "amax")
    return low.scatter_reduce(0, group, values, "amin") == high


def centred_scores(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """scores [N] less their group's mean, exactly 0 where a group is constant; and every group's size."""
    scores, group = inputs.scores, inputs.group
    sizes = group.bincount()
    centred = scores - group_mean(scores, group, len(sizes))[group]
    return centred.masked_fill(constant_groups(scores, group, len(sizes))[group], 0.0), sizes
