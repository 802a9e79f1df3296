"""The rollout worker: lease slices, sample them, have them scored, hand them in.

Slices are scored as soon as all their samples are there, while the engine goes on with the others. Leases are renewed
in the background; whatever ends the worker, leases it still holds are given back.
"""

import asyncio
import contextlib
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from rewards.base import Sample
from rewards.pool import VerifierPool
from rlkit.buffer.protocol import FencedError, Lease
from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import EngineError
from rlkit.rollout.engine import Engine, GenerationRequest
from rlkit.rollout.turns import Turns
from rlkit.rollout.verification import WeightCheck
from rlkit.types import Prompt, Rollout, SamplingParams, Verdict

POLL_S = 0.02
REPORT_S = 1.0
Work: TypeAlias = dict[asyncio.Task[dict[str, float]], int]  # slices under way, and their samples


@dataclass(slots=True)
class RolloutWorker:
    """Drives one engine and one verifier pool on slices of the buffer."""

    buffer: SqlBuffer
    engine: Engine
    pool: VerifierPool | None
    sampling: SamplingParams
    worker_id: str
    capacity: int  # samples of a round
    lease_timeout_s: float
    check: WeightCheck = field(default_factory=WeightCheck)
    turns: Turns | None = None  # where the engine shares its device with the learner
    sync_s: float = 0.0  # of the last update of weights
    served: str = ""  # checksum of the engine's weights

    async def run_once(self) -> dict[str, float]:
        """Lease up to `capacity` samples, generate, score and hand them in; returns metrics, none if there are none."""
        leases = self.lease(self.capacity)
        return await self.work(leases) if leases else {}

    async def serve(self, check_stop: Callable[[], None]) -> None:
        """Until the run ends or `check_stop` raises: keep the engine busy with what is requested.

        An engine that takes weights in flight has as many slices under way as it holds; another one samples its leases
        together, and takes weights between. Nothing is leased that asks for newer weights than the engine has.
        """
        under_way: Work = {}
        both = [
            asyncio.create_task(self._report(under_way)),
            asyncio.create_task(self._keep_busy(under_way, check_stop)),
        ]
        try:
            done, _ = await asyncio.wait(both, return_when=FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for task in (*both, *under_way):
                task.cancel()
            await asyncio.gather(*both, *under_way, return_exceptions=True)

    async def _keep_busy(self, under_way: Work, check_stop: Callable[[], None]) -> NoReturn:
        while True:
            check_stop()
            for task in [task for task in under_way if task.done()]:
                del under_way[task]
                task.result()  # raises what ended it
            here = self.turns is None or bool(under_way) or await self._has_turn(self.turns)
            if here and (self.engine.in_flight or not under_way) and await self._follow():
                free = self.capacity - sum(under_way.values())
                leases = self.lease(free) if free > 0 else []
                for part in [[lease] for lease in leases] if self.engine.in_flight else [leases] * bool(leases):
                    task = asyncio.create_task(self.work(part))
                    under_way[task] = sum(lease.stop - lease.start for lease in part)
            if under_way:
                await asyncio.wait(under_way, timeout=POLL_S, return_when=FIRST_COMPLETED)
            else:
                await asyncio.sleep(POLL_S)

    async def _has_turn(self, turns: Turns) -> bool:
        """Take the device while there is something to sample, and leave it to the others while there is not."""
        states = self.buffer.stats().states
        wanted = states["requested"] + states["leased"] > 0  # others' leases may expire
        if wanted and not turns.mine:
            await turns.take(self.engine)
        elif turns.mine and not wanted:
            await turns.give(self.engine)
        return wanted

    async def _report(self, under_way: Work) -> None:
        """Tell the buffer how this worker fares, and look after its engine, until the run ends."""
        began, then, used = None, time.monotonic(), 0.0
        while True:
            now, samples = time.monotonic(), sum(under_way.values())
            began = then if began is None and samples else began
            used, then = used + (now - then) * min(1.0, samples / self.capacity), now
            status = {
                "version": self.engine.version, "samples": samples, "sync_s": self.sync_s,
                "idle_frac": 1 - used / (now - began) if began is not None else 0.0,
                "verified_version": self.check.verified_version, "difference": self.check.difference,
            }  # fmt: skip
            if not self.buffer.report(self.worker_id, status, getattr(self.engine, "awaiting", ())):
                return
            await self.engine.healthy()
            await asyncio.sleep(REPORT_S)

    def lease(self, most: int) -> list[Lease]:
        """Leases of up to `most` samples that the engine's weights are new enough for."""
        return self.buffer.lease(self.worker_id, most, self.lease_timeout_s, self.engine.version)

    async def _follow(self) -> bool:
        """Give the engine the newest weights; False while there are none, or while they are being replaced."""
        newest, started = self.buffer.snapshot(), time.perf_counter()
        if newest is not None and (newest.version, newest.checksum) != (self.engine.version, self.served):
            try:
                await self.engine.update_weights(newest.version, newest)
            except EngineError:
                if newest == self.buffer.snapshot():
                    raise
                return False  # its file was no longer needed
            if self.engine.version != newest.version:
                return False  # the learner has sent others meanwhile, whose snapshot is still to come
            self.sync_s, self.served = time.perf_counter() - started, newest.checksum
            await self.check(self.engine, newest)
        return newest is not None

    async def work(self, leases: list[Lease]) -> dict[str, float]:
        """Generate, score and hand in the samples of leases; returns metrics."""
        started = time.perf_counter()
        held = {lease.lease_id: lease for lease in leases}
        renewing = asyncio.create_task(self._renew(held))
        scoring = list[asyncio.Task[None]]()
        try:
            async for finished in self._finished_slices(leases):
                if renewing.done():
                    renewing.result()  # raises what ended it
                with self._giving_up(held):
                    self.buffer.submit_many([work for work in finished if work[0].lease_id in held])
                if kept := [work for work in finished if work[0].lease_id in held]:
                    scoring.append(asyncio.create_task(self._score(kept, held)))
            generated = time.perf_counter()
            await asyncio.gather(*scoring)
        except BaseException:  # raised again, cancellation too: what is still held goes back at once
            for task in scoring:
                task.cancel()
            await asyncio.gather(*scoring, return_exceptions=True)
            self.buffer.release(list(held.values()))
            raise
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])
        scored = time.perf_counter() - generated  # from the last token to the last verdict
        return {"time/generate": generated - started, "time/score": scored}

    async def _finished_slices(self, leases: list[Lease]) -> AsyncIterator[list[tuple[Lease, list[Rollout]]]]:
        """Generate all samples of `leases`; yield the slices whose last samples have just come."""
        owner = {(a.ordinal, i): a for a in leases for i in range(a.start, a.stop)}
        keyed = ((o, i, lease.prompt.token_ids) for (o, i), lease in owner.items())
        requests = [GenerationRequest(ordinal=o, index=i, prompt_token_ids=tokens) for o, i, tokens in keyed]
        arrived: dict[int, list[Rollout]] = {lease.lease_id: [] for lease in leases}
        async with contextlib.aclosing(self.engine.generate(requests, self.sampling)) as stream:
            async for rollouts in stream:
                finished = []
                for rollout in rollouts:
                    lease = owner[rollout.ordinal, rollout.index]
                    (have := arrived[lease.lease_id]).append(rollout)
                    if len(have) == lease.stop - lease.start:
                        finished.append((lease, sorted(have, key=lambda r: r.index)))
                if finished:
                    yield finished

    async def _score(self, slices: list[tuple[Lease, list[Rollout]]], held: dict[int, Lease]) -> None:
        pairs = [(lease.prompt, rollout) for lease, rollouts in slices for rollout in rollouts]
        verdicts = iter(await score_rollouts(self.pool, [p for p, _ in pairs], [r for _, r in pairs]))
        work = [(lease, [next(verdicts) for _ in rollouts]) for lease, rollouts in slices]
        with self._giving_up(held):
            self.buffer.score_many([(lease, scored) for lease, scored in work if lease.lease_id in held])
        for lease, _ in slices:
            held.pop(lease.lease_id, None)

    async def _renew(self, held: dict[int, Lease]) -> None:
        """Renew what is held, three times a timeout, until cancelled."""
        while True:
            await asyncio.sleep(self.lease_timeout_s / 3)
            with self._giving_up(held):
                self.buffer.renew(list(held.values()), self.lease_timeout_s)

    @contextlib.contextmanager
    def _giving_up(self, held: dict[int, Lease]) -> Iterator[None]:
        """A lost lease costs its slice (another worker has it now, the buffer counts it), not the round."""
        try:
            yield
        except FencedError as error:
            for lease in error.lost:
                held.pop(lease.lease_id, None)


async def score_rollouts(
    pool: VerifierPool | None, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
) -> list[Verdict]:
    """Verdicts of aligned prompts and rollouts, in their order; a score of 0 where there are no verifiers."""
    if pool is None:
        return [Verdict(score=0.0) for _ in rollouts]
    samples = [
        Sample(p.text, r.text, p.reference, p.metadata, r.finish_reason, len(r.token_ids), f"{r.ordinal}/{r.index}")
        for p, r in zip(prompts, rollouts, strict=True)
    ]
    scores = await pool.score(samples)
    return [Verdict(score=s.score, parts=dict(s.parts), answer=s.answer, reason=s.reason) for s in scores]
