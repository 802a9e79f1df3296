"""One learner step: old log-probs, then one optimiser update per part of the batch.

The loss of an update is   sum_i w_i sum_t (L_it + KL_it - c_H H_it)   over all its sequences i on all ranks, with
weights w from the aggregation; nothing else normalises. DDP and FSDP average gradients over ranks; the loss is
multiplied by their number to undo that.

A `GroupLoss` F(s_1 .. s_N) needs all scores s at once: they are found first, without gradient, and gathered over ranks;
then c_k = dF/ds_k / |o_k| is constant, and the update back-propagates   sum_k c_k sum_t logprob_kt,   whose gradient is
that of F, token by token and so cut as any other.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from rlkit.algorithms.base import Aggregation, GroupLoss, Loss, LossInputs, OldPolicy, group_sum
from rlkit.algorithms.kl import KL
from rlkit.algorithms.likelihood import LikelihoodReward
from rlkit.algorithms.losses.policy_gradient import PolicyGradientLoss, sequence_weights
from rlkit.config.schema import LearnerConfig
from rlkit.errors import TrainingError, calling
from rlkit.learner.batching import MicroBatch, TrainingSequence, collate, plan_microbatches, share_of_rank, split_groups
from rlkit.learner.policy import Policy
from rlkit.learner.shards import shard, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The pieces of an algorithm that act inside the learner."""

    loss: Loss | GroupLoss
    aggregation: Aggregation
    kl: KL
    old_policy: OldPolicy
    entropy_coefficient: float = 0.0
    likelihood: LikelihoodReward | None = None


def never_stop() -> None:
    """A `check_stop` for stretches that are not left half way."""


def learning_rate(step: int, config: LearnerConfig, total_steps: int) -> float:
    """At optimiser step `step` (0-based): linear up to the peak, then constant, or linear or half-cosine down to 0."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * ((step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shares = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * shares[config.schedule]


class Meter:
    """Token means, sums and maxima over micro-batches, then over ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add token values [n] to a mean."""
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + float(values.double().sum()), count + values.numel())

    def maximum(self, name: str, values: Tensor) -> None:
        """Fold token values [n] into a maximum."""
        largest = float(values.max()) if values.numel() else -math.inf
        self.maxima[name] = max(self.maxima.get(name, -math.inf), largest)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and maxima over all ranks; every rank must hold the same names."""
        names, peaks = sorted(self.sums), sorted(self.maxima)
        table = partial(torch.tensor, dtype=torch.float64, device=accelerator.device)
        totals = accelerator.reduce(table([self.sums[n] for n in names]), "sum").tolist()
        means = {n: s / c for n, (s, c) in zip(names, totals, strict=True) if c}
        tops = accelerator.gather(table([[self.maxima[n] for n in peaks]])).amax(dim=0).tolist()
        return means | {n: top for n, top in zip(peaks, tops, strict=True) if top != -math.inf}


