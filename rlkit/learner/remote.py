"""Rollouts and evaluations made by other processes, as the learner sees them.

They meet in the buffer's database; weights travel as snapshots. `rlkit worker` and `rlkit evaluator` are the others.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from rlkit.buffer.sql import SqlBuffer
from rlkit.data.prompts import PromptSet
from rlkit.errors import TrainingError
from rlkit.learner.broadcast import Broadcast
from rlkit.learner.publisher import Publisher
from rlkit.learner.setup import Session
from rlkit.learner.update import Learner
from rlkit.rollout.turns import Turns
from rlkit.rollout.verification import PROBE_TOKENS
from rlkit.rollout.worker import POLL_S, REPORT_S
from rlkit.telemetry.record import read_mapping
from rlkit.types import IntArray

LATELY_S = 30.0  # a worker that has not reported for longer is not counted


@dataclass(slots=True)
class RemoteRollouts:
    """What the training loop has of workers and an evaluator elsewhere; `LocalRollouts` is the other kind."""

    buffer: SqlBuffer
    publisher: Publisher
    broadcast: Broadcast
    learner: Learner
    probe: IntArray  # tokens on which engines are compared with the learner
    limit_s: float
    check_stop: Callable[[], None]
    supervisor: Path  # its file of restarts
    evaluates: bool
    turns: Turns | None = None  # where engines share the learner's device
    version: int = 0
    moved: tuple[Any, float] = (None, 0.0)  # what the buffer held, and since when
    waited_s: float = 0.0  # since the last metrics
    measured: float = field(default_factory=time.monotonic)  # when those were
    looked: float = 0.0  # when new servers were looked for

    @classmethod
    def of(cls, session: Session, learner: Learner, buffer: SqlBuffer, prompts: PromptSet) -> Self:
        """By the recipe; the probe is the first training prompts."""
        config, rollout = session.config, session.config.rollout
        folder = Path(config.output_dir) / config.name
        snapshots = Path(rollout.snapshot_dir, config.name) if rollout.snapshot_dir else folder / "snapshots"
        publisher = Publisher(buffer, snapshots.absolute(), rollout.snapshot_gb)
        publisher.prepare(learner.model)
        engine: Any = session.component("rollout.engine")
        broadcast = Broadcast(buffer, learner, engine, LATELY_S)
        length = min(PROBE_TOKENS, rollout.max_completion_tokens)  # a server has room for this and a prompt
        probe = np.resize(np.concatenate([p.token_ids for p in prompts.prompts[:PROBE_TOKENS]]), max(2, length))
        return cls(
            buffer, publisher, broadcast, learner, probe, rollout.wait_s, session.check_stop,
            folder / "supervisor.json", bool(config.data.eval),
            Turns.of(config, engine.takes_turns, session.check_stop),
        )  # fmt: skip

    async def run_once(self) -> dict[str, float]:
        """Wait a little; no metrics. TrainingError when nothing has moved in the buffer for `limit_s`."""
        await self._wait(self.buffer.stats())
        return {}

    async def _wait(self, state: Any) -> None:
        self.check_stop()
        now = time.monotonic()
        if state != self.moved[0]:
            self.moved = state, now
        elif now - self.moved[1] > self.limit_s:
            problem = f"nothing came from workers or evaluator for {self.limit_s:g} s; {self.buffer.stats()}"
            fix = "see their logs (logs/ in the run folder), and `rlkit buffer` for who holds which lease"
            raise TrainingError(problem, key="rollout.wait_s", value=self.limit_s, fix=fix)
        if now - self.looked > REPORT_S:
            self.broadcast.serve(self.version)
            self.looked = now
        await asyncio.sleep(POLL_S)
        self.waited_s += time.monotonic() - now

    async def begin_training(self) -> None:
        """A batch is there: wait for the device."""
        if self.turns is not None:
            await self.turns.take()

    async def serve(self, version: int) -> None:
        """The present weights are `version`; the device may be others' until the next training."""
        self.broadcast.serve(version)
        await self.publisher.publish(version, self.learner, self.probe)
        self.version = version
        if self.turns is not None and self.turns.mine:
            torch.cuda.empty_cache()  # nothing without a GPU
            await self.turns.give()

    async def evaluate(self, step: int | None) -> dict[int, dict[str, float]]:
        """Have the present weights, those after `step` if that is not None, evaluated; returns all that is done."""
        if step is not None and self.evaluates:
            self.buffer.ask(step, self.version)
        return self.buffer.answers()

    async def finish(self) -> dict[int, dict[str, float]]:
        """Wait for the last snapshot and every evaluation; then the others may go."""
        await self.publisher.done()
        if asked := self.buffer.asked():
            print(f"waiting for the evaluator, which has steps {', '.join(map(str, asked))} to do")
        while asked := self.buffer.asked():
            at_work = any("idle_frac" not in status for status in self.buffer.reports(LATELY_S).values())
            await self._wait(time.monotonic() if at_work else len(asked))  # an evaluation may take its time
        self.buffer.end()
        return self.buffer.answers()

    def metrics(self) -> dict[str, float]:
        """How workers and queues fare."""
        stats, reports = self.buffer.stats(), list(self.buffer.reports(LATELY_S).values())
        workers = [x for x in reports if "idle_frac" in x]
        now = time.monotonic()
        idle, self.waited_s, self.measured = self.waited_s / (now - self.measured), 0.0, now
        found = {
            "workers/learner_idle_frac": idle,
            **{f"queue/{state}": float(stats.states[state]) for state in ("requested", "leased", "scored")},
            "queue/expired_leases": float(stats.expired_leases), "queue/fenced_writes": float(stats.fenced_writes),
            "workers/count": float(len(workers)),
            "workers/restarts": float(sum(read_mapping(self.supervisor).values())),
        }  # fmt: skip
        if workers:
            found["workers/idle_frac"] = sum(x["idle_frac"] for x in workers) / len(workers)
            found["workers/weight_sync_s"] = max(x["sync_s"] for x in workers)
            found["weights/verified_version"] = min(x["verified_version"] for x in workers)
            found["weights/probe_absdiff_max"] = max(x["difference"] for x in workers)
        return found
