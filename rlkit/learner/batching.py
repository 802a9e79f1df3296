"""From sequences to micro-batches: bucketed by length, under a token budget, the same for every rank.

The gradient of an update does not depend on anything in this file: each sequence's tokens carry a weight computed from
the whole update (`rlkit.algorithms.aggregation`), so the update's loss is a plain sum over tokens, however it is cut.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit.types import BoolArray, FloatArray, IntArray, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSequence:
    """One rollout as the learner sees it. T = generated tokens."""

    prompt_token_ids: IntArray  # [P]
    token_ids: IntArray  # [T]
    behavior_logprobs: FloatArray  # [T]
    loss_mask: BoolArray  # [T]
    group: int  # ordinal of its group, which stays whole when a step is split into updates
    index: int = 0  # which of the group's samples it is
    advantage: float = 0.0

    @classmethod
    def of(cls, prompt: Prompt, rollout: Rollout, advantage: float = 0.0) -> Self:
        """A rollout of `prompt` to train on."""
        return cls(
            prompt_token_ids=prompt.token_ids, token_ids=rollout.token_ids, advantage=advantage,
            behavior_logprobs=rollout.behavior_logprobs, loss_mask=rollout.loss_mask,
            group=rollout.ordinal, index=rollout.index,
        )  # fmt: skip

    @property
    def total_tokens(self) -> int:
        """Tokens of the forward pass: prompt and completion."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass over some sequences; n = their loss tokens, end to end.

    Example: two sequences, prompts [7 8] and [9], completions [1 2] and [3], all in the loss:
        input_ids [[7, 8, 1, 2], [9, 3, 0, 0]], targets [1, 2, 3], sequence [0, 0, 1], counts [2, 1],
        head_positions [1, 2, 4] (the hidden states that predict 1, 2 and 3)
    """

    input_ids: Tensor  # [B, L] right padded
    position_ids: Tensor  # [B, L]
    head_positions: Tensor  # [n]
    targets: Tensor  # [n]
    sequence: Tensor  # [n]
    behavior_logprobs: Tensor  # [n]
    advantages: Tensor  # [n]
    weights: Tensor  # [n] of every token in the update's loss
    counts: list[int]  # [B] loss tokens of every sequence
    old_logprobs: Tensor | None = None  # [n]; None: equal to the current ones
    counted: bool = True  # False: filler for a rank with no work left; its loss is multiplied by 0

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def plan_microbatches(lengths: Sequence[int], max_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Cut sequences into micro-batches of at most `max_tokens` padded tokens, longest first; each is in one of them.

    There are as few as it takes, rounded up to a multiple of `ranks`, and they are as even as that allows: ranks wait
    for the one with the most tokens. A sequence longer than the budget gets a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def cut(budget: int) -> list[list[int]]:
        plan: list[list[int]] = []
        width = 0
        for i in order:
            if plan and (len(plan[-1]) + 1) * width <= budget:
                plan[-1].append(i)
            else:
                plan.append([i])
                width = lengths[i]
        return plan

    parts = -(-len(cut(max_tokens)) // ranks) * ranks
    even = bisect_left(range(max_tokens), True, lo=1, key=lambda budget: len(cut(budget)) <= parts)
    return cut(even)


def share_of_rank(plan: list[list[int]], rank: int, world: int) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches and whether they count.

    Collectives hang when ranks run different numbers of them, so the shortest one fills up with weight 0.
    """
    filled = [(part, True) for part in plan]
    while len(filled) % world:
        filled.append((plan[-1][-1:], False))
    return filled[rank::world]


def collate(
    sequences: Sequence[TrainingSequence], indices: Sequence[int], weights: Mapping[int, float], *, counted: bool = True
) -> MicroBatch:
    """Right-pad sequences[indices] (with token 0, never attended to) and lay their loss tokens end to end.

    `weights`: sequence -> weight of each of its tokens in the update's loss.
    """
    chosen = [sequences[i] for i in indices]
    counts = [s.loss_tokens for s in chosen]
    tokens = [torch.from_numpy(np.concatenate([s.prompt_token_ids, s.token_ids])) for s in chosen]
    input_ids = pad_sequence(tokens, batch_first=True)
    width = input_ids.shape[1]
    # The hidden state one before a token predicts it.
    first = [row * width + len(s.prompt_token_ids) - 1 for row, s in enumerate(chosen)]
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(chosen), -1).contiguous(),
        head_positions=_joined(f + np.flatnonzero(s.loss_mask) for f, s in zip(first, chosen, strict=True)),
        targets=_joined(s.token_ids[s.loss_mask] for s in chosen),
        sequence=torch.from_numpy(np.repeat(np.arange(len(chosen)), counts)),
        behavior_logprobs=_joined(s.behavior_logprobs[s.loss_mask] for s in chosen),
        advantages=torch.from_numpy(np.repeat([s.advantage for s in chosen], counts)),
        weights=torch.from_numpy(np.repeat([weights[i] for i in indices], counts)),
        counts=counts,
        counted=counted,
    )


def _joined(parts: Iterable[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(parts)))


def split_updates(group: Sequence[int], updates: int) -> list[list[int]]:
    """Split sequences into `updates` lists by whole groups, in order; sizes differ by one group at most.

    `group` gives each sequence's group. Fewer groups than updates: fewer lists.
    """
    parts = np.array_split(np.array(list(dict.fromkeys(group))), updates)
    return [[i for i, g in enumerate(group) if g in part] for part in parts if len(part)]
