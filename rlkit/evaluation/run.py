"""`rlkit eval`: evaluate a checkpoint, or the model a recipe starts from, on its held-out sets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.config.schema import Config
from rlkit.errors import CheckpointError, ConfigError
from rlkit.evaluation.evaluate import evaluate
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.setup import Session, model_at, open_pool


def main(config: Config, resolved: Mapping[str, Any], checkpoint: Path | None) -> int:
    """Print one JSON object of metrics: {"eval/<set>/avg@k": ..., "eval/<set>/avg@k_se": ...}."""
    settings, source = config.evaluation, config.model
    if not config.data.eval:
        problem, expected = "this recipe has no held-out set", "at least one named set"
        raise ConfigError(problem, key="data.eval", value={}, expected=expected)
    if checkpoint is not None:
        if not checkpoint.is_dir():
            problem, expected = "no such checkpoint", "a folder checkpoints/step_N"
            raise CheckpointError(problem, key="--checkpoint", value=str(checkpoint), expected=expected)
        if (checkpoint / checkpoints.MANIFEST).exists():
            checkpoints.verify(checkpoint)
        source = model_at(config.model, checkpoint)
    session = Session.open(config, resolved, source=source)
    _, held_out = session.prompt_sets()
    engine = session.engine(session.model(source, config.seed).to(session.accelerator.device))
    sampling = session.sampling(settings.temperature, settings.seed)

    async def all_sets() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, prompts in held_out.items():
            metrics |= await evaluate(name, prompts.prompts, engine, pool, sampling, settings)
        return metrics

    with open_pool(config.reward) as pool:
        print(json.dumps(asyncio.run(all_sets()), indent=1))
    return 0
