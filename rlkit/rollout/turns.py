"""One device for learner, worker and evaluator: they use it in turn, and a server gives its memory away meanwhile."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import filelock

from rlkit.config.schema import Config
from rlkit.errors import EngineError
from rlkit.rollout.engine import Engine

LOOK_S = 0.02


@dataclass(slots=True)
class Turns:
    """This process's side of a lock that ends with its holder. A learner's turn is a step, a worker's all requests."""

    lock: filelock.BaseFileLock
    limit_s: float
    check_stop: Callable[[], None]

    @classmethod
    def of(cls, config: Config, takes_turns: bool, check_stop: Callable[[], None]) -> Self | None:
        """None where every process has a device of its own, or shares one without turns."""
        if not takes_turns:
            return None
        place = Path(config.output_dir) / config.name / "device.lock"
        return cls(filelock.FileLock(place), config.rollout.wait_s, check_stop)

    @property
    def mine(self) -> bool:
        """Whether it is this process's turn."""
        return bool(self.lock.is_locked)

    async def take(self, engine: Engine | None = None) -> None:
        """Wait for the device, then wake the engine. EngineError when another process keeps it for `limit_s`."""
        deadline = time.monotonic() + self.limit_s
        while not self.mine:
            self.check_stop()
            try:
                self.lock.acquire(blocking=False)
            except filelock.Timeout:
                if time.monotonic() > deadline:
                    problem, fix = "another process of the run kept the device", "rlkit buffer shows who holds leases"
                    raise EngineError(problem, key="rollout.wait_s", value=self.limit_s, fix=fix) from None
                await asyncio.sleep(LOOK_S)
        if engine is not None:
            await engine.move(asleep=False)

    async def give(self, engine: Engine | None = None) -> None:
        """Send the engine to sleep, and let the next one have the device."""
        if engine is not None:
            await engine.move(asleep=True)
        self.lock.release()
