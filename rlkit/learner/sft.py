"""Warm start: supervised fine-tuning on completions, through the learner.

A finished one is the checkpoint step_<steps> of a folder named by a hash of its inputs; an interrupted one goes on from
its newest.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from rlkit.algorithms.aggregation import TokenMean
from rlkit.algorithms.kl import NoKL
from rlkit.algorithms.losses.policy_gradient import PolicyGradientLoss
from rlkit.algorithms.old_policy import RecomputeAnchor
from rlkit.config.keys import leaves
from rlkit.config.schema import Config, ModelConfig, OptimizerConfig, SftConfig
from rlkit.data.prompts import PromptOrder, load_examples
from rlkit.errors import ConfigError, Interrupted, RlkitError
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.batching import TrainingSequence
from rlkit.learner.setup import Session, interruptible, locked, message_of, model_at
from rlkit.learner.update import Learner, Objective, never_stop
from rlkit.telemetry.sinks import Telemetry

LOCK_DEADLINE_S = 3600.0
LOGGED = {"policy/loss": "sft/loss", "policy/grad_norm": "sft/grad_norm", "learner/learning_rate": "sft/learning_rate"}


def cache_key(config: Config) -> str:
    """Hash of everything a warm start depends on, the content of local files among it."""
    assert config.sft is not None
    sft, model, learner = (dataclasses.asdict(x) for x in (config.sft, config.model, config.learner))
    for name in ("cache_dir", "checkpoint_every_steps"):
        del sft[name]
    shared = {name: learner[name] for name in ("epsilon", "mixed_precision", "deterministic", "device")}
    # A source or a teacher names files by settings of any name; a model is a folder.
    named = [value for value in leaves(sft["data"]).values() if isinstance(value, str) and 0 < len(value) < 1024]
    files = [file for value in named if "\0" not in value and (file := Path(value).expanduser()).is_file()]
    for folder in filter(None, (config.model.path, config.model.tokenizer)):
        files += sorted(file for file in Path(folder).expanduser().rglob("*") if file.is_file())
    sums = [checkpoints.checksum(file) for file in files]
    inputs = {"model": model, "sft": sft, "learner": shared, "files": sums}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """`rlkit sft`: run (or find) the warm start of a recipe and print where it is."""
    if config.sft is None:
        raise ConfigError("this recipe has no warm start", key="sft", value=None, expected="an sft section")
    return interruptible(lambda stop: print(f"warm start: {start_model(Session.open(config, resolved, stop)).path}"))


def start_model(session: Session) -> ModelConfig:
    """Where a run's first weights are: the recipe's model, or its warm start, trained now unless the cache has it.

    Rank 0 looks and trains; with several ranks all of them train together.
    """
    config, sft, accelerator = session.config, session.config.sft, session.accelerator
    if sft is None:
        return config.model
    folder = Path(sft.cache_dir) / f"sft-{cache_key(config)}"
    final = folder / "checkpoints" / f"step_{sft.steps}"
    key, problem = "sft.cache_dir", f"waited {LOCK_DEADLINE_S:.0f} s for another process's warm start"
    busy = RlkitError(problem, key=key, value=str(folder), fix="end the process that holds it")
    lock = locked(folder, busy, key=key, wait_s=LOCK_DEADLINE_S, check_stop=session.check_stop)
    with lock if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        if final.exists():
            checkpoints.verify(final)
        else:
            _train(session, sft, folder)
        accelerator.wait_for_everyone()
    return model_at(config.model, final)


def _train(session: Session, sft: SftConfig, folder: Path) -> None:
    started = time.perf_counter()
    config, accelerator = session.config, session.accelerator
    examples, left_out = load_examples(sft.data, session.tokenizer, sft.max_completion_tokens, "sft.data")
    sequences = [TrainingSequence.given(row.token_ids, tokens, row.number, 1.0) for row, tokens in examples]
    if accelerator.is_main_process:
        print(message_of("sft.data", len(examples), left_out))
    previous = checkpoints.newest(folder / "checkpoints")
    source = config.model if previous is None else model_at(config.model, previous.path)
    # With an advantage of 1 the policy gradient's loss is the negative log-likelihood.
    objective = Objective(loss=PolicyGradientLoss(), aggregation=TokenMean(), kl=NoKL(), old_policy=RecomputeAnchor())
    values = {field.name: getattr(sft, field.name) for field in dataclasses.fields(OptimizerConfig)}
    settings = dataclasses.replace(config.learner, **values, updates_per_step=1)
    learner = Learner(session.policy(source, sft.seed, 1.0), None, objective, settings, accelerator, sft.steps)
    if previous is not None:
        previous.restore(learner)
        started -= previous.seconds
    step = done = previous.step if previous else 0

    def save() -> None:
        if accelerator.is_main_process:
            progress = {"step": step, "seconds": time.perf_counter() - started, "watermark": None}
            checkpoints.save(folder / "checkpoints", learner, session.tokenizer, progress, keep=1)
        elif learner.sharded:
            broadcast_object_list([None], from_process=0)[0](learner)  # what rank 0 has `together` there
        accelerator.wait_for_everyone()

    # Lengths are mixed: batches of one length save padding, but tiny models learnt more slowly from them.
    order, size = PromptOrder(len(examples), sft.seed), sft.batch_size
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            telemetry = stack.enter_context(Telemetry.open(
                dataclasses.replace(config.telemetry, wandb="off"), folder, name=f"{config.name} warm start",
                total_steps=sft.steps, config=dict(session.resolved), resume_step=done or None,
            ))  # fmt: skip
        try:
            while step < sft.steps:
                batch = [sequences[order.index(step * size + i)] for i in range(size)]
                _agree(session)
                metrics = learner.step(batch, never_stop)
                step += 1
                if accelerator.is_main_process:
                    telemetry.log(step, {LOGGED[k]: metrics[k] for k in LOGGED})
                if step % sft.checkpoint_every_steps == 0 or step == sft.steps:
                    save()
        except Interrupted:
            if step > done:
                save()
            raise


def _agree(session: Session) -> None:
    """Raise Interrupted on every rank if one was signalled: none may leave a step the others are in."""
    mine = torch.zeros(1, device=session.accelerator.device)
    try:
        session.check_stop()
    except Interrupted:
        mine += 1
    if float(session.accelerator.reduce(mine, "sum")):
        raise Interrupted("stopped by a signal; the same command goes on from the checkpoint")
