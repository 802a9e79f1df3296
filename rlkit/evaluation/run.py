"""`rlkit eval`: evaluate a checkpoint, or the model a recipe starts from, on its held-out sets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.config.components import build
from rlkit.config.schema import Config
from rlkit.errors import CheckpointError, ConfigError
from rlkit.evaluation.evaluate import evaluate
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.model import load_model, load_tokenizer, resolve_dtype
from rlkit.learner.setup import load_prompt_sets, model_at, open_pool, sampling_params, start_accelerator


def main(config: Config, resolved: Mapping[str, Any], checkpoint: Path | None) -> int:
    """Print one JSON object of metrics: {"eval/<set>/avg@k": ..., "eval/<set>/avg@k_se": ...}."""
    if not config.data.eval:
        raise ConfigError("this recipe has no held-out set", key="data.eval", value={},
                          expected="at least one named set")  # fmt: skip
    accelerator = start_accelerator(config.learner)
    source = config.model
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise CheckpointError("no such checkpoint", key="--checkpoint", value=str(checkpoint),
                                  expected="a folder checkpoints/step_N")  # fmt: skip
        if (checkpoint / checkpoints.MANIFEST).exists():
            checkpoints.verify(checkpoint)
        source = model_at(config.model, checkpoint)
    tokenizer = load_tokenizer(source)
    dtype = resolve_dtype(config.model.dtype, accelerator.device)
    model = load_model(source, tokenizer, dtype, config.seed).to(accelerator.device)
    _, held_out = load_prompt_sets(config, tokenizer)
    engine = build(config.rollout.engine, key="rollout.engine").open(model, tokenizer, lambda: None)
    sampling = sampling_params(
        tokenizer, config, temperature=config.evaluation.temperature, seed=config.evaluation.seed
    )

    async def all_sets() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, prompts in held_out.items():
            result = await evaluate(name, prompts.prompts, engine, pool, sampling, config.evaluation)
            metrics |= result.metrics()
        return metrics

    with open_pool(config.reward) as pool:
        print(json.dumps(asyncio.run(all_sets()), indent=1))
    return 0