@dataclass(eq=False)
class Learner:
    """Holds the policy, its optimiser and the objective; `step` is collective over ranks."""

    policy: Policy
    reference: Policy | None
    objective: Objective
    config: LearnerConfig
    accelerator: Accelerator
    total_steps: int
    optimizer_steps: int = 0

    def __post_init__(self) -> None:
        self.unwrapped, self.model = self.policy, self.policy.model
        self.sharded = self.config.sharded and self.accelerator.num_processes > 1
        # Layers run twice in a pass that shares prompts: not on every rank, and each time is a collective of FSDP.
        self.share_prompts = self.policy.can_share_prompts and not self.sharded
        if self.sharded:
            shard(self.policy, self.accelerator)
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        decayed = {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.config.weight_decay}
        others = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}  # norms, biases
        groups, betas = [x for x in (decayed, others) if x["params"]], cast(tuple[float, float], self.config.betas)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.config.epsilon, fused=True)  # lr: see `step`
        self.optimizer = self.accelerator.prepare(optimizer)
        self.policy = self.policy if self.sharded else self.accelerator.prepare(self.policy)
        alone = (self.reference is None or self.objective.kl.in_reward) and self.objective.entropy_coefficient == 0
        alone = alone and not getattr(self.objective.likelihood, "answer_gradient", False)
        loss: Any = self.objective.loss
        self.group_loss: GroupLoss | None = loss if getattr(loss, "whole_groups", False) else None
        self.token_loss: Loss = PolicyGradientLoss() if self.group_loss else loss
        proportional = self.group_loss is not None or getattr(loss, "proportional_to_advantage", False)
        self.skips_zero_advantage = self.config.skip_zero_advantage and alone and proportional

    def step(self, sequences: Sequence[TrainingSequence], check_stop: Callable[[], None]) -> dict[str, float]:
        """Train on a batch; returns metrics, equal on every rank. Raises TrainingError on a non-finite gradient.

        `check_stop` is asked before the first optimiser update only: weights are never left between two updates.
        """
        self.policy.train()
        updates = split_groups([s.group for s in sequences], self.config.updates_per_step)
        parts = self.anchored([self.microbatches(sequences, indices) for indices in updates])
        meter, norms = Meter(), []
        for number, (part, indices) in enumerate(zip(parts, updates, strict=True)):
            rate = learning_rate(self.optimizer_steps, self.config, self.total_steps * self.config.updates_per_step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            part = self.with_slopes(part, sequences, indices, meter)
            self.accumulate(part, meter, never_stop if number else check_stop, first=number == 0)
            norms.append(self._apply())
        return meter.reduce(self.accelerator) | {
            "policy/grad_norm": sum(norms) / len(norms),
            "learner/learning_rate": rate,
            "learner/optimizer_steps": float(self.optimizer_steps),
            "learner/microbatches": float(sum(len(part) for part in parts)),
        }

    def together(self, work: Callable[[Self], Any], here: Callable[[Self], Any] | None = None) -> Any:
        """Rank 0: do `work`, or `here`, which gathers the same; if there are shards, the other ranks do `work` now."""
        if self.sharded:
            broadcast_object_list([work], from_process=0)
        return (here or work)(self)

    def weights(self, sequences: Sequence[TrainingSequence], indices: Sequence[int]) -> dict[int, float]:
        """Sequence -> weight of its tokens, in an update on sequences[indices]."""
        lengths = torch.tensor([sequences[i].loss_tokens for i in indices], dtype=torch.float64)
        aggregation: Any = self.objective.aggregation
        group = [torch.tensor([sequences[i].group for i in indices])]
        with calling(aggregation, "algorithm.aggregation"):
            weights = aggregation(lengths, *group if getattr(aggregation, "needs_groups", False) else ())
            return dict(zip(indices, weights.tolist(), strict=True))

    def microbatches(self, sequences: Sequence[TrainingSequence], indices: Sequence[int]) -> list[MicroBatch]:
        """This rank's part of an update on sequences[indices].

        Where nothing but A L acts on a token, sequences with A = 0 (dead groups) add exactly 0: they count in the
        weights' denominators and are not computed; one is if all are such, so that the optimiser sees a gradient.
        """
        weights = self.weights(sequences, indices)
        if self.skips_zero_advantage:
            shortest = min(indices, key=lambda i: sequences[i].total_tokens)
            alive = [i for i in indices if sequences[i].advantage != 0.0]
            groups = {sequences[i].group for i in alive}
            indices = ([i for i in indices if sequences[i].group in groups] if self.group_loss else alive) or [shortest]
        lengths = [sequences[i].total_tokens for i in indices]
        ranks = self.accelerator.num_processes
        prompts = [sequences[i].prompt_key for i in indices] if self.share_prompts else None
        plan = plan_microbatches(lengths, self.config.max_tokens_per_microbatch, ranks, prompts)
        share = share_of_rank(plan, self.accelerator.process_index, ranks)
        return [
            collate(sequences, [indices[j] for j in part], weights, counted=counted, share_prompts=self.share_prompts)
            for part, counted in share
        ]

    def anchored(self, parts: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """The updates' micro-batches with the anchor's log-probs, unless those equal the current ones."""
        anchor = self.objective.old_policy
        done = int(anchor.uses_current_weights)
        later = [micro for part in parts[done:] for micro in part]
        behavior = [one for micro in later for one in micro.behavior_logprobs.split(micro.counts)]
        old = iter(anchor(behavior, lambda: [one for micro in later for one in self._rescore(micro)]))
        given = [[replace(m, old_logprobs=torch.cat([next(old) for _ in m.counts])) for m in x] for x in parts[done:]]
        return parts[:done] + given

    def with_slopes(
        self, part: list[MicroBatch], sequences: Sequence[TrainingSequence], indices: Sequence[int], meter: Meter
    ) -> list[MicroBatch]:
        """An update's micro-batches as they are; for a `GroupLoss` with -c_k / w_k in the place of advantages.

        The token loss -A logprob, weighed by w_k, is then c_k logprob, whatever the aggregation. Collective.
        """
        if self.group_loss is None:
            return part
        scores = torch.zeros(len(sequences), dtype=torch.float64)
        for micro in part:
            if micro.old_logprobs is None:
                continue  # the current ones: s = 0
            drift = torch.cat(self._rescore(micro)).double() - micro.old_logprobs.double()
            if micro.counted:
                scores[micro.indices] = torch.stack([d.mean() for d in drift.split(micro.counts)])
            meter.add("policy/kl_old", (drift.expm1() - drift)[: len(drift) if micro.counted else 0])
        scores = self.accelerator.reduce(scores.to(self.accelerator.device), "sum").cpu().requires_grad_()
        group = torch.tensor([sequences[i].group for i in indices]).unique(return_inverse=True)[1]
        advantages = torch.tensor([sequences[i].advantage for i in indices], dtype=torch.float64)
        with calling(self.group_loss, "algorithm.loss"):
            loss = self.group_loss(scores[indices], advantages, group)
            slopes = torch.autograd.grad(loss, scores)[0]
        meter.add("policy/loss", loss.detach().reshape(1))
        meter.maximum("policy/sequence_slope/max", slopes.abs() * (group.max() + 1))
        negated = [-slopes[m.indices] / torch.tensor(m.counts) for m in part]
        return [replace(m, advantages=c[m.sequence] / m.weights) for m, c in zip(part, negated, strict=True)]

    @torch.no_grad()
    def _rescore(self, micro: MicroBatch) -> list[Tensor]:
        logprobs: Tensor = self.policy(micro.to(self.accelerator.device))[0]
        return list(logprobs[: len(micro.sequence)].cpu().split(micro.counts))

    def reward_penalties(self, sequences: Sequence[TrainingSequence]) -> tuple[Tensor, dict[str, float]]:
        """What a KL that belongs in the reward takes off each score [N], and its metrics. Not collective."""
        kl, count = self.objective.kl, len(sequences)
        if self.reference is None or not kl.in_reward:
            return torch.zeros(count, dtype=torch.float64), {}
        reference = torch.cat(self.reference.score(sequences, self.config.max_tokens_per_microbatch))
        behavior = torch.cat([torch.from_numpy(s.behavior_logprobs[s.loss_mask]) for s in sequences])
        with calling(kl, "algorithm.kl"):
            out = kl(behavior.to(reference), reference)
        owner = torch.arange(count).repeat_interleave(torch.tensor([s.loss_tokens for s in sequences]))
        penalties = group_sum(out.per_token.double(), owner, count)
        return penalties, {name: float(values.double().mean()) for name, values in out.metrics.items()}

    def accumulate(
        self, microbatches: Sequence[MicroBatch], meter: Meter, check_stop: Callable[[], None], *, first: bool
    ) -> None:
        """Back-propagate one update's loss, micro-batch by micro-batch, into the gradients."""
        for number, micro in enumerate(microbatches):
            check_stop()
            last = number == len(microbatches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
                loss = self._loss(micro.to(self.accelerator.device), meter, first=first)
                self.accelerator.backward(loss * self.accelerator.num_processes)

    def _loss(self, micro: MicroBatch, meter: Meter, *, first: bool) -> Tensor:
        entropy_coefficient = self.objective.entropy_coefficient
        everything = self.policy(micro, entropy_coefficient != 0)
        (logprobs, answers), (entropy, _) = (x.tensor_split([len(micro.sequence)]) for x in everything)
        behavior = micro.behavior_logprobs.to(logprobs)
        old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs.to(logprobs)
        inputs = LossInputs(
            logprobs=logprobs, old_logprobs=old, behavior_logprobs=behavior, advantages=micro.advantages.to(logprobs),
            sequence=micro.sequence, sequences=len(micro.counts),
        )  # fmt: skip
        with calling(self.token_loss, "algorithm.loss"):
            out = self.token_loss(inputs)
        if out.per_token.shape != logprobs.shape:
            problem, name = "the loss must give one number a token", type(self.token_loss).__name__
            expected = f"shape {tuple(logprobs.shape)}; got {tuple(out.per_token.shape)}"
            raise TrainingError(problem, key="algorithm.loss", value=name, expected=expected)
        objective, observed = out.per_token, dict(out.metrics) | {"policy/entropy": entropy.detach()}
        if self.group_loss is None:
            observed["policy/loss"] = objective.detach()
        if entropy_coefficient:
            objective = objective - entropy_coefficient * entropy
        if self.reference is not None and not self.objective.kl.in_reward:
            with torch.no_grad():
                reference = self.reference(micro)[0][: len(logprobs)]
            with calling(self.objective.kl, "algorithm.kl"):
                penalty = self.objective.kl(logprobs, reference)
            objective = objective + penalty.per_token
            observed |= penalty.metrics
        # A rank without a micro-batch of its own runs an uncounted one: it adds nothing, under the same names.
        counted = len(logprobs) if micro.counted else 0
        if first:
            # Before the first update the learner's weights are the ones the newest tokens came from.
            difference = (logprobs.detach() - behavior).double()[:counted][micro.fresh[:counted]]
            meter.add("mismatch/logprob_absdiff/mean", difference.abs())
            meter.add("mismatch/kl", difference.exp() - 1 - difference)
            meter.maximum("mismatch/logprob_absdiff/max", difference.abs())
        for name, values in observed.items():
            meter.add(name, values[:counted])
        total = (objective * micro.weights.to(logprobs)).sum() - self._answer_rewards(micro, inputs, answers)
        return total * float(micro.counted)

    def _answer_rewards(self, micro: MicroBatch, inputs: LossInputs, answers: Tensor) -> Tensor:
        """sum_i w_i share_i R_i(theta) over answers with log-probs `answers` [m]; times pi(z) / mu(z) off-policy."""
        likelihood, nothing = self.objective.likelihood, answers.sum() * 0
        if likelihood is None or not len(answers):
            return nothing
        weights = answers.new_tensor(micro.answer_weights)
        if not getattr(self.objective.loss, "needs_fresh_samples", False):
            weights = weights * sequence_weights(inputs, likelihood.max_importance_weight)
        parts = zip(answers.split(micro.answer_counts), weights, strict=True)
        return sum((weight * likelihood.reward(own) for own, weight in parts if len(own)), nothing)

    def _apply(self) -> float:
        limit = self.config.max_grad_norm or float("inf")
        norm = float(whole(self.accelerator.clip_grad_norm_(self.policy.parameters(), limit)))
        if not math.isfinite(norm):
            problem = "the gradient is not finite; the weights were left as they were"
            fix = "lower learner.learning_rate, or look at the step's rollouts and rewards"
            raise TrainingError(problem, key="policy/grad_norm", value=norm, fix=fix)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        return norm
