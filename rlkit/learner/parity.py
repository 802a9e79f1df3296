"""`rlkit check-parity`: do engine and learner agree on the log-probs of freshly sampled tokens?

Samples a few prompts with the recipe's engine and scores the tokens with the learner's forward and its loss at learning
rate 0. The same weights must give a ratio of 1, a clip fraction of 0 and log-probs that differ by rounding only.
"""

import asyncio
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from rlkit.config.schema import Config
from rlkit.errors import EngineError
from rlkit.learner.batching import TrainingSequence
from rlkit.learner.setup import Session
from rlkit.learner.sft import start_model
from rlkit.learner.update import never_stop
from rlkit.rollout.engine import sample

PROMPTS, SAMPLES = 8, 4
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2}


def main(config: Config, resolved: Mapping[str, Any]) -> int:
    """Print the comparison; raises EngineError where it exceeds the dtype's tolerance."""
    # Two updates at learning rate 0 with the recomputed anchor: the second one's ratio must be 1.
    still = dataclasses.replace(config.learner, learning_rate=0.0, updates_per_step=2)
    anchor = {"_target_": "rlkit.algorithms.old_policy.RecomputeAnchor"}
    session = Session.open(dataclasses.replace(config, learner=still, old_policy=anchor), resolved)
    prompts = session.prompt_sets()[0].prompts[:PROMPTS]
    start = start_model(session)
    learner = session.learner(start, start)
    sampling = session.sampling(config.rollout.temperature, config.seed)
    rollouts = asyncio.run(sample(session.engine(learner.model), prompts, SAMPLES, sampling))
    batch = [TrainingSequence.of(prompts[r.ordinal], r, advantage=1.0 if r.index % 2 else -1.0) for r in rollouts]
    metrics = learner.step(batch, never_stop)
    key, dtype = "mismatch/logprob_absdiff/max", learner.model.dtype
    absdiff, limit = metrics[key], TOLERANCE[dtype]
    clip_frac = metrics.get("policy/clip_frac/low", 0.0) + metrics.get("policy/clip_frac/high", 0.0)
    print(f"{'tokens':24} {sum(len(r.token_ids) for r in rollouts):.3g}")
    print(f"{'engine_learner_absdiff':24} {absdiff:.3g}")  # the largest, in nats
    print(f"{'ratio_absdiff':24} {math.sqrt(2 * max(metrics.get('policy/kl_old', 0.0), 0.0)):.3g}")
    print(f"{'clip_frac':24} {clip_frac:.3g}")
    if absdiff > limit or clip_frac > 0:
        problem = "engine and learner disagree on the same weights and tokens"
        expected = f"at most {limit:g} for {dtype}, and clip fraction 0"
        fix = "compare dtypes, attention implementation, position ids and sampling settings"
        raise EngineError(problem, key=key, value=absdiff, expected=expected, fix=fix)
    print(f"in parity (tolerance {limit:g})")
    return 0
