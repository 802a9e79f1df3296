"""One learner step: old log-probs, then one optimiser update per part of the batch.

The loss of an update is   sum_i w_i sum_t (L_it + KL_it - c_H H_it)   over all sequences i of the
update on all ranks, with weights w from the aggregation. Nothing else normalises, so micro-batching,
bucketing, accumulation and rank count leave the gradient as it is. DDP averages gradients over ranks;
the loss is multiplied by their number to undo that.

Nothing here knows which algorithm runs: the pieces are called through `rlkit.algorithms.base`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlkit.algorithms.base import Aggregation, Loss, LossInputs, OldPolicy
from rlkit.algorithms.kl import KL
from rlkit.config.schema import LearnerConfig
from rlkit.errors import TrainingError
from rlkit.learner.assemble import StepBatch
from rlkit.learner.batching import (
    MicroBatch,
    TrainingSequence,
    collate,
    plan_microbatches,
    share_of_rank,
    split_updates,
)
from rlkit.learner.optimizer import learning_rate_factor, make_optimizer, set_learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The pieces of an algorithm that act inside the learner."""

    loss: Loss
    aggregation: Aggregation
    kl: KL
    old_policy: OldPolicy
    entropy_coefficient: float = 0.0


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
        largest = float(values.max()) if values.numel() else 0.0
        self.maxima[name] = max(self.maxima.get(name, 0.0), largest)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and maxima over all ranks; every rank must hold the same names."""
        names, peaks = sorted(self.sums), sorted(self.maxima)
        if accelerator.num_processes == 1:
            totals = [self.sums[n] for n in names]
            tops = [self.maxima[n] for n in peaks]
        else:
            device = accelerator.device
            table = torch.tensor([self.sums[n] for n in names], dtype=torch.float64, device=device)
            totals = accelerator.reduce(table, "sum").tolist()
            top = torch.tensor([self.maxima[n] for n in peaks], dtype=torch.float64, device=device)
            tops = accelerator.gather(top[None]).amax(dim=0).tolist() if peaks else []
        means = {n: s / c for n, (s, c) in zip(names, totals, strict=True) if c}
        return means | dict(zip(peaks, tops, strict=True))


def token_tensor(values: Sequence[Tensor], sequences: Sequence[TrainingSequence], indices: Sequence[int]) -> Tensor:
    """Lay per-sequence values [T_i] end to end as [n], loss tokens only."""
    return torch.cat([values[i][torch.from_numpy(sequences[i].loss_mask)] for i in indices] or [torch.empty(0)])


class Learner:
    """Holds the policy, its optimiser and the objective; `step` is collective over ranks."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        objective: Objective,
        config: LearnerConfig,
        accelerator: Accelerator,
        total_steps: int,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.objective = objective
        self.reference = reference
        self.total_updates = total_steps * config.updates_per_step
        self.optimizer_steps = 0
        optimizer = make_optimizer(
            policy,
            learning_rate=config.learning_rate,
            betas=config.betas,
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
        )
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)

    def step(self, batch: StepBatch, check_stop: Callable[[], None]) -> dict[str, float]:
        """Train on a batch; returns metrics, equal on every rank.

        `check_stop` may raise only before the first optimiser update, so that weights are never
        left between the updates of a step. Raises TrainingError on a non-finite gradient.
        """
        sequences = batch.sequences
        self.policy.train()
        updates = split_updates(batch.group, self.config.updates_per_step)
        parts = [self._local_microbatches(sequences, indices) for indices in updates]
        weights = self._weights(sequences, updates)
        local = sorted({i for part in parts for micro in part for i in micro.indices})
        old = self._old_logprobs(sequences, parts, local, updates=len(updates))
        meter = Meter()
        norms = []
        for number, part in enumerate(parts):
            rate = self.config.learning_rate * learning_rate_factor(
                self.optimizer_steps,
                schedule=self.config.schedule,
                warmup_steps=self.config.warmup_steps,
                total_steps=self.total_updates,
            )
            set_learning_rate(self.optimizer, rate)
            self.accumulate(
                sequences, part, weights, old, meter,
                check_stop if number == 0 else _never_stop,
                first=number == 0,
            )  # fmt: skip
            norms.append(self._apply())
        metrics = meter.reduce(self.accelerator)
        metrics["policy/grad_norm"] = sum(norms) / len(norms)
        metrics["learner/learning_rate"] = rate
        metrics["learner/optimizer_steps"] = float(self.optimizer_steps)
        metrics["learner/microbatches"] = float(sum(len(part) for part in parts))
        return metrics

    def accumulate(
        self,
        sequences: Sequence[TrainingSequence],
        microbatches: Sequence[MicroBatch],
        weights: Mapping[int, float],
        old: Mapping[int, Tensor] | None,
        meter: Meter,
        check_stop: Callable[[], None],
        *,
        first: bool,
    ) -> None:
        """Back-propagate one update's loss, micro-batch by micro-batch, into the gradients."""
        behavior = [torch.from_numpy(s.behavior_logprobs) for s in sequences]
        for number, micro in enumerate(microbatches):
            check_stop()
            last = number == len(microbatches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
                loss = self._loss(sequences, micro, weights, old, behavior, meter, first=first)
                self.accelerator.backward(loss * self.accelerator.num_processes)

    def _loss(
        self,
        sequences: Sequence[TrainingSequence],
        micro: MicroBatch,
        weights: Mapping[int, float],
        old: Mapping[int, Tensor] | None,
        behavior: Sequence[Tensor],
        meter: Meter,
        *,
        first: bool,
    ) -> Tensor:
        device = self.accelerator.device
        here = micro.to(device)
        entropy_coefficient = self.objective.entropy_coefficient
        logprobs, entropy = self._forward(self.policy, here, entropy_grad=entropy_coefficient != 0)
        mu = token_tensor(behavior, sequences, micro.indices).to(logprobs)
        anchor = logprobs.detach()
        if old is not None:
            anchor = torch.cat([old[i] for i in micro.indices]).to(logprobs)
        per_sequence = [sequences[i].advantage for i in micro.indices]
        per_token_weight = [weights[i] for i in micro.indices]
        out = self.objective.loss(
            LossInputs(
                logprobs=logprobs,
                old_logprobs=anchor,
                behavior_logprobs=mu,
                advantages=torch.tensor(per_sequence, device=device).to(logprobs)[here.sequence],
                sequence=here.sequence,
                sequences=len(micro.indices),
            )
        )
        objective = out.per_token
        observed = dict(out.metrics) | {"policy/entropy": entropy.detach()}
        if entropy_coefficient:
            objective = objective - entropy_coefficient * entropy
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self._forward(self.reference, here)
            penalty = self.objective.kl(logprobs, reference)
            objective = objective + penalty.per_token
            observed |= penalty.metrics
        if first:
            # Before the first update the learner's weights are the ones the newest tokens came from.
            difference = (logprobs.detach() - mu).double()
            observed["mismatch/logprob_absdiff/mean"] = difference.abs()
            observed["mismatch/kl"] = difference.exp() - 1 - difference
        observed["policy/loss"] = out.per_token.detach()
        # A rank without a micro-batch of its own runs an uncounted one: it adds nothing, under the same names.
        counted = len(logprobs) if micro.counted else 0
        for name, values in observed.items():
            meter.add(name, values[:counted])
        if first:
            meter.maximum("mismatch/logprob_absdiff/max", observed["mismatch/logprob_absdiff/mean"][:counted])
        token_weight = torch.tensor(per_token_weight, device=device).to(logprobs)[here.sequence]
        return (objective * token_weight).sum() * float(micro.counted)

    def _forward(self, policy: nn.Module, micro: MicroBatch, *, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        logprobs, entropy = policy(
            micro.input_ids, micro.position_ids, micro.head_positions, micro.targets, entropy_grad
        )
        return logprobs, entropy

    def _apply(self) -> float:
        limit = self.config.max_grad_norm or float("inf")
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), limit))
        if not math.isfinite(norm):
            problem = "the gradient is not finite; the weights were left as they were"
            fix = "lower learner.learning_rate, or look at the step's rollouts and rewards"
            raise TrainingError(problem, key="policy/grad_norm", value=norm, fix=fix)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        return norm

    def _local_microbatches(self, sequences: Sequence[TrainingSequence], indices: Sequence[int]) -> list[MicroBatch]:
        lengths = [sequences[i].total_tokens for i in indices]
        plan = plan_microbatches(lengths, self.config.max_tokens_per_microbatch)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [
            collate(sequences, [indices[j] for j in part], counted=counted)
            for part, counted in share_of_rank(plan, rank, world)
        ]

    def _weights(self, sequences: Sequence[TrainingSequence], updates: Sequence[Sequence[int]]) -> dict[int, float]:
        weights: dict[int, float] = {}
        for indices in updates:
            lengths = torch.tensor([sequences[i].loss_tokens for i in indices], dtype=torch.float64)
            weights |= zip(indices, self.objective.aggregation(lengths).tolist(), strict=True)
        return weights

    def _old_logprobs(
        self,
        sequences: Sequence[TrainingSequence],
        parts: Sequence[Sequence[MicroBatch]],
        local: Sequence[int],
        *,
        updates: int,
    ) -> dict[int, Tensor] | None:
        """Anchor log-probs of this rank's sequences, loss tokens only; None: equal to the current."""
        anchor = self.objective.old_policy
        if anchor.uses_current_weights and updates == 1:
            return None
        behavior = [torch.from_numpy(sequences[i].behavior_logprobs[sequences[i].loss_mask]) for i in local]

        def rescore() -> list[Tensor]:
            scored = dict(self.rescore(micro for part in parts for micro in part))
            return [scored[i] for i in local]

        return dict(zip(local, anchor(behavior, rescore), strict=True))

    @torch.no_grad()
    def rescore(self, microbatches: Iterator[MicroBatch]) -> Iterator[tuple[int, Tensor]]:
        """(sequence, its loss tokens' log-probs under the current weights), no gradient."""
        for micro in microbatches:
            logprobs, _ = self._forward(self.policy, micro.to(self.accelerator.device))
            counts = torch.bincount(micro.sequence, minlength=len(micro.indices)).tolist()
            yield from zip(micro.indices, logprobs.cpu().split(counts), strict=True)


def _never_stop() -> None:
    """Between the updates of one step there is no stopping."""
