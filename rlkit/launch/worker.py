"""`rlkit worker`: sample and score what a run's learner asks for, in a process of its own, on any machine.

It reaches the run through the buffer's database and the snapshot folder alone. Its engine is the recipe's: embedded, or
vLLM servers that it starts, watches and ends.
"""

import asyncio
import contextlib
import dataclasses
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlkit.buffer.sql import SqlBuffer
from rlkit.config.schema import Config
from rlkit.errors import EngineError
from rlkit.learner.model import resolve_dtype
from rlkit.learner.policy import Policy
from rlkit.learner.publisher import ARCHITECTURE
from rlkit.learner.setup import Session, interruptible, open_buffer, open_pool
from rlkit.rollout.engine import Engine
from rlkit.rollout.turns import Turns
from rlkit.rollout.verification import WeightCheck
from rlkit.rollout.worker import POLL_S, RolloutWorker

T = TypeVar("T")


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Serve a run until it ends (0) or a signal comes: 128 + its number."""

    def work(check_stop: Callable[[], None]) -> None:
        name = process_name("worker")
        session = open_session(config, resolved, check_stop, "rollout.engine")
        sampling = session.sampling(config.rollout.temperature, config.seed)
        rollout = config.rollout
        timeout_s, check = rollout.lease_timeout_s, WeightCheck(rollout.verify_tolerance, rollout.verify_every)
        with (
            open_pool(config.reward) as pool, open_buffer(config) as buffer,
            open_engine(session, buffer, "rollout.engine", name) as (engine, _, turns),
        ):  # fmt: skip
            worker = RolloutWorker(buffer, engine, pool, sampling, name, engine.capacity, timeout_s, check, turns)
            asyncio.run(closing(engine, worker.serve(check_stop)))

    return interruptible(work)


def process_name(role: str, pid: int | None = None) -> str:
    """Names this process, or another one of this machine, among all that serve a run."""
    return f"{role}-{os.uname().nodename}-{pid or os.getpid()}"


def open_session(config: Config, resolved: Mapping[str, Any], check_stop: Callable[[], None], key: str) -> Session:
    """A session that leaves the GPU to the servers, where there are any."""
    session = Session.open(config, resolved, check_stop)
    if not session.component(key).in_process:
        config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, device="cpu"))
        session = dataclasses.replace(session, config=config)
    return session


@contextlib.contextmanager
def open_engine(
    session: Session, buffer: SqlBuffer, key: str, name: str, **changed: Any
) -> Iterator[tuple[Engine, Policy | None, Turns | None]]:
    """The engine of the component at `key`, with no version's weights yet; the policy it is embedded on, if any.

    Where the run takes turns, it is this process's: a server measures the memory of its device while it starts.
    `changed`: settings of servers that are others here.
    """
    config, settings = session.config, session.component(key)
    # A run that has ended may be about to go on to more steps: its learner takes the end back, and starts slower.
    wait(
        lambda: buffer.report(name, {}) or buffer.stats().step >= config.steps,
        session,
        "no learner goes on with this run, which has ended",
    )
    turns = Turns.of(config, session.component("rollout.engine").takes_turns, session.check_stop)
    if settings.in_process:
        policy = session.policy(config.model, config.seed, config.rollout.temperature).to(session.accelerator.device)
        engine = settings.open(policy.model, session.tokenizer, session.check_stop)
        engine.version, engine.engine_id = -1, name
        yield engine, policy, turns
        return
    from rlkit.rollout.vllm_server import running

    settings = dataclasses.replace(settings, **changed)
    first = wait(buffer.snapshot, session, "the learner has published no weights yet")
    folder = Path(first.path).parent
    log = Path(config.output_dir) / config.name / "logs" / f"{name}-vllm.log"
    dtype = str(resolve_dtype(config.model.dtype, session.accelerator.device)).removeprefix("torch.")
    seed = zlib.crc32(f"{config.seed}/{name}".encode())  # two lives of a server with one seed would draw the same
    if turns is not None:
        asyncio.run(turns.take())
    with running(settings, folder / ARCHITECTURE, log, seed, dtype, session.check_stop) as urls:
        yield settings.open(urls, session.tokenizer, folder, name), None, turns


def wait(found: Callable[[], T | None], session: Session, problem: str) -> T:
    """The first value that is true; EngineError with the problem when there is none for `rollout.wait_s`."""
    limit_s = session.config.rollout.wait_s
    deadline, told = time.monotonic() + limit_s, False
    while not (value := found()):
        session.check_stop()
        if not told:
            print(f"waiting: {problem}", flush=True)
            told = True
        if time.monotonic() > deadline:
            fix = "is the learner running, on this database?"
            raise EngineError(problem, key="rollout.wait_s", value=limit_s, fix=fix)
        time.sleep(POLL_S)
    return value


async def closing(engine: Engine, work: Any) -> None:
    """Await work, then close the engine in the same event loop."""
    try:
        await work
    finally:
        await engine.close()
