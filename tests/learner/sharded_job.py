"""Run under torch.distributed.run: two steps of learners, sharded or not; rank 0 writes what came of them.

Argument: JSON, {folder: options}; a case's `sharded`, `architecture`, `checkpointing`, `updates`, `kl`, `dtype`,
`loss`, and `resume`: a folder of checkpoints to go on from.
"""

import asyncio
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from test_learner_gradients import GPT2, MODEL, labelled, sequences
from torch.distributed.tensor import DTensor

from rlkit.algorithms.aggregation import SequenceMeanTokenMean
from rlkit.algorithms.kl import KLPenalty, NoKL
from rlkit.algorithms.losses.clipped import ClippedLoss
from rlkit.algorithms.losses.real import Real
from rlkit.algorithms.old_policy import RecomputeAnchor
from rlkit.buffer.sql import SqlBuffer
from rlkit.config.schema import LearnerConfig
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.learner.policy import Policy
from rlkit.learner.publisher import Publisher
from rlkit.learner.setup import model_at
from rlkit.learner.shards import gathered
from rlkit.learner.update import Learner, Objective, never_stop

MODELS = {
    "tied": MODEL,
    "untied": dataclasses.replace(MODEL, architecture=MODEL.architecture | {"tie_word_embeddings": False}),
    "gpt2": GPT2,
}


def make(options: dict, model, tokenizer, previous) -> Learner:
    dtype = getattr(torch, options.get("dtype", "float64"))

    def policy(source, seed):
        return Policy(load_model(source, tokenizer, dtype, seed), temperature=0.7, chunk_logits=30)

    kl = KLPenalty(coefficient=0.1) if options.get("kl") else NoKL()
    loss = Real() if options.get("loss") == "groups" else ClippedLoss()
    objective = Objective(loss=loss, aggregation=SequenceMeanTokenMean(), kl=kl, old_policy=RecomputeAnchor())
    config = LearnerConfig(
        learning_rate=0.01, max_grad_norm=0.05, weight_decay=0.1, max_tokens_per_microbatch=40,
        sharded=options["sharded"], updates_per_step=options.get("updates", 1),
    )  # fmt: skip
    reference = policy(model, 1).requires_grad_(False) if options.get("kl") else None
    first = policy(model if previous is None else model_at(model, previous.path), 0)
    accelerator = Accelerator(cpu=True)
    made = Learner(first, reference, objective, config, accelerator, 8)
    if previous is not None:
        previous.restore(made)
    return made


def halved(learner: Learner) -> None:
    """Each rank holds about its half of weights and moments, and nothing is left of gradients."""
    parts = [p for p in learner.model.parameters() if isinstance(p, DTensor)]
    assert len(parts) == len(list(learner.model.parameters()))
    held, total = sum(p.to_local().numel() for p in parts), sum(p.numel() for p in parts)
    assert abs(held / total - 1 / learner.accelerator.num_processes) < 0.1
    moments = [m for state in learner.optimizer.state.values() for m in state.values() if m.ndim]
    assert sum(m.to_local().numel() for m in moments) == 2 * held
    assert all(p.grad is None for p in parts)


def write(folder: Path, learner: Learner, tokenizer, step: int, probe, found: dict, gradients: dict) -> None:
    """On rank 0."""
    progress = {"step": step, "seconds": 0.0, "watermark": None}
    checkpoints.save(folder / "checkpoints", learner, tokenizer, progress, keep=9)
    buffer = SqlBuffer(
        f"sqlite:///{folder}/buffer.db", payload_dir=folder / "payloads", run="run", prompts_per_step=1,
        max_staleness=0, slice_samples=1,
    )  # fmt: skip

    async def publish():
        publisher = Publisher(buffer, folder / "snapshots", 1.0)
        publisher.prepare(learner.model)
        await publisher.publish(0, learner, probe)
        await publisher.done()

    asyncio.run(publish())
    (folder / "found.json").write_text(json.dumps(found | {"probe": buffer.snapshot().probe[1]}))
    save_file(gradients, folder / "gradients.safetensors")


def run(folder: Path, options: dict) -> None:
    model = MODELS[options.get("architecture", "tied")]
    model = dataclasses.replace(model, gradient_checkpointing=options.get("checkpointing", False))
    tokenizer = load_tokenizer(model)
    previous = checkpoints.newest(Path(options["resume"])) if "resume" in options else None
    learner = make(options, model, tokenizer, previous)
    assert learner.sharded == options["sharded"]
    accelerator, main = learner.accelerator, learner.accelerator.is_main_process
    data = (labelled if options.get("loss") == "groups" else sequences)(torch.float64)
    norms, gradients, apply = [], {}, learner._apply

    def recorded() -> float:
        named = {f"{len(norms)}/{name}": p.grad for name, p in learner.model.named_parameters()}
        gradients.update(gathered(named, main))
        norms.append(apply())
        return norms[-1]

    learner._apply = recorded
    metrics = [learner.step(data, never_stop) for _ in range(2)]
    if learner.sharded:
        halved(learner)
    if main:
        folder.mkdir(parents=True)
        step = 2 + (previous.step if previous else 0)
        found = {"norms": list(norms), "metrics": metrics}
        write(folder, learner, tokenizer, step, data[0].token_ids.repeat(3), found, dict(gradients))
        broadcast_object_list([None], from_process=0)
    else:
        while (work := broadcast_object_list([None], from_process=0)[0]) is not None:
            work(learner)
    learner.step(data, never_stop)  # weights are fit for training after the probe and the gathering
    accelerator.wait_for_everyone()


for place, chosen in json.loads(sys.argv[1]).items():
    run(Path(place), chosen)
Accelerator(cpu=True).end_training()
os._exit(0)  # as rlkit.cli.run does: threads of gloo abort some interpreters on their way out
