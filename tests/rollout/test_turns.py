"""Learner and engine on one device: never both at a time, nobody waits for a dead process, everything is sampled."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from paced import PacedEngine, open_buffer, worker
from runs import metrics, settings, trained

from rlkit.buffer.protocol import GroupRequest
from rlkit.buffer.snapshots import Snapshot
from rlkit.cli import main
from rlkit.config.compose import load
from rlkit.config.verify import verify
from rlkit.errors import ConfigError, EngineError
from rlkit.rollout.turns import Turns
from rlkit.types import Prompt

HOLDER = """
import filelock, sys, time
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def turns(place: Path, limit_s: float = 30.0) -> Turns:
    return Turns(filelock.FileLock(place), limit_s, lambda: None)


def test_a_killed_process_leaves_its_turn_and_a_living_one_is_not_waited_for_without_end(tmp_path: Path) -> None:
    place = tmp_path / "device.lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(EngineError, match="rollout.wait_s"):
            asyncio.run(turns(place, 0.2).take())
        mine = turns(place)

        async def wait() -> None:
            taking = asyncio.create_task(mine.take())
            await asyncio.sleep(0.1)
            assert not taking.done()
            other.kill()
            await taking

        asyncio.run(wait())
        assert mine.mine
        asyncio.run(mine.give())
        assert not mine.mine
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()


class Sleeper(PacedEngine):
    """Fails where it samples asleep, or without its turn."""

    in_flight = True

    def __init__(self, place: Path) -> None:
        super().__init__(pause=0.01)
        self.place, self.asleep, self.moves = place, False, list[bool]()

    async def move(self, asleep: bool) -> None:
        self.asleep = asleep
        self.moves.append(asleep)

    async def update_weights(self, version: int, snapshot: Snapshot) -> None:
        assert not self.asleep
        self.version = version

    async def healthy(self) -> None: ...

    async def generate(self, requests, sampling):
        async for rollouts in super().generate(requests, sampling):
            assert not self.asleep
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(self.place).acquire(blocking=False)
            yield rollouts


def test_a_worker_keeps_its_turn_while_there_is_something_to_sample_and_no_longer(tmp_path: Path) -> None:
    place, prompt = tmp_path / "device.lock", Prompt(id="p", text="?", token_ids=np.array([1]), reference="12")
    engine = Sleeper(place)

    async def serve(buffer) -> None:
        learner, own = turns(place), turns(place)
        await own.take()  # as while its server starts
        one = worker(buffer, engine, None)
        one.turns = own
        serving = asyncio.create_task(one.serve(lambda: None))
        for step in range(3):
            buffer.request([GroupRequest(ordinal=2 * step + k, prompt=prompt, samples=4) for k in range(2)])
            end = time.monotonic() + 30
            while (groups := buffer.take(2)) is None:
                assert time.monotonic() < end and not serving.done()
                await asyncio.sleep(0.01)
            await learner.take()
            assert engine.asleep and not own.mine
            buffer.publish(step + 1, [g.ordinal for g in groups])
            file = Snapshot(version=step + 1, path=str(tmp_path / f"v{step + 1}"), checksum="x", size=1)
            buffer.stored(file)
            await asyncio.sleep(0.1)
            assert engine.asleep
            await learner.give()
        buffer.end()
        await serving

    with contextlib.closing(open_buffer(tmp_path)) as buffer:
        buffer.stored(Snapshot(version=0, path=str(tmp_path / "v0"), checksum="x", size=1))
        asyncio.run(asyncio.wait_for(serve(buffer), 60))
    assert engine.moves == [True] + [False, True] * 2 or engine.moves == [False, True] * 3


@pytest.mark.slow
def test_a_run_whose_processes_take_turns(tmp_path: Path) -> None:
    more = ["steps=6", "max_staleness=1", "rollout.workers=1", "rollout.engine.takes_turns=true"]
    assert main(["train", *settings(tmp_path, "run", *more)]) == 0
    assert trained(tmp_path / "run") == list(range(24))
    assert max(row.get("off_policy/lag/max", 0) for row in metrics(tmp_path / "run")) <= 1
    assert (tmp_path / "run" / "device.lock").exists()


def test_ranks_do_not_take_turns() -> None:
    with pytest.raises(ConfigError, match="1 with rollout.engine.takes_turns"):
        verify(load("quickstart_async", ["rollout.engine.takes_turns=true", "learner.processes=2"])[0])
