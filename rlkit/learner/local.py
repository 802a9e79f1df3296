"""Rollouts and evaluations made by the learner's own process, between its steps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast

from rewards.pool import VerifierPool
from rlkit.buffer.sql import SqlBuffer
from rlkit.data.prompts import PromptSet
from rlkit.evaluation.evaluate import evaluate
from rlkit.learner.likelihood import LikelihoodScorer
from rlkit.learner.setup import Session
from rlkit.learner.update import Learner
from rlkit.rollout.engine import Engine
from rlkit.rollout.ranks import RankedEngine
from rlkit.rollout.worker import RolloutWorker


@dataclass(slots=True)
class LocalRollouts:
    """What the training loop has of an engine that shares its weights; `RemoteRollouts` is the other kind."""

    session: Session
    engine: Engine
    worker: RolloutWorker
    held_out: Mapping[str, PromptSet]
    likelihood: LikelihoodScorer | None

    @classmethod
    def of(
        cls, session: Session, learner: Learner, buffer: SqlBuffer, pool: VerifierPool | None,
        held_out: Mapping[str, PromptSet], likelihood: LikelihoodScorer | None,
    ) -> Self:  # fmt: skip
        """By the recipe, on the learner's model; with several ranks all of them sample."""
        config, engine = session.config, session.engine(learner.model)
        if (ranks := session.accelerator.num_processes) > 1:
            engine = cast(Engine, RankedEngine(engine, ranks))
        sampling = session.sampling(config.rollout.temperature, config.seed)
        capacity, timeout = config.prompts_per_step * config.samples_per_prompt, config.rollout.lease_timeout_s
        worker = RolloutWorker(buffer, engine, pool, sampling, "embedded-0", capacity, timeout)
        return cls(session, engine, worker, held_out, likelihood)

    async def run_once(self) -> dict[str, float] | None:
        """Sample and score what is requested; returns metrics, None if nothing is."""
        return await self.worker.run_once() or None

    async def begin_training(self) -> None:
        """Nothing else uses the device."""

    async def serve(self, version: int) -> None:
        """The present weights are `version`."""
        await self.engine.update_weights(version, None)

    async def evaluate(self, step: int | None) -> dict[int, dict[str, float]]:
        """Metrics of every held-out set at the present weights, those after `step`, by step; none if it is None."""
        if step is None:
            return {}
        settings = self.session.config.evaluation
        sampling, found = self.session.sampling(settings.temperature, settings.seed), dict[str, float]()
        started = time.perf_counter()
        for name, prompts in self.held_out.items():
            found |= await evaluate(
                name, prompts.prompts, self.engine, self.worker.pool, sampling, settings, self.likelihood
            )
        return {step: found | {"time/eval": time.perf_counter() - started}} if found else {}

    async def finish(self) -> dict[int, dict[str, float]]:
        """Evaluations that are still to come: none."""
        return {}

    def metrics(self) -> dict[str, float]:
        """How the other processes fare: there are none."""
        return {}
