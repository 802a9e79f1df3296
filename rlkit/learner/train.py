"""`rlkit train`: set everything up, run the loop, report. Also `accelerate launch -m rlkit ...`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from rlkit.buffer.protocol import Watermark
from rlkit.buffer.sql import SqlBuffer
from rlkit.config.schema import Config
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.loop import Trainer
from rlkit.learner.run_folder import RunFolder, open_run_folder
from rlkit.learner.setup import Session, message_of, model_at, open_pool, preflight
from rlkit.learner.sft import start_model
from rlkit.learner.stopping import interruptible
from rlkit.learner.update import Learner, never_stop
from rlkit.telemetry.environment import write_environment
from rlkit.telemetry.report import write_report
from rlkit.telemetry.sinks import Telemetry
from rlkit.telemetry.summary import print_summary, write_summary

START = Watermark(step=0, version=0, next_ordinal=0, refused=0)


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Train a recipe; returns 0, or 128 + signal number after SIGINT or SIGTERM."""

    def train(check_stop: Callable[[], None]) -> None:
        session = Session.open(config, resolved, check_stop)
        try:
            if not session.accelerator.is_main_process:
                _follow(dataclasses.replace(session, check_stop=never_stop))
                return
            with open_run_folder(config, resolved) as folder:
                _lead(session, folder)
                write_summary(folder.path)
                if config.telemetry.report:
                    write_report(folder.path)
                print_summary(folder.path)
        finally:
            session.accelerator.end_training()

    return interruptible(train)


def _lead(session: Session, folder: RunFolder) -> None:
    """Rank 0. Whatever bad input can break is tried before minutes go into a warm start."""
    config = session.config
    write_environment(folder.path)
    previous = checkpoints.newest(folder.checkpoints)
    train, held_out = session.prompt_sets()
    for name, prompts in {"data.train": train, **held_out}.items():
        print(message_of(name, prompts))
        if name != "data.train" and (shared := train.shared_with(prompts)):
            print(f"{name}: {shared} prompts are among the training prompts as well")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(open_pool(config.reward))
        asyncio.run(preflight(pool, train.prompts))
        learner = _open_learner(session, previous)
        if session.accelerator.num_processes > 1:
            stack.callback(broadcast_object_list, [None], from_process=0)
        buffer = SqlBuffer(
            config.buffer.url or f"sqlite:///{(folder.path / 'buffer.db').absolute()}",
            payload_dir=folder.path / "payloads",
            prompts_per_step=config.prompts_per_step,
            max_staleness=config.max_staleness,
            slice_samples=config.rollout.slice_samples,
            keep_payloads=config.buffer.keep_payloads,
        )
        stack.enter_context(contextlib.closing(buffer))
        buffer.rollback(previous.watermark or START if previous else START)
        telemetry = Telemetry.open(
            config.telemetry,
            folder.path,
            name=config.name,
            total_steps=config.steps,
            config=dict(session.resolved),
            resume_step=None if not folder.resuming else 0 if previous is None else previous.step,
        )
        stack.enter_context(telemetry)
        trainer = Trainer(session, folder, learner, train, held_out, buffer, pool, telemetry)
        if previous is not None:
            trainer.resume(previous)
            print(f"resuming from {previous.path} (step {previous.step})")
        asyncio.run(trainer.run())


def _follow(session: Session) -> None:
    """Ranks other than 0: train on every batch rank 0 sends, until it sends None."""
    config = session.config
    learner = _open_learner(session, checkpoints.newest(Path(config.output_dir) / config.name / "checkpoints"))
    while True:
        message: list[Any] = [None]
        broadcast_object_list(message, from_process=0)
        if message[0] is None:
            return
        learner.step(message[0], never_stop)


def _open_learner(session: Session, previous: checkpoints.Checkpoint | None) -> Learner:
    """The learner at the start of the run, or at its newest checkpoint."""
    start = start_model(session)
    learner = session.learner(start if previous is None else model_at(start, previous.path), start)
    if previous is not None:
        previous.restore(learner)
    return learner
