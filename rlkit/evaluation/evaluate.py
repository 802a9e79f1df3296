"""Evaluate the weights an engine serves on a held-out set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.pool import VerifierPool
from rlkit.config.schema import EvaluationConfig
from rlkit.evaluation.estimators import Estimate, summarise
from rlkit.rollout.engine import Engine, GenerationRequest
from rlkit.rollout.scoring import score_rollouts
from rlkit.types import Prompt, Rollout, SamplingParams, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Result on one set: estimates by name, and everything they come from, aligned."""

    name: str
    estimates: dict[str, Estimate]
    prompts: tuple[Prompt, ...]
    rollouts: tuple[tuple[Rollout, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]

    def metrics(self) -> dict[str, float]:
        """eval/<set>/<estimate>, eval/<set>/<estimate>_se, and lengths and shares of the set."""
        out: dict[str, float] = {}
        for key, value in self.estimates.items():
            out[f"eval/{self.name}/{key}"] = value.value
            out[f"eval/{self.name}/{key}_se"] = value.standard_error
        flat = [r for row in self.rollouts for r in row]
        unscored = [v.score is None for row in self.verdicts for v in row]
        out[f"eval/{self.name}/length/mean"] = float(np.mean([len(r.token_ids) for r in flat]))
        out[f"eval/{self.name}/truncated_frac"] = float(np.mean([r.finish_reason == "length" for r in flat]))
        out[f"eval/{self.name}/unscored_frac"] = float(np.mean(unscored))
        return out


async def evaluate(
    name: str,
    prompts: Sequence[Prompt],
    engine: Engine,
    pool: VerifierPool,
    sampling: SamplingParams,
    config: EvaluationConfig,
) -> Evaluation:
    """Draw `config.samples` completions of every prompt, score them and summarise.

    Draws are keyed by (config.seed, position in the set, sample): two checkpoints see the same
    random numbers, so that their difference has less noise.
    """
    k = config.samples
    rollouts: list[list[Rollout]] = []
    verdicts: list[list[Verdict]] = []
    stride = max(1, config.batch_samples // k)
    for start in range(0, len(prompts), stride):
        part = prompts[start : start + stride]
        requests = [
            GenerationRequest(ordinal=start + i, index=j, prompt_token_ids=p.token_ids)
            for i, p in enumerate(part)
            for j in range(k)
        ]
        done = [r async for r in engine.generate(requests, sampling)]
        done.sort(key=lambda r: (r.ordinal, r.index))
        scored = await score_rollouts(pool, [prompts[r.ordinal] for r in done], done)
        for i in range(len(part)):
            rollouts.append(done[i * k : (i + 1) * k])
            verdicts.append(scored[i * k : (i + 1) * k])
    return Evaluation(
        name=name,
        estimates=summarise(verdicts, samples=k, correct_at=config.correct_at, part=config.part),
        prompts=tuple(prompts),
        rollouts=tuple(tuple(r) for r in rollouts),
        verdicts=tuple(tuple(v) for v in verdicts),
    )
