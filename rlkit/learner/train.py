"""`rlkit train`: set everything up, run the loop, report. Also `accelerate launch -m rlkit ...`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from rewards.pool import VerifierPool
from rlkit.buffer.protocol import Watermark
from rlkit.buffer.sql import SqlBuffer
from rlkit.config.components import build
from rlkit.config.schema import Config
from rlkit.data.order import PromptOrder
from rlkit.errors import Interrupted
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.loop import Trainer, follow
from rlkit.learner.model import load_tokenizer
from rlkit.learner.run_folder import RunFolder, open_run_folder
from rlkit.learner.setup import (
    load_learner,
    load_prompt_sets,
    message_of,
    model_at,
    open_pool,
    preflight,
    sampling_params,
    start_accelerator,
)  # fmt: skip
from rlkit.learner.sft import start_model
from rlkit.learner.stopping import StopSignals
from rlkit.learner.update import Learner
from rlkit.rollout.worker import RolloutWorker
from rlkit.telemetry.environment import write_environment
from rlkit.telemetry.report import print_summary, write_report, write_summary
from rlkit.telemetry.sinks import Telemetry

START = Watermark(step=0, version=0, next_ordinal=0, refused=0)


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Train a recipe; returns 0, or 128 + signal number after SIGINT or SIGTERM."""
    accelerator = start_accelerator(config.learner)
    with StopSignals() as signals:
        try:
            if accelerator.is_main_process:
                with contextlib.closing(open_run_folder(config, resolved)) as folder:
                    _lead(config, resolved, folder, accelerator, signals.check)
                    write_summary(folder.path)
                    if config.telemetry.report:
                        write_report(folder.path)
                    print_summary(folder.path)
            else:
                _follow(config, resolved, accelerator)
        except Interrupted as stopped:
            print(stopped)
            return signals.exit_code
        finally:
            accelerator.end_training()
    return 0


def _lead(
    config: Config,
    resolved: Mapping[str, Any],
    folder: RunFolder,
    accelerator: Accelerator,
    check_stop: Callable[[], None],
) -> None:
    """Rank 0. Whatever bad input can break is tried before minutes go into a warm start."""
    write_environment(folder.path)
    previous = checkpoints.newest(folder.checkpoints)
    tokenizer = load_tokenizer(config.model)
    train, held_out = load_prompt_sets(config, tokenizer)
    for name, prompts in {"data.train": train, **held_out}.items():
        print(message_of(prompts.left_out, name, len(prompts)))
        if name != "data.train" and (shared := train.shared_with(prompts)):
            print(f"{name}: {shared} prompts are among the training prompts as well")
    with contextlib.ExitStack() as stack:
        pool: VerifierPool = stack.enter_context(open_pool(config.reward))
        asyncio.run(preflight(pool, train.prompts))
        start = start_model(config, resolved, accelerator, check_stop)
        source = start if previous is None else model_at(start, previous.path)
        model, learner = load_learner(config, accelerator, tokenizer, source, start)
        if accelerator.num_processes > 1:
            stack.callback(broadcast_object_list, [None], from_process=0)
        buffer = stack.enter_context(contextlib.closing(_open_buffer(config, folder)))
        buffer.rollback(previous.state.watermark or START if previous else START)
        telemetry = stack.enter_context(
            Telemetry.open(
                config.telemetry,
                folder.path,
                name=config.name,
                total_steps=config.steps,
                config=dict(resolved),
                resume_step=None if not folder.resuming else 0 if previous is None else previous.state.step,
            )
        )
        engine = build(config.rollout.engine, key="rollout.engine").open(model, tokenizer, check_stop)
        sampling = sampling_params(tokenizer, config, temperature=config.rollout.temperature, seed=config.seed)
        evaluation = config.evaluation
        trainer = Trainer(
            config=config,
            folder=folder,
            accelerator=accelerator,
            model=model,
            tokenizer=tokenizer,
            learner=learner,
            advantage=build(config.algorithm.advantage, key="algorithm.advantage"),
            budget=build(config.budget, key="budget"),
            prompts=train,
            order=PromptOrder(len(train), config.seed, config.data.train.shuffle),
            held_out=held_out,
            buffer=buffer,
            engine=engine,
            pool=pool,
            worker=RolloutWorker(
                buffer,
                engine,
                pool,
                sampling,
                worker_id="embedded-0",
                capacity=config.prompts_per_step * config.samples_per_prompt,
                lease_timeout_s=config.rollout.lease_timeout_s,
            ),
            telemetry=telemetry,
            check_stop=check_stop,
            evaluation_sampling=sampling_params(
                tokenizer, config, temperature=evaluation.temperature, seed=evaluation.seed
            ),
        )
        if previous is not None:
            restore(learner, model, previous)
            trainer.resume(previous.state)
            print(f"resuming from {previous.path} (step {previous.state.step})")
        asyncio.run(_run(trainer))


async def _run(trainer: Trainer) -> None:
    await trainer.engine.update_weights(trainer.buffer.watermark().version, None)
    try:
        await trainer.run()
    finally:
        await trainer.engine.close()


def restore(learner: Learner, model: PreTrainedModel, previous: checkpoints.Checkpoint) -> None:
    """Optimiser, counters and generators of a checkpoint whose weights the model has already."""
    checkpoints.restore_optimizer(learner.optimizer, checkpoints.parameter_names(model), previous.optimizer)
    checkpoints.restore_rng(previous.rng)
    learner.optimizer_steps = previous.state.optimizer_steps


def _follow(config: Config, resolved: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Ranks other than 0."""
    start = start_model(config, resolved, accelerator, lambda: None)
    previous = checkpoints.newest(Path(config.output_dir) / config.name / "checkpoints")
    source = start if previous is None else model_at(start, previous.path)
    model, learner = load_learner(config, accelerator, load_tokenizer(config.model), source, start)
    if previous is not None:
        restore(learner, model, previous)
    follow(accelerator, learner)


def _open_buffer(config: Config, folder: RunFolder) -> SqlBuffer:
    return SqlBuffer(
        config.buffer.url or f"sqlite:///{(folder.path / 'buffer.db').absolute()}",
        payload_dir=folder.path / "payloads",
        prompts_per_step=config.prompts_per_step,
        max_staleness=config.max_staleness,
        slice_samples=config.rollout.slice_samples,
        keep_payloads=config.buffer.keep_payloads,
    )
