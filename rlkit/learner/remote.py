"""Rollouts from other processes: `rlkit worker` is one, and the learner's side of it.

They meet in the buffer's database; weights travel as snapshots. A worker may run on any machine that reaches both.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from rlkit.buffer.sql import SqlBuffer
from rlkit.config.schema import Config
from rlkit.errors import TrainingError
from rlkit.learner.publisher import Publisher
from rlkit.learner.setup import Session, interruptible, open_buffer, open_pool
from rlkit.rollout.worker import POLL_S, RolloutWorker


@dataclass(slots=True)
class RemoteRollouts:
    """What the training loop has of workers elsewhere, in the place of a `RolloutWorker` of its own."""

    buffer: SqlBuffer
    publisher: Publisher
    model: torch.nn.Module
    limit_s: float
    check_stop: Callable[[], None]
    moved: tuple[Any, float] = (None, 0.0)  # what the buffer held, and since when

    @classmethod
    def of(cls, session: Session, buffer: SqlBuffer, model: torch.nn.Module) -> Self:
        """By the recipe."""
        config, rollout = session.config, session.config.rollout
        folder = Path(rollout.snapshot_dir or Path(config.output_dir) / config.name / "snapshots").absolute()
        publisher = Publisher(buffer, folder, rollout.snapshot_gb)
        return cls(buffer, publisher, model, rollout.wait_s, session.check_stop)

    async def run_once(self) -> dict[str, float]:
        """Wait a little. TrainingError when nothing has moved in the buffer for `limit_s`."""
        self.check_stop()
        stats, now = self.buffer.stats(), time.monotonic()
        if stats != self.moved[0]:
            self.moved = stats, now
        elif now - self.moved[1] > self.limit_s:
            problem = f"no worker has handed in anything for {self.limit_s:g} s; groups: {stats.states}"
            fix = "see the workers' logs (logs/ in the run folder), and `rlkit buffer` for who holds which lease"
            raise TrainingError(problem, key="rollout.wait_s", value=self.limit_s, fix=fix)
        await asyncio.sleep(POLL_S)
        return {"time/generate": 0.0, "time/score": 0.0, "perf/sampled_tokens": 0.0}

    async def publish(self, version: int) -> None:
        """The learner's present weights are `version`."""
        await self.publisher.publish(version, self.model)

    async def done(self) -> None:
        """The last snapshot is whole, or its failure raised."""
        await self.publisher.done()


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """`rlkit worker`: serve a run until a signal comes; returns 128 + its number."""

    def work(check_stop: Callable[[], None]) -> None:
        session = Session.open(config, resolved, check_stop)
        policy = session.policy(config.model, config.seed, config.rollout.temperature)
        engine = session.engine(policy.model.to(session.accelerator.device))
        engine.version = -1  # its weights are nobody's yet
        name = f"{os.uname().nodename}-{os.getpid()}"
        with open_pool(config.reward) as pool, open_buffer(config) as buffer:
            sampling = session.sampling(config.rollout.temperature, config.seed)
            capacity = config.rollout.worker_samples
            timeout_s = config.rollout.lease_timeout_s
            worker = RolloutWorker(buffer, engine, pool, sampling, name, capacity, timeout_s)
            asyncio.run(worker.serve(check_stop))

    return interruptible(work)
