"""`rlkit train`: set everything up, run the loop, report. Also `accelerate launch -m rlkit ...`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkit.buffer.protocol import Watermark
from rlkit.buffer.sql import SqlBuffer
from rlkit.config.components import build
from rlkit.config.schema import Config, ModelConfig
from rlkit.data.order import PromptOrder
from rlkit.errors import Interrupted
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.loop import Trainer, follow
from rlkit.learner.model import load_model, load_tokenizer, resolve_dtype
from rlkit.learner.policy import Policy
from rlkit.learner.run_folder import RunFolder, open_run_folder
from rlkit.learner.setup import (
    build_advantage,
    build_objective,
    load_prompt_sets,
    message_of,
    open_pool,
    preflight,
    sampling_params,
    start_accelerator,
)
from rlkit.learner.sft import ensure_warm_start, model_at
from rlkit.learner.stopping import StopSignals
from rlkit.learner.update import Learner
from rlkit.rollout.worker import RolloutWorker
from rlkit.telemetry.environment import write_environment
from rlkit.telemetry.report import write_report
from rlkit.telemetry.rollouts import rollback_rollouts
from rlkit.telemetry.sinks import Telemetry
from rlkit.telemetry.summary import print_summary, write_summary

START = Watermark(step=0, version=0, next_ordinal=0, refused=0)


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Train a recipe; returns 0, or 128 + signal number after SIGINT or SIGTERM."""
    accelerator = start_accelerator(config.learner)
    with StopSignals() as signals:
        try:
            if accelerator.is_main_process:
                _lead(config, resolved, accelerator, signals.check)
            else:
                _follow(config, resolved, accelerator)
        except Interrupted as stopped:
            print(stopped)
            return signals.exit_code
        finally:
            accelerator.end_training()
    return 0


def _lead(
    config: Config, resolved: Mapping[str, Any], accelerator: Accelerator, check_stop: Callable[[], None]
) -> None:
    folder = open_run_folder(config, resolved)
    with contextlib.closing(folder):
        write_environment(folder.path)
        # Data, rewards and a damaged checkpoint are looked at before minutes go into a warm start.
        previous = checkpoints.newest(folder.checkpoints)
        load_prompt_sets(config, load_tokenizer(config.model))
        with open_pool(config.reward) as pool:
            start = start_model(config, resolved, accelerator, check_stop)
            source = start if previous is None else model_at(start, previous.path)
            tokenizer, model, learner = load_learner(config, accelerator, source, start)
            train, held_out = load_prompt_sets(config, tokenizer)
            for name, prompts in {"data.train": train, **held_out}.items():
                print(message_of(prompts.left_out, name, len(prompts)))
                if name != "data.train" and (shared := train.shared_with(prompts)):
                    print(f"{name}: {shared} prompts are among the training prompts as well")
            with contextlib.ExitStack() as stack:
                if accelerator.num_processes > 1:
                    stack.callback(broadcast_object_list, [None], from_process=0)
                buffer = stack.enter_context(contextlib.closing(_open_buffer(config, folder)))
                step = 0 if previous is None else previous.state.step
                buffer.rollback(previous.state.watermark or START if previous else START)
                telemetry = stack.enter_context(
                    Telemetry.open(
                        config.telemetry,
                        folder.path,
                        name=config.name,
                        total_steps=config.steps,
                        config=dict(resolved),
                        resume_step=step if folder.resuming else None,
                    )
                )
                rollback_rollouts(folder.path, step)
                engine = build(config.rollout.engine, key="rollout.engine").open(model, tokenizer, check_stop)
                sampling = sampling_params(tokenizer, config, temperature=config.rollout.temperature, seed=config.seed)
                trainer = Trainer(
                    config=config,
                    folder=folder,
                    accelerator=accelerator,
                    model=model,
                    tokenizer=tokenizer,
                    learner=learner,
                    advantage=build_advantage(config),
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
                        tokenizer, config, temperature=config.evaluation.temperature, seed=config.evaluation.seed
                    ),
                )
                if previous is not None:
                    _restore(trainer, previous)
                asyncio.run(_run(trainer))
        _report(config, folder.path)


async def _run(trainer: Trainer) -> None:
    await preflight(trainer.pool, trainer.prompts.prompts)
    await trainer.engine.update_weights(trainer.buffer.watermark().version, None)
    try:
        await trainer.run()
    finally:
        await trainer.engine.close()


def _restore(trainer: Trainer, previous: checkpoints.Checkpoint) -> None:
    names = checkpoints.parameter_names(trainer.model)
    checkpoints.restore_optimizer(trainer.learner.optimizer, names, previous.optimizer)
    checkpoints.restore_rng(previous.rng)
    trainer.learner.optimizer_steps = previous.state.optimizer_steps
    trainer.updates_of_step = previous.state.optimizer_steps
    trainer.step = trainer.saved_step = previous.state.step
    trainer.seconds = previous.state.seconds
    print(f"resuming from {previous.path} (step {previous.state.step})")


def _follow(config: Config, resolved: Mapping[str, Any], accelerator: Accelerator) -> None:
    start = start_model(config, resolved, accelerator, lambda: None)
    previous = checkpoints.newest(Path(config.output_dir) / config.name / "checkpoints")
    source = start if previous is None else model_at(start, previous.path)
    _, model, learner = load_learner(config, accelerator, source, start)
    if previous is not None:
        names = checkpoints.parameter_names(model)
        checkpoints.restore_optimizer(learner.optimizer, names, previous.optimizer)
        learner.optimizer_steps = previous.state.optimizer_steps
    follow(accelerator, learner)


def start_model(
    config: Config, resolved: Mapping[str, Any], accelerator: Accelerator, check_stop: Callable[[], None]
) -> ModelConfig:
    """Where the run's first weights are: the recipe's model, or its finished warm start."""
    if config.sft is None:
        return config.model
    return model_at(config.model, ensure_warm_start(config, resolved, accelerator, check_stop))


def load_learner(
    config: Config, accelerator: Accelerator, source: ModelConfig, start: ModelConfig
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Learner]:
    """Tokenizer, model and learner from `source`; a reference model, where needed, from `start`."""
    tokenizer = load_tokenizer(source)
    dtype = resolve_dtype(config.model.dtype, accelerator.device)

    def policy(model: PreTrainedModel) -> Policy:
        return Policy(model, temperature=config.rollout.temperature, chunk_tokens=config.learner.logprob_chunk_tokens)

    model = load_model(source, tokenizer, dtype, config.seed)
    objective = build_objective(config)
    reference = None
    if objective.kl.needs_reference:
        frozen = load_model(start, tokenizer, dtype, config.seed).requires_grad_(False)
        reference = policy(frozen).to(accelerator.device)
    learner = Learner(policy(model), reference, objective, config.learner, accelerator, config.steps)
    return tokenizer, model, learner


def _open_buffer(config: Config, folder: RunFolder) -> SqlBuffer:
    return SqlBuffer(
        config.buffer.url or f"sqlite:///{(folder.path / 'buffer.db').absolute()}",
        payload_dir=folder.path / "payloads",
        prompts_per_step=config.prompts_per_step,
        max_staleness=config.max_staleness,
        slice_samples=config.rollout.slice_samples,
        keep_payloads=config.buffer.keep_payloads,
    )


def _report(config: Config, path: Path) -> None:
    write_summary(path)
    if config.telemetry.report:
        write_report(path)
    print_summary(path)
