"""From sequences to micro-batches: bucketed by length or by prompt, under a token budget, the same for every rank.

The gradient of an update does not depend on anything in this file: each sequence's tokens carry a weight computed from
the whole update (`rlkit.algorithms.aggregation`), so the update's loss is a plain sum over tokens, however it is cut.
"""

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit.types import BoolArray, FloatArray, IntArray, Prompt, Rollout

SHARED_BELOW = 0.9  # of a micro-batch's tokens: sharing prompts costs a second pass of the layers


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSequence:
    """One rollout as the learner sees it. T = generated tokens."""

    prompt_token_ids: IntArray  # [P]
    token_ids: IntArray  # [T] what was sampled, and a reference answer behind it where its likelihood is a reward
    behavior_logprobs: FloatArray  # [T]
    loss_mask: BoolArray  # [T] False for the answer
    group: int  # ordinal of its group, which stays whole when a step is split into updates
    index: int = 0  # which of the group's samples it is
    advantage: float = 0.0
    answer_tokens: int = 0  # how many of the last ones are the answer
    answer_share: float = 0.0  # weight of the answer's reward in the loss, relative to that of a token
    fresh: BoolArray | None = None  # [T] sampled by the weights that the step begins with; None: all are

    @classmethod
    def of(cls, prompt: Prompt, rollout: Rollout, advantage: float = 0.0) -> Self:
        """A rollout of `prompt` to train on."""
        return cls(
            prompt_token_ids=prompt.token_ids, token_ids=rollout.token_ids, advantage=advantage,
            behavior_logprobs=rollout.behavior_logprobs, loss_mask=rollout.loss_mask,
            group=rollout.ordinal, index=rollout.index,
        )  # fmt: skip

    @classmethod
    def given(cls, prompt: IntArray, tokens: IntArray, group: int = 0, advantage: float = 0.0) -> Self:
        """Tokens that nobody sampled, all of them in the loss."""
        return cls(
            prompt_token_ids=prompt, token_ids=tokens, behavior_logprobs=np.zeros(len(tokens), np.float32),
            loss_mask=np.ones(len(tokens), np.bool_), group=group, advantage=advantage,
        )  # fmt: skip

    def with_answer(self, end: int, answer: IntArray) -> Self:
        """The first `end` tokens, and a reference answer behind them."""
        tokens, added = np.concatenate([self.token_ids[:end], answer]), (0, len(answer))
        mask, behavior = np.pad(self.loss_mask[:end], added), np.pad(self.behavior_logprobs[:end], added)
        return replace(self, token_ids=tokens, loss_mask=mask, behavior_logprobs=behavior, answer_tokens=len(answer))

    @property
    def prompt_key(self) -> tuple[bytes, int]:
        """What tells its prompt from others, and the prompt's tokens."""
        return self.prompt_token_ids.tobytes(), len(self.prompt_token_ids)

    @property
    def total_tokens(self) -> int:
        """Tokens of the forward pass."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def answer_start(self) -> int:
        """Tokens before the answer."""
        return len(self.token_ids) - self.answer_tokens

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.loss_mask.sum())


class SharedPrompts(NamedTuple):
    """Prompts that are computed once for all completions of a micro-batch that begin with them."""

    input_ids: Tensor  # [P, Q] right padded
    owner: Tensor  # [B] the prompt of every completion
    mask: Tensor  # [B, Q + L] 0 where the prompt is padding


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass over some sequences; n = their loss tokens, end to end, m = those of their answers behind them.

    Example: two sequences, prompts [7 8] and [9], completions [1 2] and [3], all in the loss:
        input_ids [[7, 8, 1, 2], [9, 3, 0, 0]], targets [1, 2, 3], sequence [0, 0, 1], counts [2, 1],
        head_positions [1, 2, 4] (the hidden states that predict 1, 2 and 3)
    With both prompts [7 8] and shared: prompts.input_ids [[7, 8]], owner [0, 0], input_ids [[1], [0]] (nothing is
        predicted from a last token), head_positions [1, 2, 1] in the prompts' hidden states, then the completions'.
    """

    input_ids: Tensor  # [B, L] right padded: whole sequences, or what follows the shared prompts
    position_ids: Tensor  # [B, L]
    prompts: SharedPrompts | None
    head_positions: Tensor  # [n + m]
    targets: Tensor  # [n + m]
    sequence: Tensor  # [n]
    behavior_logprobs: Tensor  # [n]
    fresh: Tensor  # [n] bool
    advantages: Tensor  # [n]
    weights: Tensor  # [n] of every token in the update's loss
    counts: list[int]  # [B] loss tokens of every sequence
    indices: list[int]  # [B] which of the step's sequences they are
    answer_counts: list[int]  # [B] tokens of every answer
    answer_weights: list[float]  # [B] of every answer's reward in the update's loss
    old_logprobs: Tensor | None = None  # [n]; None: equal to the current ones
    counted: bool = True  # False: filler for a rank with no work left; its loss is multiplied by 0

    def to(self, device: torch.device) -> Self:
        """The same with all tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **send_to_device(values, device))


def padded_tokens(rows: int, prompts: int, prompt_width: int, rest: int, longest: int) -> tuple[int, bool]:
    """Of a micro-batch's forward pass, and whether it shares its prompts.

    `prompts`: how many differ, up to `prompt_width` tokens each; `rest`: of the longest completion, `longest`: of the
    longest sequence. A last token predicts nothing: with completions of one token nothing follows a shared prompt.
    """
    whole, shared = rows * longest, prompts * prompt_width + rows * (rest - 1)
    return (shared, True) if prompt_width and rest > 1 and shared < SHARED_BELOW * whole else (whole, False)


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
    by_length = sorted(range(len(lengths)), key=lambda i: -rest[i])
    by_prompt = sorted(by_length, key=lambda i: (-longest[shared[i][0]], number[shared[i][0]]))

    def cut(order: list[int], budget: int) -> tuple[int, list[list[int]]]:
        """Padded tokens and micro-batches."""
        plan, sizes = list[list[int]](), list[int]()
        seen, width, prompt_width, whole = set[Hashable](), 0, 0, 0
        for i in order:
            prompt, tokens = shared[i]
            width, prompt_width, whole = max(width, rest[i]), max(prompt_width, tokens), max(whole, lengths[i])
            count = len(plan[-1]) + 1 if plan else 0
            size = padded_tokens(count, len(seen) + (prompt not in seen), prompt_width, width, whole)[0]
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
    distinct = {s.prompt_key: s.prompt_token_ids for s in chosen}
    prompt_width, rest = max(map(len, distinct.values())), max(len(s.token_ids) for s in chosen)
    longest = max(s.total_tokens for s in chosen)
    prompts = None
    if share_prompts and padded_tokens(len(chosen), len(distinct), prompt_width, rest, longest)[1]:
        place = {key: row for row, key in enumerate(distinct)}
        owner = torch.tensor([place[s.prompt_key] for s in chosen])
        ids = pad_sequence([torch.from_numpy(p) for p in distinct.values()], batch_first=True)
        lengths = torch.tensor([len(s.prompt_token_ids) for s in chosen])[:, None]
        columns = torch.arange(prompt_width + rest - 1)
        prompts = SharedPrompts(ids, owner, mask=((columns < lengths) | (columns >= prompt_width)).long())
        input_ids = pad_sequence([torch.from_numpy(s.token_ids[:-1]) for s in chosen], batch_first=True)
        position_ids = lengths + torch.arange(rest - 1)
    else:
        texts = [torch.from_numpy(np.concatenate([s.prompt_token_ids, s.token_ids])) for s in chosen]
        input_ids = pad_sequence(texts, batch_first=True)
        position_ids = torch.arange(input_ids.shape[1]).expand(len(chosen), -1).contiguous()
    width = input_ids.shape[1]

    # Behind a prompt: the tokens of every row that count, then the answers; one's hidden state predicts the next one.
    places = [np.flatnonzero(s.loss_mask) for s in chosen]
    places += [np.arange(s.answer_start, len(s.token_ids)) for s in chosen]
    heads = []
    for number, tokens in enumerate(places):
        row = number % len(chosen)
        last = len(chosen[row].prompt_token_ids) - 1
        if prompts is None:
            heads.append(row * width + last + tokens)
        else:
            of_prompt, behind = int(prompts.owner[row]) * prompt_width + last, prompts.input_ids.numel() + row * width
            heads.append(np.where(tokens == 0, of_prompt, behind + tokens - 1))

    arrays = {
        "head_positions": np.concatenate(heads),
        "targets": np.concatenate([s.token_ids[own] for s, own in zip([*chosen, *chosen], places, strict=True)]),
        "sequence": np.repeat(np.arange(len(chosen)), counts),
        "behavior_logprobs": np.concatenate([s.behavior_logprobs[s.loss_mask] for s in chosen]),
        "fresh": np.concatenate(
            [s.loss_mask[s.loss_mask] if s.fresh is None else s.fresh[s.loss_mask] for s in chosen]
        ),
        "advantages": np.repeat([s.advantage for s in chosen], counts),
        "weights": np.repeat([weights[i] for i in indices], counts),
    }
    return MicroBatch(
        input_ids=input_ids, position_ids=position_ids, prompts=prompts, counts=counts, indices=list(indices),
        counted=counted, answer_counts=[s.answer_tokens for s in chosen],
        answer_weights=[weights[i] * sequences[i].answer_share for i in indices],
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
    )  # fmt: skip


def split_groups(group: Sequence[int], updates: int) -> list[list[int]]:
    """Split sequences, given their groups, into `updates` lists by whole groups, in order; fewer for fewer groups."""
    parts = np.array_split(np.array(list(dict.fromkeys(group))), updates)
    return [[i for i, g in enumerate(group) if g in part] for part in parts if len(part)]
