"""The training loop of rank 0; rollouts come from this process or from others."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from rewards.pool import VerifierPool
from rlkit.algorithms.base import Advantage, GroupFilter
from rlkit.budget.uniform import Budget
from rlkit.buffer.protocol import GroupRequest
from rlkit.buffer.sql import SqlBuffer
from rlkit.data.prompts import PromptOrder, PromptSet
from rlkit.errors import Interrupted, TrainingError, calling
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.assemble import assemble, usable_samples
from rlkit.learner.likelihood import LikelihoodScorer
from rlkit.learner.local import LocalRollouts
from rlkit.learner.remote import RemoteRollouts
from rlkit.learner.setup import Session
from rlkit.learner.update import Learner, never_stop
from rlkit.telemetry.environment import peak_memory_gb
from rlkit.telemetry.record import read_metrics
from rlkit.telemetry.rollouts import write_rollouts
from rlkit.telemetry.sinks import Telemetry
from rlkit.types import Group

FILTERED = "refused by algorithm.group_filter"


@dataclass
class Trainer:
    """Everything rank 0 drives; see `run`."""

    session: Session
    folder: Path
    learner: Learner
    prompts: PromptSet
    held_out: dict[str, PromptSet]
    buffer: SqlBuffer
    pool: VerifierPool | None
    telemetry: Telemetry

    def __post_init__(self) -> None:
        self.config = config = self.session.config
        self.order = PromptOrder(len(self.prompts), config.seed, config.data.train.shuffle)
        self.advantage: Advantage = self.session.component("algorithm.advantage")
        self.group_filter: GroupFilter | None = self.session.component("algorithm.group_filter")
        self.budget: Budget = self.session.component("budget")
        self.likelihood = LikelihoodScorer.of(self.session, self.learner.unwrapped, self.learner.reference)
        self.rollouts: LocalRollouts | RemoteRollouts
        if config.rollout.workers:
            self.rollouts = RemoteRollouts.of(self.session, self.learner, self.buffer, self.prompts)
        else:
            given = self.learner, self.buffer, self.pool, self.held_out, self.likelihood
            self.rollouts = LocalRollouts.of(self.session, *given)
        self.step = 0
        rows = read_metrics(self.folder)
        self.evaluated = {row.step for row in rows if any(name.startswith("eval/") for name in row.metrics)}
        self.saved_step: int | None = None
        self.updates_of_step, self.advantage_of_step = 0, dict[str, float]()  # states at the last published step
        self.started = time.perf_counter()  # less the seconds of earlier parts of the run

    def resume(self, previous: checkpoints.Checkpoint) -> None:
        """Go on from a checkpoint's counters."""
        self.step = self.saved_step = previous.step
        self.updates_of_step = previous.optimizer_steps
        getattr(self.advantage, "state", {}).update(previous.advantage)
        self.started -= previous.seconds

    async def run(self) -> None:
        """Train up to `config.steps`; on any exit the last finished step is in a checkpoint.

        Raises Interrupted at a safe point after a signal, TrainingError when it cannot go on.
        """
        config = self.config
        await self.rollouts.serve(self.buffer.watermark().version)
        try:
            await self.evaluate()
            while self.step < config.steps:
                self.session.check_stop()
                metrics = await self.train_step()
                # Before it is saved: resuming removes a row beyond the checkpoint, and cannot make a missing one.
                self.telemetry.log(self.step, metrics)
                if self.step % config.checkpoint.every_steps == 0 or self.step == config.steps:
                    self.telemetry.log(self.step, {"time/checkpoint": self.save()})
                await self.evaluate()
            self._log_evaluations(await self.rollouts.finish())
        except BaseException as error:
            # Weights changed but not yet published are never saved: their groups would be trained twice.
            untouched = self.learner.optimizer_steps == self.updates_of_step
            # Shards are gathered after a signal only: any other failure may be that of the other ranks, too.
            gathers = isinstance(error, Interrupted) or not self.learner.sharded
            if untouched and gathers and self.saved_step != self.step and self.step > 0:
                self.save()
            raise

    async def train_step(self) -> dict[str, float]:
        """One batch through the whole cycle; returns its metrics."""
        config, started = self.config, time.perf_counter()
        groups, refused, clock = await self.collect()
        await self.rollouts.begin_training()
        collected = time.perf_counter()
        sampled = {span.version for g in groups for r in g.rollouts for span in r.version_spans}
        groups, made, measured = self.likelihood.score(groups) if self.likelihood else (groups, [], {})
        sequences, metrics = assemble(
            groups, self.advantage, self.step, self.buffer.steps_of(sampled), made=made,
            penalties=self.learner.reward_penalties, mask_truncated=config.algorithm.mask_truncated,
        )  # fmt: skip
        broadcast_object_list([sequences], from_process=0)
        # With several ranks a step is not left half way: the others would wait in a collective.
        ranks = self.session.accelerator.num_processes
        metrics |= measured | self.learner.step(sequences, self.session.check_stop if ranks == 1 else never_stop)
        trained = time.perf_counter()
        version = self.buffer.next_version()
        self.buffer.publish(version, [g.ordinal for g in groups])
        await self.rollouts.serve(version)
        self.step += 1
        self.updates_of_step = self.learner.optimizer_steps
        self.advantage_of_step = dict(getattr(self.advantage, "state", {}))
        published = time.perf_counter()
        if config.telemetry.save_rollouts:
            advantages = {(s.group, s.index): s.advantage for s in sequences}
            path = self.folder / "rollouts" / f"step_{self.step}.parquet"
            write_rollouts(path, self.step, groups, advantages)
        tokens = sum(len(r.token_ids) for g in groups for r in g.rollouts)
        ended = time.perf_counter()
        metrics |= (
            clock
            | self.rollouts.metrics()
            | {
                "off_policy/dropped": float(len(refused)),
                "group/filtered_frac": refused.count(FILTERED) / (len(groups) + len(refused)),
                "time/wait_rollout": collected - started,
                "time/learner": trained - collected,
                "time/weight_sync": published - trained,
                "time/step": ended - started,
                "perf/tokens_per_s": tokens / (ended - started),
                "perf/tokens_per_s_per_device": tokens / (ended - started) / ranks,
                "perf/peak_mem_gb": peak_memory_gb(),
            }
        )
        if config.learner.updates_per_step == 1 and config.max_staleness == 0:
            # On-policy the ratio is 1: clipping cannot trigger, its share would say nothing.
            metrics = {k: v for k, v in metrics.items() if not k.startswith("policy/clip_frac/")}
        return metrics

    async def collect(self) -> tuple[list[Group], list[str], dict[str, float]]:
        """Take `prompts_per_step` groups to train on; refuse and replace others. With their reasons, and metrics."""
        wanted = self.config.prompts_per_step
        clock = dict[str, float]()
        usable, drawn, refused = list[Group](), list[Group](), list[str]()
        while missing := wanted - len(usable):
            self.request()
            while (taken := self.buffer.take(missing)) is None:
                if (measured := await self.rollouts.run_once()) is None:
                    states = self.buffer.stats().states
                    raise TrainingError("no group is ready and none is left to sample", key="buffer", value=states)
                clock |= {name: clock.get(name, 0.0) + value for name, value in measured.items()}
            may_filter = len(drawn) < self.config.algorithm.max_filter_draws * wanted
            if self.likelihood is not None:
                taken = [self.likelihood.gate(group) for group in taken]
            for group in taken:
                if reason := self._refusal(group, may_filter):
                    self.buffer.drop([group.ordinal], reason)
                    refused.append(reason)
                else:
                    usable.append(group)
            drawn += taken
            self._check_scored(drawn)
        clock["perf/sampled_tokens"] = float(sum(len(r.token_ids) for group in drawn for r in group.rollouts))
        return usable, refused, clock

    def _refusal(self, group: Group, may_filter: bool) -> str | None:
        """Why a group is not trained on, or None."""
        scores = torch.tensor([v.score for _, v in usable_samples(group)], dtype=torch.float64)
        if len(scores) < max(1, self.advantage.minimum_group_size):
            return "too few scored samples"
        if may_filter and self.group_filter is not None:
            with calling(self.group_filter, "algorithm.group_filter"):
                return None if self.group_filter(scores) else FILTERED
        return None

    def _check_scored(self, groups: list[Group]) -> None:
        verdicts = [v for g in groups for v in g.verdicts]
        reasons = [v.reason or "no reason given" for v in verdicts if v.score is None]
        share, limit = len(reasons) / len(verdicts), self.config.reward.max_unscored_frac
        if share > limit:
            most = max(set(reasons), key=reasons.count)
            problem = f"{share:.0%} of {len(verdicts)} samples could not be scored; most often: {most}"
            fix = "look at the reward on one row; raise reward.timeout_s if it is slow"
            raise TrainingError(problem, key="reward.max_unscored_frac", value=limit, fix=fix)

    def request(self) -> None:
        """Ask for as many groups as admission allows, in prompt order."""
        first = self.buffer.stats().next_ordinal
        last = first + self.buffer.capacity()
        while first < last:
            ordinals = range(first, min(last, first + self.config.prompts_per_step))
            prompts = [self.prompts.prompts[self.order.index(k)] for k in ordinals]
            names, total = [p.id for p in prompts], len(prompts) * self.config.samples_per_prompt
            with calling(self.budget, "budget"):
                samples = self.budget(names, total, partial(self.buffer.history, names))
            wanted = zip(ordinals, prompts, samples, strict=True)
            self.buffer.request([GroupRequest(ordinal=k, prompt=p, samples=n) for k, p, n in wanted])
            first = ordinals.stop

    async def evaluate(self) -> None:
        """Evaluate the held-out sets at the present weights if that is due, and log what is done."""
        settings, step = self.config.evaluation, self.step
        every = settings.every_steps > 0 and step % settings.every_steps == 0
        due = settings.at_start if step == 0 else every or step == self.config.steps
        self._log_evaluations(await self.rollouts.evaluate(step if due and step not in self.evaluated else None))

    def _log_evaluations(self, found: Mapping[int, Mapping[str, float]]) -> None:
        for step, metrics in found.items():
            if step not in self.evaluated:
                self.telemetry.log(step, metrics)
                self.evaluated.add(step)

    def save(self) -> float:
        """Checkpoint the last finished step and commit it in the buffer; returns seconds."""
        started = time.perf_counter()
        watermark = self.buffer.watermark()
        progress = {"step": self.step, "seconds": started - self.started, "watermark": asdict(watermark)}
        progress["advantage"] = self.advantage_of_step
        given = self.folder / "checkpoints", self.learner, self.session.tokenizer, progress
        checkpoints.save(*given, keep=self.config.checkpoint.keep)
        self.buffer.commit(watermark)
        self.saved_step = self.step
        return time.perf_counter() - started
