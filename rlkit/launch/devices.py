"""Which process of a run computes where: every GPU of this machine is given to one of them, and printed."""

import dataclasses
import os
from collections.abc import Sequence

import torch

from rlkit.config.components import build
from rlkit.config.schema import Config
from rlkit.errors import ConfigError
from rlkit.launch.supervisor import Part

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """Names of the GPUs that this process may use."""
    named = os.environ.get(VISIBLE)
    return [str(i) for i in range(torch.cuda.device_count())] if named is None else [x for x in named.split(",") if x]


def needs(config: Config, name: str) -> int:
    """GPUs of a part, by the recipe."""
    if name == "learner":
        return config.learner.processes
    engine = config.evaluation.engine if name == "evaluator" and config.evaluation.engine else config.rollout.engine
    return int(build(engine, key="rollout.engine").devices)


def assign(config: Config, parts: Sequence[Part], gpus: Sequence[str] | None = None) -> list[Part]:
    """The parts with their GPUs, in order; one is shared, as are those taken in turn. ConfigError: too few."""
    free = visible() if gpus is None else list(gpus)
    wanted, cpu = {part.name: needs(config, part.name) for part in parts}, config.learner.device == "cpu"
    engine = build(config.rollout.engine, key="rollout.engine")
    turns, apart = engine.takes_turns, getattr(engine, "weight_transfer", None) == "nccl"
    total = max(wanted.values()) if turns else sum(wanted.values())
    if apart and (cpu or turns or not free or len(free) == 1 < total):
        problem, key = f"weights go from GPU to GPU, and there are {len(free)}", "rollout.engine.weight_transfer"
        expected, fix = "2 GPUs or more, learner.device=auto, takes_turns=false", f"{key}=rlkit_file"
        raise ConfigError(problem, key=key, value="nccl", expected=expected, fix=fix)
    if not free or cpu:
        return list(parts)
    if total > len(free) > 1:
        each, fix = ", ".join(f"{n} {name}" for name, n in wanted.items()), "lower one of them, or learner.device=cpu"
        raise ConfigError("not enough GPUs", key=VISIBLE, value=",".join(free), expected=f"{total}: {each}", fix=fix)
    if len(free) == 1:
        free *= total
    placed, first = [], 0
    for part in parts:
        own = ",".join(free[first : first + wanted[part.name]])
        first += 0 if turns else wanted[part.name]
        print(f"{part.name}: GPU {own}")
        placed.append(dataclasses.replace(part, environment={**part.environment, VISIBLE: own}))
    return placed
