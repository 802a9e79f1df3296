"""The rollout worker against the real buffer and verifier pool; the engine is paced by the test."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest
from paced import PacedEngine, open_buffer, worker

from rewards import VerifierPool
from rlkit.buffer.protocol import GroupRequest
from rlkit.buffer.snapshots import Snapshot
from rlkit.errors import EngineError
from rlkit.types import Prompt


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


class SentTo(PacedEngine):
    """Weights come from elsewhere: `label` says which version it finds."""

    awaiting = ("http://a",)
    label = 0

    async def update_weights(self, version, snapshot):
        self.version = self.label


def test_weights_sent_ahead_of_their_snapshot_wait_for_it(buffer, pool):
    buffer.stored(Snapshot(version=0, path="v0", checksum="0", size=1))
    it = worker(buffer, engine := SentTo(version=-1), pool)
    engine.label = 1  # the learner is a step further, or was, before it was started again
    assert not asyncio.run(it._follow())
    engine.label = 0
    assert asyncio.run(it._follow())
    buffer.end()
    asyncio.run(it._report({}))
    assert buffer.servers(30.0) == {"http://a"} and buffer.reports(30.0)[it.worker_id]["version"] == 0
