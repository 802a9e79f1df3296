"""Evaluations asked for and answered, reports, and the end, on both databases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from buffer_work import START, Buffer, Clock, finish, request, train

from rlkit.buffer.snapshots import Snapshot
from rlkit.launch.worker import open_engine

pytestmark = pytest.mark.usefixtures("database")


def stored(buffer: Buffer, version: int) -> Snapshot:
    snapshot = Snapshot(version=version, path=f"v{version}", checksum="00", size=1, probe=([4, 5], [-1.5]))
    buffer.stored(snapshot)
    return snapshot


def step(buffer: Buffer) -> None:
    request(buffer, 2, samples=2)
    finish(buffer, buffer.lease("a", 4, 60.0))
    train(buffer)


def test_a_version_is_kept_until_its_evaluation_is_there(buffer: Buffer) -> None:
    first = stored(buffer, 0)
    buffer.ask(0, 0)
    buffer.ask(0, 7)  # asked before: nothing changes
    for version in (1, 2):
        step(buffer)
        stored(buffer, version)
    assert buffer.asked() == {0: first}
    assert [x.version for x in buffer.discard()] == [1]
    buffer.answer(0, 0, {"eval/x/avg@4": 0.5})
    assert (buffer.asked(), buffer.answers()) == ({}, {0: {"eval/x/avg@4": 0.5}})
    assert [x.version for x in buffer.discard()] == [0]


def test_an_evaluation_waits_for_its_snapshot_and_a_rollback_takes_it_back(buffer: Buffer) -> None:
    step(buffer)
    buffer.ask(1, 1)
    assert buffer.asked() == {1: None}
    buffer.rollback(START)
    assert buffer.asked() == {}


def test_an_answer_for_weights_of_a_dead_lineage_is_not_that_of_the_new_one(buffer: Buffer) -> None:
    """The learner died and is back at step 1 before the evaluator is done with the weights of the first step 1."""
    step(buffer)
    buffer.ask(1, 1)
    buffer.rollback(START)
    step(buffer)
    again = buffer.watermark().version
    buffer.ask(1, again)
    buffer.answer(1, 1, {"eval/x/avg@4": 0.0})
    assert buffer.answers() == {}
    buffer.answer(1, again, {"eval/x/avg@4": 0.5})
    assert buffer.answers() == {1: {"eval/x/avg@4": 0.5}}


def test_reports_age_and_hear_of_the_end(buffer: Buffer, clock: Clock) -> None:
    assert buffer.report("worker", {"samples": 1.0}) and buffer.report("worker", {"samples": 2.0})
    assert buffer.reports(30.0) == {"worker": {"samples": 2.0}}
    clock.now += 31
    assert buffer.reports(30.0) == {}
    buffer.end()
    assert not buffer.report("worker", {})
    buffer.rollback(START)  # a new part of the run
    assert buffer.report("worker", {})


@pytest.mark.parametrize("steps", [0, 4])
def test_a_worker_of_a_run_that_goes_on_to_more_steps_waits_for_its_learner(buffer: Buffer, steps: int) -> None:
    """The end of the first part is still there when the worker of the next one starts."""
    buffer.end()
    waits, engine = list[int](), SimpleNamespace()

    def check_stop() -> None:
        waits.append(1)
        if len(waits) == 3:
            buffer.rollback(START)

    embedded = SimpleNamespace(in_process=True, takes_turns=False, open=lambda *_: engine)
    policy = SimpleNamespace(to=lambda _: SimpleNamespace(model=None))
    rollout = SimpleNamespace(temperature=1.0, wait_s=30.0, engine=None)
    session = SimpleNamespace(
        config=SimpleNamespace(steps=steps, model=None, seed=0, rollout=rollout), component=lambda _: embedded,
        accelerator=SimpleNamespace(device="cpu"), tokenizer=None, policy=lambda *_: policy, check_stop=check_stop,
    )  # fmt: skip
    with open_engine(session, buffer, "rollout.engine", "worker") as (opened, _, _):  # type: ignore[arg-type]
        assert opened is engine and len(waits) == (3 if steps else 0)
