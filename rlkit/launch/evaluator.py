"""`rlkit evaluator`: evaluate the versions that a run's learner names, beside the training, each on its own weights."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rlkit.buffer.snapshots import Snapshot
from rlkit.config.schema import Config
from rlkit.evaluation.evaluate import evaluate
from rlkit.launch.worker import closing, open_engine, open_session, process_name
from rlkit.learner.likelihood import LikelihoodScorer
from rlkit.learner.setup import interruptible, open_buffer, open_pool
from rlkit.rollout.worker import POLL_S, REPORT_S


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Serve a run until it ends (0) or a signal comes: 128 + its number."""
    settings = config.evaluation
    key = "rollout.engine" if settings.engine is None else "evaluation.engine"

    def work(check_stop: Callable[[], None]) -> None:
        session, name = open_session(config, resolved, check_stop, key), process_name("evaluator")
        _, held_out = session.prompt_sets()
        sampling = session.sampling(settings.temperature, settings.seed)
        with (
            open_pool(config.reward) as pool, open_buffer(config) as buffer,
            open_engine(session, buffer, key, name, weight_transfer="rlkit_file") as (engine, policy, turns),
        ):  # fmt: skip
            beat = partial(buffer.report, name, {})
            likelihood = None if policy is None else LikelihoodScorer.of(session, policy)

            async def answer(step: int, snapshot: Snapshot) -> None:
                if turns is not None:
                    await turns.take(engine)
                started, metrics = time.perf_counter(), dict[str, float]()
                await engine.update_weights(snapshot.version, snapshot)
                for label, prompts in held_out.items():
                    metrics |= await evaluate(label, prompts.prompts, engine, pool, sampling, settings, likelihood)
                buffer.answer(step, snapshot.version, metrics | {"time/eval": time.perf_counter() - started})
                if turns is not None:
                    await turns.give(engine)

            async def serve() -> None:
                if turns is not None and turns.mine:
                    await turns.give(engine)
                while beat():
                    for step, snapshot in buffer.asked().items():
                        if snapshot is not None:
                            await _watched(answer(step, snapshot), check_stop, beat)
                    await _watched(asyncio.sleep(REPORT_S), check_stop, beat)

            asyncio.run(closing(engine, serve()))

    return interruptible(work)


async def _watched(work: Any, check_stop: Callable[[], None], beat: Callable[[], object]) -> None:
    """Await work, with a `beat` every REPORT_S; whatever `check_stop` raises ends it."""
    task, due = asyncio.ensure_future(work), time.monotonic() + REPORT_S
    try:
        while not task.done():
            check_stop()
            if time.monotonic() > due:
                beat()
                due = time.monotonic() + REPORT_S
            await asyncio.wait([task], timeout=POLL_S)
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
