"""Evaluation of the weights an engine serves on held-out sets, and `rlkit eval`."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.pool import VerifierPool
from rlkit.config.schema import Config, EvaluationConfig
from rlkit.errors import CheckpointError, ConfigError
from rlkit.evaluation.estimators import summarise
from rlkit.learner import checkpoint as checkpoints
from rlkit.learner.likelihood import LikelihoodScorer
from rlkit.learner.setup import Session, model_at, open_pool
from rlkit.rollout.engine import Engine, sample
from rlkit.rollout.worker import score_rollouts
from rlkit.types import Prompt, Rollout, SamplingParams, Verdict


async def evaluate(
    name: str, prompts: Sequence[Prompt], engine: Engine, pool: VerifierPool | None, sampling: SamplingParams,
    config: EvaluationConfig, likelihood: LikelihoodScorer | None = None,
) -> dict[str, float]:  # fmt: skip
    """Draw `config.samples` completions of every prompt, score them and summarise.

    Returns eval/<name>/<estimate>, eval/<name>/<estimate>_se, and lengths and shares of the set. Draws are keyed by
    (sampling.seed, position in the set, sample): the difference of two checkpoints has less noise.
    """
    k = config.samples
    rollouts, verdicts = list[Rollout](), list[Verdict]()
    stride = max(1, config.batch_samples // k)
    for start in range(0, len(prompts), stride):
        done = await sample(engine, prompts[start : start + stride], k, sampling, first=start)
        verdicts += await score_rollouts(pool, [prompts[r.ordinal] for r in done], done)
        rollouts += done
    found, out = dict[str, tuple[float, float]](), dict[str, float]()
    if pool is not None:
        by_prompt = [verdicts[i : i + k] for i in range(0, len(verdicts), k)]
        found |= summarise(by_prompt, samples=k, correct_at=config.correct_at, part=config.part)
        if not pool.extracts_answers:
            del found[f"maj@{k}"]  # there is nothing to vote on, which is not a score of 0
    if likelihood is not None:
        references, out["no_place_frac"] = likelihood.figures(prompts, rollouts, k)
        found |= references
    for key, value in found.items():
        out[key], out[f"{key}_se"] = value
    out["length/mean"] = float(np.mean([len(r.token_ids) for r in rollouts]))
    out["truncated_frac"] = float(np.mean([r.finish_reason == "length" for r in rollouts]))
    out["unscored_frac"] = float(np.mean([v.score is None for v in verdicts]))
    return {f"eval/{name}/{key}": value for key, value in out.items()}


def main(config: Config, resolved: Mapping[str, Any], checkpoint: Path | None) -> int:
    """`rlkit eval`: print one JSON object, the metrics of every held-out set at a checkpoint or the recipe's model."""
    settings, expected = config.evaluation, "a folder checkpoints/step_N"
    if not config.data.eval:
        raise ConfigError("the recipe has no held-out set", key="data.eval", value={}, expected="one named set or more")
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise CheckpointError("no such checkpoint", key="--checkpoint", value=str(checkpoint), expected=expected)
        if (checkpoint / checkpoints.MANIFEST).exists():
            checkpoints.verify(checkpoint)
        config = replace(config, model=model_at(config.model, checkpoint))
    session = Session.open(config, resolved)
    _, held_out = session.prompt_sets()
    policy = session.policy(config.model, config.seed, config.rollout.temperature).to(session.accelerator.device)
    key = "rollout.engine" if settings.engine is None else "evaluation.engine"
    engine, likelihood = session.engine(policy.model, key), LikelihoodScorer.of(session, policy)
    sampling = session.sampling(settings.temperature, settings.seed)

    async def all_sets() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, prompts in held_out.items():
            metrics |= await evaluate(name, prompts.prompts, engine, pool, sampling, settings, likelihood)
        return metrics

    with open_pool(config.reward) as pool:
        print(json.dumps(asyncio.run(all_sets()), indent=1))
    return 0
