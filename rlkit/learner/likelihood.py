"""Likelihood rewards in a run: where a chain of thought ends, the reference behind it, its log-probs and scores."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkit.algorithms.likelihood.base import Answers, LikelihoodReward
from rlkit.config.components import build
from rlkit.data.prompts import PromptSet
from rlkit.data.text import encode
from rlkit.errors import DataError
from rlkit.evaluation.estimators import summarise_references
from rlkit.learner.assemble import usable_samples
from rlkit.learner.batching import TrainingSequence, collate, plan_microbatches
from rlkit.learner.policy import Policy
from rlkit.learner.setup import Session
from rlkit.types import Group, IntArray, Prompt, Rollout

NO_DELIMITER, TOO_LONG = "the chain of thought does not end with the delimiter", "chain and reference are too long"
Made = dict[tuple[int, int], TrainingSequence]  # (ordinal, index) -> what is trained on


def chain_end(token_ids: IntArray, delimiter: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens up to and including the first `delimiter`; None without one, or if its last token holds more text."""

    def text(count: int) -> str:
        return str(tokenizer.decode(token_ids[:count], clean_up_tokenization_spaces=False))

    end = bisect_left(range(len(token_ids)), True, key=lambda count: delimiter in text(count))
    return end if text(end).endswith(delimiter) else None


