"""From sequences to micro-batches: bucketed by length or by prompt, under a token budget, the same for every rank.

The gradient of an update does not depend on anything in this file: each sequence's tokens carry a weight computed from
the whole update (`rlkit.algorithms.aggregation`), so the update's loss is a plain sum over tokens, however it is cut.
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit.types import BoolArray, FloatArray, IntArray, Prompt, Rollout

SHARED_BELOW = 0.9  # of a micro-batch's tokens: sharing prompts costs a second pass of the layers


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
    answer_token_ids: IntArray = field(default_factory=lambda: np.empty(0, np.int64))  # teacher-forced behind token_ids
    answer_share: float = 0.0  # weight of the answer's reward in the loss, relative to that of a token

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
        """Tokens of the forward pass: prompt, completion and reference answer."""
        return len(self.prompt_token_ids) + len(self.following)

    @property
    def following(self) -> IntArray:
        """Tokens behind the prompt: completion and reference answer."""
        return np.concatenate([self.token_ids, self.answer_token_ids])

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """Prompts that are computed once for all completions of a micro-batch that begin with them."""

    input_ids: Tensor  # [P, Q] right padded
    owner: Tensor  # [B] the prompt of every completion
    mask: Tensor  # [B, Q + L] 0 where the prompt is padding

    def to(self, device: torch.device) -> Self:
        """The same prompts on `device`."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass over some sequences; n = their loss tokens, m = those of their answers, end to end.

    Example: two sequences, prompts [7 8] and [9], completions [1 2] and [3], all in the loss:
        input_ids [[7, 8, 1, 2], [9, 3, 0, 0]], targets [1, 2, 3], sequence [0, 0, 1], counts [2, 1],
        head_positions [1, 2, 4] (the hidden states that predict 1, 2 and 3)
    With both prompts [7 8] and shared: prompts.input_ids [[7, 8]], owner [0, 0], input_ids [[1], [0]] (nothing is
        predicted from a last token), head_positions [1, 2, 1] in the prompts' hidden states, then the completions'.
    """

    input_ids: Tensor  # [B, L] right padded: whole sequences, or what follows the shared prompts
    position_ids: Tensor  # [B, L]
    prompts: SharedPrompts | None
    head_positions: Tensor  # [n]
    targets: Tensor  # [n]
    sequence: Tensor  # [n]
    behavior_logprobs: Tensor  # [n]
    advantages: Tensor  # [n]
    weights: Tensor  # [n] of every token in the update's loss
    counts: list[int]  # [B] loss tokens of every sequence
    indices: list[int]  # [B] which of the step's sequences they are
    answer_positions: Tensor  # [m] as head_positions
    answer_targets: Tensor  # [m]
    answer_sequence: Tensor  # [m]
    answer_weights: Tensor  # [B] of every answer's reward in the update's loss
    old_logprobs: Tensor | None = None  # [n]; None: equal to the current ones
    counted: bool = True  # False: filler for a rank with no work left; its loss is multiplied by 0

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | SharedPrompts)}
        return replace(self, **moved)


def plan_microbatches(
    lengths: Sequence[int], max_tokens: int, ranks: int = 1, prompts: Sequence[tuple[Hashable, int]] | None = None
) -> list[list[int]]:
    """Cut sequences into micro-batches of at most `max_tokens` padded tokens; each is in one of them.

    There are as few as it takes, rounded up to a multiple of `ranks`, and they are as even as that allows: ranks wait
    for the one with the most tokens. A sequence longer than the budget gets a micro-batch of its own. `prompts`, where
    they are computed once a micro-batch: every sequence's prompt and its tokens, which `lengths` include. Sequences are
    then sorted by prompt instead of by length if that makes fewer tokens.
    """
    shared = prompts or [(None, 0)] * len(lengths)
    rest = [length - tokens for length, (_, tokens) in zip(lengths, shared, strict=True)]
    longest: dict[Hashable, int] = {}
    for (prompt, _), length in zip(shared, rest, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    number = {prompt: n for n, prompt in enumerate(longest)}
    by_length = sorted(range(len(lengths)), key=lambda i: (-rest[i], i))
    by_prompt = sorted(by_length, key=lambda i: (-longest[shared[i][0]], number[shared[i][0]]))

    def cut(order: list[int], budget: int) -> tuple[int, list[list[int]]]:
        """Padded tokens and micro-batches."""
        plan: list[list[int]] = []
        sizes: list[int] = []
        seen: set[Hashable] = set()
        width = prompt_width = whole = 0
        for i in order:
            prompt, tokens = shared[i]
            width, prompt_width, whole = max(width, rest[i]), max(prompt_width, tokens), max(whole, lengths[i])
            count = len(plan[-1]) + 1 if plan else 0
            size = count * width + len(seen | {prompt}) * prompt_width
            if size >= SHARED_BELOW * count * whole:  # then `collate` does not share them
                size = count * whole
            if plan and size <= budget:
                plan[-1].append(i)
                seen.add(prompt)
                sizes[-1] = size
            else:
                plan.append([i])
                seen, width, prompt_width, whole = {prompt}, rest[i], tokens, lengths[i]
                sizes.append(lengths[i])
        return sum(sizes), plan

    order = by_length if prompts is None else min(by_length, by_prompt, key=lambda order: cut(order, max_tokens)[0])
    parts = -(-len(cut(order, max_tokens)[1]) // ranks) * ranks
    budgets = range(max_tokens, 0, -max(1, max_tokens // 64))[::-1]  # even to a 64th: cutting takes time
    even = bisect_left(budgets[:-1], True, key=lambda budget: len(cut(order, budget)[1]) <= parts)
    return cut(order, budgets[even])[1]


def share_of_rank(plan: list[list[int]], rank: int, world: int) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches and whether they count.

    Collectives hang when ranks run different numbers of them, so the shortest one fills up with weight 0.
    """
    filled = [(part, True) for part in plan]
    while len(filled) % world:
        filled.append((plan[-1][-1:], False))
    return filled[rank::world]


