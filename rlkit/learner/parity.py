"""`rlkit check-parity`: do engine and learner agree on the log-probs of freshly sampled tokens?

Samples a few prompts with the recipe's engine, scores the tokens with the learner's own forward and
with the loss at learning rate 0, and compares. The same weights must give a ratio of 1, a clip
fraction of 0 and log-probs that differ by rounding only. Run it before a long run on a new model.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rlkit.algorithms.old_policy.recompute import RecomputeAnchor
from rlkit.config.components import build
from rlkit.config.schema import Config
from rlkit.errors import EngineError
from rlkit.learner.assemble import StepBatch
from rlkit.learner.batching import TrainingSequence
from rlkit.learner.model import load_tokenizer
from rlkit.learner.setup import load_learner, load_prompt_sets, sampling_params, start_accelerator
from rlkit.learner.sft import start_model
from rlkit.rollout.engine import GenerationRequest
from rlkit.types import Rollout

PROMPTS = 8
SAMPLES = 4
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Largest differences over all sampled tokens, in nats; ratio and clip fraction at lr 0."""

    tokens: int
    engine_learner_absdiff: float
    engine_score_absdiff: float
    ratio_absdiff: float
    clip_frac: float


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Print the comparison; raises EngineError where it exceeds the dtype's tolerance."""
    accelerator = start_accelerator(config.learner)
    quiet = dataclasses.replace(
        config, learner=dataclasses.replace(config.learner, learning_rate=0.0, updates_per_step=2)
    )
    tokenizer = load_tokenizer(quiet.model)
    train, _ = load_prompt_sets(quiet, tokenizer)
    start = start_model(quiet, resolved, accelerator, lambda: None)
    model, learner = load_learner(quiet, accelerator, tokenizer, start, start)
    # Two updates at learning rate 0 with the recomputed anchor: the second one's ratio must be 1.
    learner.objective = dataclasses.replace(learner.objective, old_policy=RecomputeAnchor())
    prompts = train.prompts[:PROMPTS]
    sampling = sampling_params(tokenizer, quiet, temperature=quiet.rollout.temperature, seed=quiet.seed)
    requests = [
        GenerationRequest(ordinal=i, index=j, prompt_token_ids=p.token_ids)
        for i, p in enumerate(prompts)
        for j in range(SAMPLES)
    ]
    engine = build(quiet.rollout.engine, key="rollout.engine").open(model, tokenizer, lambda: None)

    async def sample() -> tuple[list[Rollout], list[np.ndarray[Any, Any]]]:
        rollouts = [r async for r in engine.generate(requests, sampling)]
        rollouts.sort(key=lambda r: (r.ordinal, r.index))
        scored = await engine.score(
            [prompts[r.ordinal].token_ids for r in rollouts], [r.token_ids for r in rollouts], sampling.temperature
        )
        return rollouts, scored

    rollouts, scored = asyncio.run(sample())
    batch = StepBatch(
        sequences=tuple(
            TrainingSequence(
                prompt_token_ids=prompts[r.ordinal].token_ids,
                token_ids=r.token_ids,
                behavior_logprobs=r.behavior_logprobs,
                loss_mask=r.loss_mask,
                versions=r.versions(),
                advantage=1.0 if r.index % 2 else -1.0,
            )
            for r in rollouts
        ),
        group=tuple(r.ordinal for r in rollouts),
        positions=tuple((r.ordinal, r.index) for r in rollouts),
    )
    metrics = learner.step(batch, lambda: None)
    parity = Parity(
        tokens=sum(len(r.token_ids) for r in rollouts),
        engine_learner_absdiff=metrics["mismatch/logprob_absdiff/max"],
        engine_score_absdiff=max(
            float(np.abs(s - r.behavior_logprobs).max()) for s, r in zip(scored, rollouts, strict=True)
        ),
        ratio_absdiff=float(np.sqrt(2 * max(metrics.get("policy/kl_old", 0.0), 0.0))),
        clip_frac=metrics.get("policy/clip_frac/low", 0.0) + metrics.get("policy/clip_frac/high", 0.0),
    )
    for name, value in dataclasses.asdict(parity).items():
        print(f"{name:24} {value:.3g}")
    limit = TOLERANCE[model.dtype]
    if parity.engine_learner_absdiff > limit or parity.clip_frac > 0:
        problem, key = "engine and learner disagree on the same weights and tokens", "mismatch/logprob_absdiff/max"
        expected = f"at most {limit:g} for {model.dtype}, and clip fraction 0"
        fix = "compare dtypes, attention implementation, position ids and sampling settings"
        raise EngineError(problem, key=key, value=parity.engine_learner_absdiff, expected=expected, fix=fix)
    print(f"in parity (tolerance {limit:g})")
    return 0