def check_answers(session: Session, sets: Mapping[str, PromptSet]) -> None:
    """Try all references before anything is sampled. DataError: unknown characters, or a set whose are all too long."""
    limit = session.config.rollout.max_completion_tokens
    if (scorer := LikelihoodScorer.of(session)) is None:
        return
    for name, prompts in sets.items():
        shortest = min(len(scorer.answer(prompt)) for prompt in prompts.prompts)
        if shortest >= limit:
            problem = f"{name}: no reference fits behind a chain of thought: the shortest has {shortest} tokens"
            raise DataError(problem, key="rollout.max_completion_tokens", value=limit, fix="raise it")


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodScorer:
    """Scores chains of thought by the likelihood of the reference behind them; on rank 0, not collective."""

    reward: LikelihoodReward
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int  # of chain and answer together
    microbatch_tokens: int
    policy: Any = None  # a Policy; None where only references are looked at
    reference: Policy | None = None  # judges in its place, for the rewards that want it

    @classmethod
    def of(cls, session: Session, policy: Any = None, reference: Policy | None = None) -> Self | None:
        """The recipe's scorer, if it has a likelihood reward."""
        config = session.config
        if config.reward.likelihood is None:
            return None
        return cls(
            reward=build(config.reward.likelihood, key="reward.likelihood"), tokenizer=session.tokenizer,
            max_tokens=config.rollout.max_completion_tokens, policy=policy, reference=reference,
            microbatch_tokens=config.learner.max_tokens_per_microbatch,
        )  # fmt: skip

    def tokens(self, text: str, name: str = "") -> IntArray:
        """Tokens of a text by itself. Raises DataError for characters the tokenizer does not know."""
        return np.array(encode([text], self.tokenizer, [name], "reward.likelihood")[0])

    def answer(self, prompt: Prompt) -> IntArray:
        """Tokens of the reference as it stands behind a chain."""
        return self.tokens(f"{self.reward.opening}{prompt.reference}{self.reward.closing}", prompt.id)

    def place(self, prompt: Prompt, rollout: Rollout) -> tuple[TrainingSequence, str | None]:
        """The chain with the reference behind it; or the whole completion without it, and why."""
        whole, answer = TrainingSequence.of(prompt, rollout), self.answer(prompt)
        end = chain_end(whole.token_ids, self.reward.delimiter, self.tokenizer)
        if end is None or end + len(answer) > self.max_tokens:
            return whole, NO_DELIMITER if end is None else TOO_LONG
        chain = replace(whole, token_ids=whole.token_ids[:end], loss_mask=whole.loss_mask[:end])
        return replace(chain, behavior_logprobs=whole.behavior_logprobs[:end], answer_token_ids=answer), None

    def gate(self, group: Group) -> Group:
        """The group with no score where the reference has no place, if such samples are to be dropped."""
        if self.reward.missing != "drop":
            return group
        judged = zip(group.verdicts, (self.place(group.prompt, r)[1] for r in group.rollouts), strict=True)
        return replace(group, verdicts=tuple(replace(v, score=None, reason=why) if why else v for v, why in judged))

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TrainingSequence], policy: Policy) -> list[Tensor]:
        """Log-probs of every sequence's answer, [m_i] float64 on the CPU; [0] where it has none."""
        bare = [replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in sequences]
        prompts = [(s.prompt_token_ids.tobytes(), len(s.prompt_token_ids)) for s in bare]
        lengths, share, out = [s.total_tokens for s in bare], policy.can_share_prompts, [torch.empty(0)] * len(bare)
        for part in plan_microbatches(lengths, self.microbatch_tokens, prompts=prompts if share else None):
            micro = collate(bare, part, dict.fromkeys(part, 0.0), share_prompts=share).to(policy.model.device)
            places = micro.input_ids, micro.position_ids, micro.answer_positions, micro.answer_targets
            values = policy(*places, micro.prompts)[0].double().cpu()
            for i, one in zip(part, values.split([len(bare[i].answer_token_ids) for i in part]), strict=True):
                out[i] = one
        return out

    def answered(
        self, pairs: Sequence[tuple[Prompt, Rollout]], policy: Policy
    ) -> tuple[list[TrainingSequence], list[Tensor], list[str | None]]:
        """Every sample's chain, its reference's log-probs (a uniform guess's where there is no place), and why none."""
        placed = [self.place(*pair) for pair in pairs]
        sequences, reasons = [sequence for sequence, _ in placed], [why for _, why in placed]
        found = self.logprobs(sequences, policy)
        guess = -math.log(policy.model.get_output_embeddings().weight.shape[0])
        for i, why in enumerate(reasons):
            if why is not None:
                found[i] = torch.full((len(self.answer(pairs[i][0])),), guess, dtype=torch.float64)
        return sequences, found, reasons

    def score(self, groups: Sequence[Group]) -> tuple[list[Group], Made, dict[str, float]]:
        """Groups with the reward in the verdicts of their usable samples, what to train on of these, and metrics."""
        usable = [(number, g, r, v) for number, g in enumerate(groups) for r, v in usable_samples(g)]
        judge = (self.reward.under_reference and self.reference) or self.policy
        sequences, logprobs, reasons = self.answered([(g.prompt, r) for _, g, r, _ in usable], judge)
        group, weight = torch.tensor([number for number, _, _, _ in usable]), self.reward.weight
        answers = Answers(
            **joined(logprobs), group=group, found=torch.tensor([why is None for why in reasons]),
            lengths=torch.tensor([len(s.token_ids) for s in sequences], dtype=torch.float64),
            without_chain=self._without_chain(groups, judge)[group] if self.reward.subtract_no_chain else None,
        )  # fmt: skip
        scores = self.reward.scores(answers)
        shares = (weight * self.reward.shares(scores, group)).tolist()
        made: Made = {}
        verdicts = {}
        for (_, _, _, verdict), one, score, share in zip(usable, sequences, scores.tolist(), shares, strict=True):
            taught = one.answer_token_ids if self.reward.answer_gradient else one.answer_token_ids[:0]
            made[one.group, one.index] = replace(one, answer_token_ids=taught, answer_share=share)
            total, parts = float(verdict.score or 0) + weight * score, {**verdict.parts, "likelihood": score}
            verdicts[one.group, one.index] = replace(verdict, score=total, parts=parts)
        own = [
            [verdicts.get((r.ordinal, r.index), v) for r, v in zip(g.rollouts, g.verdicts, strict=True)] for g in groups
        ]
        return [replace(g, verdicts=tuple(v)) for g, v in zip(groups, own, strict=True)], made, {
            "reward/likelihood/missing_frac": reasons.count(NO_DELIMITER) / len(reasons),
            "reward/likelihood/too_long_frac": reasons.count(TOO_LONG) / len(reasons),
            "reward/likelihood/token_logprob": float(answers.logprobs.mean()),
            "reward/likelihood/chain_length/mean": float(answers.lengths.mean()),
        }  # fmt: skip

    def _without_chain(self, groups: Sequence[Group], policy: Policy) -> Tensor:
        """The reward of every group's reference behind an empty chain, [groups]."""
        chain, none = self.tokens(f"{self.reward.empty_chain}{self.reward.delimiter}"), np.empty(0, np.int64)
        sequences = [
            TrainingSequence(
                prompt_token_ids=np.concatenate([g.prompt.token_ids, chain]), token_ids=none, group=g.ordinal,
                behavior_logprobs=none.astype(np.float32), loss_mask=none.astype(np.bool_),
                answer_token_ids=self.answer(g.prompt)[: self.max_tokens],
            )
            for g in groups
        ]  # fmt: skip
        return self.reward.reward(**joined(self.logprobs(sequences, policy)), count=len(groups))

    def figures(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], samples: int
    ) -> tuple[dict[str, tuple[float, float]], float]:
        """`summarise_references` of rollouts, `samples` a prompt; the fraction without a place for the reference."""
        pairs = [(prompts[number // samples], rollout) for number, rollout in enumerate(rollouts)]
        sequences, logprobs, reasons = self.answered(pairs, self.policy)
        sums = np.array([[float(one.sum()), len(s.token_ids)] for one, s in zip(logprobs, sequences, strict=True)])
        by_prompt = sums.reshape(len(prompts), samples, 2)
        tokens = [len(one) for one in logprobs[::samples]]
        found = summarise_references(by_prompt[..., 0].tolist(), tokens, by_prompt[..., 1].tolist())
        return found, sum(map(bool, reasons)) / len(reasons)


def joined(values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Answers' log-probs end to end, and which answer each belongs to."""
    lengths = torch.tensor([len(one) for one in values])
    return {"logprobs": torch.cat(list(values)), "sequence": torch.arange(len(values)).repeat_interleave(lengths)}
