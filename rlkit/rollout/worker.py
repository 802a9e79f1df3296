"""The rollout worker: lease slices, sample them, have them scored, hand them in.

It meets the learner in the buffer only. Slices are scored as soon as all their samples are there,
while the engine goes on with the others. Leases are renewed in the background; whatever ends the
worker, leases it still holds are given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rewards.pool import VerifierPool
from rlkit.buffer.protocol import Lease, VersionedBuffer
from rlkit.errors import EngineError
from rlkit.rollout.engine import Engine, GenerationRequest
from rlkit.rollout.scoring import score_rollouts
from rlkit.types import Rollout, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkReport:
    """What one round of a worker did; seconds of wall-clock."""

    samples: int
    tokens: int
    generate_seconds: float
    score_wait_seconds: float  # after the last token, until the last verdict


class RolloutWorker:
    """Drives one engine and one verifier pool on slices of the buffer."""

    def __init__(
        self,
        buffer: VersionedBuffer,
        engine: Engine,
        pool: VerifierPool,
        sampling: SamplingParams,
        *,
        worker_id: str,
        capacity: int,
        lease_timeout_s: float,
    ) -> None:
        self.buffer = buffer
        self.engine = engine
        self.pool = pool
        self.sampling = sampling
        self.worker_id = worker_id
        self.capacity = capacity
        self.lease_timeout_s = lease_timeout_s

    async def run_once(self) -> WorkReport | None:
        """Lease up to `capacity` samples, generate, score and hand them in; None if there are none."""
        leases = self.buffer.lease(self.worker_id, self.capacity, self.lease_timeout_s)
        if not leases:
            return None
        newest = max(lease.min_version for lease in leases)
        if self.engine.version < newest:
            self.buffer.release(leases)
            raise EngineError(
                f"engine {self.engine.engine_id} is behind the lease",
                key="engine version",
                value=self.engine.version,
                expected=f"{newest} or newer",
            )
        started = time.perf_counter()
        open_leases = {(lease.ordinal, lease.start): lease for lease in leases}
        scoring: list[asyncio.Task[None]] = []
        tokens = 0
        try:
            async with self._heartbeat(open_leases):
                async for lease, rollouts in self._finished_slices(leases):
                    tokens += sum(len(r.token_ids) for r in rollouts)
                    self.buffer.submit(lease, rollouts)
                    scoring.append(asyncio.create_task(self._score(lease, rollouts, open_leases)))
                generated = time.perf_counter()
                await asyncio.gather(*scoring)
        except BaseException:
            for task in scoring:
                task.cancel()
            await asyncio.gather(*scoring, return_exceptions=True)
            self.buffer.release(list(open_leases.values()))
            raise
        return WorkReport(
            samples=sum(lease.stop - lease.start for lease in leases),
            tokens=tokens,
            generate_seconds=generated - started,
            score_wait_seconds=time.perf_counter() - generated,
        )

    async def _finished_slices(self, leases: list[Lease]) -> AsyncIterator[tuple[Lease, list[Rollout]]]:
        """Generate all samples of `leases`; yield each lease when its last sample is there."""
        owner = {(a.ordinal, i): a for a in leases for i in range(a.start, a.stop)}
        requests = [
            GenerationRequest(ordinal=o, index=i, prompt_token_ids=lease.prompt.token_ids)
            for (o, i), lease in owner.items()
        ]
        arrived: dict[int, list[Rollout]] = {lease.lease_id: [] for lease in leases}
        async with contextlib.aclosing(self.engine.generate(requests, self.sampling)) as stream:
            async for rollout in stream:
                lease = owner[rollout.ordinal, rollout.index]
                have = arrived[lease.lease_id]
                have.append(rollout)
                if len(have) == lease.stop - lease.start:
                    yield lease, sorted(have, key=lambda r: r.index)

    async def _score(self, lease: Lease, rollouts: list[Rollout], open_leases: dict[tuple[int, int], Lease]) -> None:
        verdicts = await score_rollouts(self.pool, [lease.prompt] * len(rollouts), rollouts)
        self.buffer.score(lease, verdicts)
        del open_leases[lease.ordinal, lease.start]

    @contextlib.asynccontextmanager
    async def _heartbeat(self, open_leases: dict[tuple[int, int], Lease]) -> AsyncIterator[None]:
        """Renew the open leases three times a timeout while the block runs."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(self.lease_timeout_s / 3)
                self.buffer.renew(list(open_leases.values()), self.lease_timeout_s)

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
