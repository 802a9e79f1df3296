"""A rollout worker on a real buffer, with an engine paced by the test."""

from __future__ import annotations

import asyncio

import numpy as np

from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import EngineError
from rlkit.rollout.worker import RolloutWorker
from rlkit.types import Rollout, SamplingParams, VersionSpan

SAMPLING = SamplingParams(temperature=1.0, max_tokens=4, seed=0, stop_token_ids=())


class PacedEngine:
    """Gives every request the same completion, `pause` seconds after the one before."""

    engine_id = "paced"

    def __init__(self, pause: float = 0.0, version: int = 0, fail_at: int | None = None) -> None:
        self.pause, self.version, self.fail_at = pause, version, fail_at
        self.before = lambda number: None

    async def generate(self, requests, sampling):
        for number, request in enumerate(requests):
            await asyncio.sleep(self.pause)
            self.before(number)
            if number == self.fail_at:
                raise EngineError("the engine broke")
            rollout = Rollout(
                ordinal=request.ordinal,
                index=request.index,
                token_ids=np.array([5, 6]),
                behavior_logprobs=np.zeros(2, dtype=np.float32),
                loss_mask=np.ones(2, dtype=np.bool_),
                segments=np.zeros(2, dtype=np.int64),
                version_spans=(VersionSpan(start=0, end=2, version=self.version),),
                finish_reason="stop",
                engine_id=self.engine_id,
                text="12",
            )
            yield [rollout]


def open_buffer(folder):
    return SqlBuffer(
        f"sqlite:///{folder / 'b.db'}", payload_dir=folder / "payloads", prompts_per_step=2, max_staleness=0,
        slice_samples=2,
    )  # fmt: skip


def worker(buffer, engine, pool, name="w", timeout=60.0):
    return RolloutWorker(buffer, engine, pool, SAMPLING, worker_id=name, capacity=8, lease_timeout_s=timeout)