def collate(
    sequences: Sequence[TrainingSequence], indices: Sequence[int], weights: Mapping[int, float], *,
    counted: bool = True, share_prompts: bool = False,
) -> MicroBatch:  # fmt: skip
    """Right-pad sequences[indices] (with token 0, never attended to) and lay their loss tokens end to end.

    `weights`: sequence -> weight of each of its tokens in the update's loss. `share_prompts`: compute equal prompts
    once, where that saves a tenth of the tokens or more.
    """
    chosen = [sequences[i] for i in indices]
    counts = [s.loss_tokens for s in chosen]
    distinct = {s.prompt_token_ids.tobytes(): s.prompt_token_ids for s in chosen}
    prompt_width, rest = max(map(len, distinct.values())), max(len(s.following) for s in chosen) - 1
    whole = len(chosen) * max(s.total_tokens for s in chosen)
    prompts = None
    if share_prompts and rest > 0 and len(distinct) * prompt_width + len(chosen) * rest < SHARED_BELOW * whole:
        place = {key: row for row, key in enumerate(distinct)}
        owner = torch.tensor([place[s.prompt_token_ids.tobytes()] for s in chosen])
        ids = pad_sequence([torch.from_numpy(p) for p in distinct.values()], batch_first=True)
        lengths = torch.tensor([len(s.prompt_token_ids) for s in chosen])[:, None]
        columns = torch.arange(prompt_width + rest)
        mask = ((columns < lengths) | (columns >= prompt_width)).long()
        prompts = SharedPrompts(input_ids=ids, owner=owner, mask=mask)
        input_ids = pad_sequence([torch.from_numpy(s.following[:-1]) for s in chosen], batch_first=True)
        position_ids = lengths + torch.arange(rest)
    else:
        joined = [torch.from_numpy(np.concatenate([s.prompt_token_ids, s.following])) for s in chosen]
        input_ids = pad_sequence(joined, batch_first=True)
        position_ids = torch.arange(input_ids.shape[1]).expand(len(chosen), -1).contiguous()
    width = input_ids.shape[1]

    def heads(row: int, one: TrainingSequence, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The hidden state one before a token predicts it; `tokens` count from the prompt's end."""
        last = len(one.prompt_token_ids) - 1
        if prompts is None:
            return row * width + last + tokens
        of_prompt, behind = int(prompts.owner[row]) * prompt_width + last, prompts.input_ids.numel() + row * width
        return np.where(tokens == 0, of_prompt, behind + tokens - 1)

    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        prompts=prompts,
        head_positions=_joined(heads(row, s, np.flatnonzero(s.loss_mask)) for row, s in enumerate(chosen)),
        targets=_joined(s.token_ids[s.loss_mask] for s in chosen),
        sequence=torch.from_numpy(np.repeat(np.arange(len(chosen)), counts)),
        behavior_logprobs=_joined(s.behavior_logprobs[s.loss_mask] for s in chosen),
        advantages=torch.from_numpy(np.repeat([s.advantage for s in chosen], counts)),
        weights=torch.from_numpy(np.repeat([weights[i] for i in indices], counts)),
        counts=counts,
        indices=list(indices),
        answer_positions=_joined(
            heads(row, s, len(s.token_ids) + np.arange(len(s.answer_token_ids))) for row, s in enumerate(chosen)
        ),
        answer_targets=_joined(s.answer_token_ids for s in chosen),
        answer_sequence=torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(s.answer_token_ids) for s in chosen])),
        answer_weights=torch.tensor([weights[i] * sequences[i].answer_share for i in indices], dtype=torch.float64),
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
