"""The rollout worker against the real buffer and verifier pool; the engine is paced by the test."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest

from rewards import VerifierPool
from rlkit.buffer.protocol import GroupRequest
from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import EngineError
from rlkit.rollout.worker import RolloutWorker
from rlkit.types import Prompt, Rollout, SamplingParams, VersionSpan

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


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(
        {"exact": {"_target_": "rewards.exact.ExactMatch", "extract": "whole"}}, workers=1, timeout_s=20
    ) as made:
        yield made


@pytest.fixture
def buffer(tmp_path):
    with contextlib.closing(open_buffer(tmp_path)) as made:
        prompt = Prompt(id="p", text="?", token_ids=np.array([1]), reference="12", metadata={})
        made.request([GroupRequest(ordinal=k, prompt=prompt, samples=4) for k in range(2)])
        yield made


def open_buffer(folder):
    return SqlBuffer(
        f"sqlite:///{folder / 'b.db'}", payload_dir=folder / "payloads", prompts_per_step=2, max_staleness=0,
        slice_samples=2,
    )  # fmt: skip


def worker(buffer, engine, pool, name="w", timeout=60.0):
    return RolloutWorker(buffer, engine, pool, SAMPLING, worker_id=name, capacity=8, lease_timeout_s=timeout)


def test_a_round_hands_in_every_slice(buffer, pool):
    measured = asyncio.run(worker(buffer, PacedEngine(), pool).run_once())
    assert measured.keys() == {"time/generate", "time/score"} and buffer.stats().fenced_writes == 0
    groups = buffer.take(2)
    assert [[v.score for v in g.verdicts] for g in groups] == [[1.0] * 4] * 2
    assert asyncio.run(worker(buffer, PacedEngine(), pool).run_once()) == {}


def test_leases_are_renewed_while_the_engine_works(buffer, pool):
    asyncio.run(worker(buffer, PacedEngine(pause=0.3), pool, timeout=0.9).run_once())
    assert buffer.stats().fenced_writes == buffer.stats().expired_leases == 0
    assert buffer.take(2) is not None


def test_a_slice_lost_to_another_worker_is_thrown_away_and_the_round_goes_on(buffer, pool):
    slow = PacedEngine()

    def freeze(number: int) -> None:  # the whole process stands still: no renewal, and another worker takes over
        if number == 2:
            time.sleep(0.6)
            stolen.extend(buffer.lease("thief", 2, 60))

    stolen: list = []
    slow.before = freeze
    asyncio.run(worker(buffer, slow, pool, timeout=0.5).run_once())
    assert len(stolen) == 1
    assert buffer.stats().fenced_writes >= 1
    buffer.release(stolen)
    while asyncio.run(worker(buffer, PacedEngine(), pool, name="second").run_once()):
        pass
    assert [len(g.rollouts) for g in buffer.take(2)] == [4, 4]


def test_a_broken_engine_gives_its_leases_back(buffer, pool):
    with pytest.raises(EngineError, match="broke"):
        asyncio.run(worker(buffer, PacedEngine(fail_at=5), pool).run_once())
    asyncio.run(worker(buffer, PacedEngine(), pool).run_once())
    assert buffer.take(2) is not None and buffer.stats().fenced_writes == 0


def test_a_renewal_that_fails_ends_the_round(buffer, pool, monkeypatch):
    broken = worker(buffer, PacedEngine(pause=0.1), pool, timeout=0.3)
    monkeypatch.setattr(buffer, "renew", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(broken.run_once())


def test_an_engine_with_old_weights_gets_no_lease_that_asks_for_newer_ones(buffer, pool):
    for x in range(2):
        buffer.drop([x], "not wanted")
    prompt = Prompt(id="p", text="?", token_ids=np.array([1]), reference="12", metadata={})
    buffer.request([GroupRequest(ordinal=k, prompt=prompt, samples=4) for k in (2, 3)])
    asyncio.run(worker(buffer, PacedEngine(), pool).run_once())
    buffer.publish(1, [g.ordinal for g in buffer.take(2)])
    buffer.request([GroupRequest(ordinal=4, prompt=prompt, samples=4)])
    assert asyncio.run(worker(buffer, PacedEngine(version=0), pool).run_once()) == {}
    assert asyncio.run(worker(buffer, PacedEngine(version=1), pool).run_once()) and buffer.stats().fenced_writes == 0
