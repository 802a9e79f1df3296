"""Evaluate the weights an engine serves on a held-out set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.pool import VerifierPool
from rlkit.config.schema import EvaluationConfig
from rlkit.evaluation.estimators import summarise
from rlkit.rollout.engine import Engine, sample
from rlkit.rollout.scoring import score_rollouts
from rlkit.types import Prompt, Rollout, SamplingParams, Verdict


async def evaluate(
    name: str,
    prompts: Sequence[Prompt],
    engine: Engine,
    pool: VerifierPool,
    sampling: SamplingParams,
    config: EvaluationConfig,
) -> dict[str, float]:
    """Draw `config.samples` completions of every prompt, score them and summarise.

    Returns eval/<name>/<estimate>, eval/<name>/<estimate>_se, and lengths and shares of the set.
    Draws are keyed by (sampling.seed, position in the set, sample): two checkpoints see the same
    random numbers, so that their difference has less noise.
    """
    k = config.samples
    rollouts: list[Rollout] = []
    verdicts: list[Verdict] = []
    stride = max(1, config.batch_samples // k)
    for start in range(0, len(prompts), stride):
        done = await sample(engine, prompts[start : start + stride], k, sampling, first=start)
        rollouts += done
        verdicts += await score_rollouts(pool, [prompts[r.ordinal] for r in done], done)
    by_prompt = [verdicts[i : i + k] for i in range(0, len(verdicts), k)]
    out = {}
    for key, value in summarise(by_prompt, samples=k, correct_at=config.correct_at, part=config.part).items():
        out[key] = value.value
        out[f"{key}_se"] = value.standard_error
    out["length/mean"] = float(np.mean([len(r.token_ids) for r in rollouts]))
    out["truncated_frac"] = float(np.mean([r.finish_reason == "length" for r in rollouts]))
    out["unscored_frac"] = float(np.mean([v.score is None for v in verdicts]))
    return {f"eval/{name}/{key}": value for key, value in out.items()}
