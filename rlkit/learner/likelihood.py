"""Likelihood rewards in a run: where a chain of thought ends, the reference behind it, its log-probs and scores."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkit.algorithms.likelihood import LikelihoodReward
from rlkit.data.prompts import PromptSet
from rlkit.data.text import encode
from rlkit.errors import DataError
from rlkit.evaluation.estimators import summarise_references
from rlkit.learner.assemble import usable_samples
from rlkit.learner.batching import TrainingSequence
from rlkit.learner.policy import Policy
from rlkit.learner.setup import Session
from rlkit.types import Group, IntArray, Prompt, Rollout, Verdict

NO_DELIMITER, TOO_LONG = "the chain of thought does not end with the delimiter", "chain and reference are too long"


def chain_end(token_ids: IntArray, delimiter: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens up to and including the first `delimiter`; None without one, or if its last token holds more text."""

    def text(count: int) -> str:
        return str(tokenizer.decode(token_ids[:count], clean_up_tokenization_spaces=False))

    end = bisect_left(range(len(token_ids)), True, key=lambda count: delimiter in text(count))
    return end if text(end).endswith(delimiter) else None


def added(verdict: Verdict, weight: float, value: float) -> Verdict:
    """The verdict with a likelihood reward beside the verifiers'."""
    parts = {**verdict.parts, "likelihood": value}
    return replace(verdict, score=float(verdict.score or 0) + weight * value, parts=parts)


