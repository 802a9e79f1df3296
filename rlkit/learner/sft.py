"""Warm start: supervised fine-tuning on completions, cached by what it depends on.

It runs through the same learner as reinforcement learning, with the loss -log p of each completion
token and token-mean aggregation. A finished warm start is the checkpoint step_<steps> of a folder
named by a hash of its inputs; an interrupted one goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from accelerate import Accelerator

from rlkit.algorithms.aggregation import TokenMean
from rlkit.algorithms.base import LossInputs, LossOutput
from rlkit.algorithms.kl import NoKL
from rlkit.algorithms.old_policy.recompute import RecomputeAnchor
from rlkit.config.schema import Config, LearnerConfig, ModelConfig, SftConfig
from rlkit.data.sft import Example, batches, load_examples
from rlkit.errors import ConfigError, Interrupted, RlkitError
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.assemble import StepBatch
from rlkit.learner.batching import TrainingSequence
from rlkit.learner.model import load_model, load_tokenizer, resolve_dtype
from rlkit.learner.policy import Policy
from rlkit.learner.setup import message_of, model_at, start_accelerator
from rlkit.learner.stopping import StopSignals
from rlkit.learner.update import Learner, Objective
from rlkit.telemetry.sinks import Telemetry

LOCK_DEADLINE_S = 3600.0
LOGGED = {"policy/loss": "sft/loss", "policy/grad_norm": "sft/grad_norm", "learner/learning_rate": "sft/learning_rate"}


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """L_t = -log p(token t): supervised fine-tuning as a loss of the learner."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """All tensors [n]; advantages and anchors are not looked at."""
        return LossOutput(per_token=-inputs.logprobs)


def cache_key(config: Config) -> str:
    """Hash of everything a warm start depends on."""
    assert config.sft is not None
    sft = dataclasses.asdict(config.sft)
    for name in ("cache_dir", "checkpoint_every_steps"):
        del sft[name]
    inputs: dict[str, Any] = {"model": dataclasses.asdict(config.model), "sft": sft}
    if config.sft.data.path is not None:
        inputs["data"] = checkpoints.checksum(Path(config.sft.data.path))
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """`rlkit sft`: run (or find) the warm start of a recipe and print where it is."""
    if config.sft is None:
        raise ConfigError("this recipe has no warm start", key="sft", value=None, expected="an sft section")
    accelerator = start_accelerator(config.learner)
    with StopSignals() as signals:
        try:
            print(f"warm start: {start_model(config, resolved, accelerator, signals.check).path}")
        except Interrupted as stopped:
            print(stopped)
            return signals.exit_code
    return 0


def start_model(
    config: Config, resolved: Mapping[str, Any], accelerator: Accelerator, check_stop: Callable[[], None]
) -> ModelConfig:
    """Where a run's first weights are: the recipe's model, or its warm start, trained now unless the cache has it.

    Rank 0 looks and trains; with several ranks all of them train together.
    """
    sft = config.sft
    if sft is None:
        return config.model
    folder = Path(sft.cache_dir) / f"sft-{cache_key(config)}"
    final = folder / "checkpoints" / f"step_{sft.steps}"
    with _exclusive(folder, check_stop) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        if final.exists():
            checkpoints.verify(final)
        else:
            _train(config, sft, resolved, folder, accelerator, check_stop)
        accelerator.wait_for_everyone()
    return model_at(config.model, final)


def _train(
    config: Config,
    sft: SftConfig,
    resolved: Mapping[str, Any],
    folder: Path,
    accelerator: Accelerator,
    check_stop: Callable[[], None],
) -> None:
    started = time.perf_counter()
    previous = checkpoints.newest(folder / "checkpoints")
    source = config.model if previous is None else model_at(config.model, previous.path)
    tokenizer = load_tokenizer(source)
    dtype = resolve_dtype(config.model.dtype, accelerator.device)
    model = load_model(source, tokenizer, dtype, sft.seed)
    examples, left_out = load_examples(sft.data, tokenizer, sft.max_completion_tokens, "sft.data")
    sequences = [_sequence(example) for example in examples]
    if accelerator.is_main_process:
        print(message_of(left_out, "sft.data", len(examples)))
    learner = Learner(
        Policy(model, temperature=1.0, chunk_tokens=config.learner.logprob_chunk_tokens),
        None,
        Objective(loss=NegativeLogLikelihood(), aggregation=TokenMean(), kl=NoKL(), old_policy=RecomputeAnchor()),
        _learner_config(sft, config.learner),
        accelerator,
        sft.steps,
    )
    done, seconds = 0, 0.0
    if previous is not None:
        names = checkpoints.parameter_names(model)
        checkpoints.restore_optimizer(learner.optimizer, names, previous.optimizer)
        checkpoints.restore_rng(previous.rng)
        done, seconds = previous.state.step, previous.state.seconds
        learner.optimizer_steps = previous.state.optimizer_steps

    def save(step: int) -> None:
        if accelerator.is_main_process:
            state = checkpoints.TrainerState(
                step=step, optimizer_steps=learner.optimizer_steps, seconds=seconds + time.perf_counter() - started
            )
            place = folder / "checkpoints"
            checkpoints.save(place, model, tokenizer, learner.optimizer, state, keep=1)
        accelerator.wait_for_everyone()

    main_process = accelerator.is_main_process
    with _telemetry(config, sft, resolved, folder, done) if main_process else contextlib.nullcontext() as telemetry:
        step = done
        try:
            for indices in batches(len(examples), sft.batch_size, sft.steps, sft.seed, done):
                metrics = learner.step(_batch(sequences, indices), check_stop)
                step += 1
                if telemetry is not None:
                    telemetry.log(step, {LOGGED[k]: metrics[k] for k in LOGGED})
                if step % sft.checkpoint_every_steps == 0 or step == sft.steps:
                    save(step)
        except Interrupted:
            if step > done:
                save(step)
            raise


def _batch(sequences: list[TrainingSequence], indices: np.ndarray) -> StepBatch:
    return StepBatch(
        sequences=tuple(sequences[i] for i in indices),
        group=tuple(range(len(indices))),
        positions=tuple((int(i), 0) for i in indices),
    )


def _sequence(example: Example) -> TrainingSequence:
    length = len(example.completion_ids)
    return TrainingSequence(
        prompt_token_ids=example.prompt_ids,
        token_ids=example.completion_ids,
        behavior_logprobs=np.zeros(length, dtype=np.float32),
        loss_mask=np.ones(length, dtype=np.bool_),
        versions=np.zeros(length, dtype=np.int64),
    )


def _learner_config(sft: SftConfig, learner: LearnerConfig) -> LearnerConfig:
    """The learner's settings with the warm start's optimisation."""
    same = ("learning_rate", "schedule", "warmup_steps", "betas", "weight_decay", "max_grad_norm")
    values = {name: getattr(sft, name) for name in (*same, "max_tokens_per_microbatch")}
    return dataclasses.replace(learner, **values, updates_per_step=1)


def _telemetry(
    config: Config, sft: SftConfig, resolved: Mapping[str, Any], folder: Path, done: int
) -> contextlib.AbstractContextManager[Telemetry]:
    return Telemetry.open(
        dataclasses.replace(config.telemetry, wandb="off"),
        folder,
        name=f"{config.name} warm start",
        total_steps=sft.steps,
        config=dict(resolved),
        resume_step=done or None,
    )


@contextlib.contextmanager
def _exclusive(folder: Path, check_stop: Callable[[], None]) -> Iterator[None]:
    """One process at a time in a cache folder; others wait, up to LOCK_DEADLINE_S."""
    lock = filelock.FileLock(folder / ".lock")
    deadline = time.monotonic() + LOCK_DEADLINE_S
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=0.5)
            check_stop()
            if not lock.is_locked and time.monotonic() > deadline:
                problem = f"waited {LOCK_DEADLINE_S:.0f} s for another process's warm start"
                raise RlkitError(problem, key="sft.cache_dir", value=str(folder), fix="end the process that holds it")
    except OSError as error:
        problem, expected = f"cannot be written: {error.strerror}", "a folder that can be made and written"
        raise ConfigError(problem, key="sft.cache_dir", value=str(folder), expected=expected) from error
    try:
        yield
    finally:
        lock.release()