class Answered(NamedTuple):
    """A sample with the reference behind its chain, or as it is."""

    sequence: TrainingSequence
    missing: str | None  # why there is no place for the reference
    logprobs: Tensor  # [m] float64 of the reference; a uniform guess's where there is no place


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodScorer:
    """Scores chains of thought by the likelihood of the reference behind them; on rank 0, not collective."""

    reward: LikelihoodReward
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int  # of chain and answer together
    microbatch_tokens: int
    policy: Any = None  # a Policy; None where only references are looked at
    reference: Policy | None = None  # judges in its place, for the rewards that want it
    known: dict[str, IntArray] = field(default_factory=dict)  # tokens of texts

    @classmethod
    def of(cls, session: Session, policy: Any = None, reference: Policy | None = None) -> Self | None:
        """The recipe's scorer, if it has a likelihood reward."""
        config, reward = session.config, session.component("reward.likelihood")
        return reward and cls(
            reward=reward, tokenizer=session.tokenizer, max_tokens=config.rollout.max_completion_tokens, policy=policy,
            reference=reference, microbatch_tokens=config.learner.max_tokens_per_microbatch,
        )  # fmt: skip

    def check(self, sets: Mapping[str, PromptSet]) -> None:
        """Try all references before anything is sampled. DataError: unknown characters, or all of a set too long."""
        for name, prompts in sets.items():
            if (shortest := min(len(self.answer(prompt)) for prompt in prompts.prompts)) >= self.max_tokens:
                problem = f"{name}: no reference fits behind a chain of thought: the shortest has {shortest} tokens"
                raise DataError(problem, key="rollout.max_completion_tokens", value=self.max_tokens, fix="raise it")

    def tokens(self, text: str, name: str = "") -> IntArray:
        """Tokens of a text by itself. Raises DataError for characters the tokenizer does not know."""
        if text not in self.known:
            self.known[text] = np.array(encode([text], self.tokenizer, [name], "reward.likelihood")[0])
        return self.known[text]

    def answer(self, prompt: Prompt) -> IntArray:
        """Tokens of the reference as it stands behind a chain."""
        return self.tokens(f"{self.reward.opening}{prompt.reference}{self.reward.closing}", prompt.id)

    def place(self, prompt: Prompt, rollout: Rollout) -> tuple[TrainingSequence, str | None]:
        """The chain with the reference behind it; or the whole completion without it, and why."""
        whole, answer = TrainingSequence.of(prompt, rollout), self.answer(prompt)
        end = chain_end(whole.token_ids, self.reward.delimiter, self.tokenizer)
        if end is None or end + len(answer) > self.max_tokens:
            return whole, NO_DELIMITER if end is None else TOO_LONG
        return whole.with_answer(end, answer), None

    def gate(self, group: Group) -> Group:
        """The group with no score where the reference has no place, if such samples are to be dropped."""
        if self.reward.missing != "drop":
            return group
        judged = zip(group.verdicts, (self.place(group.prompt, r)[1] for r in group.rollouts), strict=True)
        return replace(group, verdicts=tuple(replace(v, score=None, reason=why) if why else v for v, why in judged))

    def answered(self, pairs: Iterable[tuple[Prompt, Rollout]], policy: Policy) -> list[Answered]:
        """Every sample with its reference, and what `policy` thinks of it."""
        placed = [(prompt, *self.place(prompt, rollout)) for prompt, rollout in pairs]
        asked = [replace(s, loss_mask=np.arange(len(s.token_ids)) >= s.answer_start) for _, s, why in placed if not why]
        found = iter(policy.score(asked, self.microbatch_tokens))
        guess = torch.tensor(-math.log(len(policy.model.get_output_embeddings().weight)), dtype=torch.float64)
        return [
            Answered(s, why, guess.repeat(len(self.answer(prompt))) if why else next(found).double())
            for prompt, s, why in placed
        ]

    def score(self, groups: Sequence[Group]) -> tuple[list[Group], list[TrainingSequence], dict[str, float]]:
        """Groups with the reward in the verdicts of their usable samples, what to train on of these, and metrics."""
        judge = (self.reward.under_reference and self.reference) or self.policy
        everything = self.answered([(g.prompt, r) for g in groups for r, _ in usable_samples(g)], judge)
        bare = self._without_chain(groups, judge) if self.reward.subtract_no_chain else [None] * len(groups)
        out, sequences, rest, weight = [], [], iter(everything), self.reward.weight
        for group, without in zip(groups, bare, strict=True):
            own = list(islice(rest, len(usable_samples(group))))
            lengths = torch.tensor([x.sequence.answer_start for x in own], dtype=torch.float64)
            found = torch.tensor([x.missing is None for x in own])
            scores = self.reward.scores([x.logprobs for x in own], lengths, found, without)
            for (sequence, _, _), share in zip(own, (weight * self.reward.shares(scores)).tolist(), strict=True):
                if not self.reward.answer_gradient:
                    sequence = sequence.with_answer(sequence.answer_start, np.empty(0, np.int64))
                sequences.append(replace(sequence, answer_share=share))
            values = dict(zip([x.sequence.index for x in own], scores.tolist(), strict=True))
            judged = zip(group.verdicts, [values.get(r.index) for r in group.rollouts], strict=True)
            out.append(replace(group, verdicts=tuple(v if x is None else added(v, weight, x) for v, x in judged)))
        missing = [x.missing for x in everything]
        return out, sequences, {
            "reward/likelihood/missing_frac": missing.count(NO_DELIMITER) / len(missing),
            "reward/likelihood/too_long_frac": missing.count(TOO_LONG) / len(missing),
            "reward/likelihood/token_logprob": float(torch.cat([x.logprobs for x in everything]).mean()),
            "reward/likelihood/chain_length/mean": float(np.mean([x.sequence.answer_start for x in everything])),
        }  # fmt: skip

    def _without_chain(self, groups: Sequence[Group], policy: Policy) -> list[Tensor]:
        """Log-probs of every group's reference behind an empty chain, [m] each."""
        chain = self.tokens(f"{self.reward.empty_chain}{self.reward.delimiter}")
        prompts = [(np.concatenate([g.prompt.token_ids, chain]), self.answer(g.prompt)) for g in groups]
        sequences = [TrainingSequence.given(prompt, answer[: self.max_tokens]) for prompt, answer in prompts]
        return [one.double() for one in policy.score(sequences, self.microbatch_tokens)]

    def figures(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], samples: int
    ) -> tuple[dict[str, tuple[float, float]], float]:
        """`summarise_references` of rollouts, `samples` a prompt; the fraction without a place for the reference."""
        every = self.answered(((prompts[n // samples], r) for n, r in enumerate(rollouts)), self.policy)
        sums = np.array([float(x.logprobs.sum()) for x in every]).reshape(-1, samples)
        lengths = np.array([x.sequence.answer_start for x in every]).reshape(-1, samples)
        found = summarise_references(sums, np.array([len(x.logprobs) for x in every[::samples]]), lengths)
        return found, float(np.mean([x.missing is not None for x in every]))
