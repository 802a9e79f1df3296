"""Between rollouts and the `rewards` package, which knows nothing of rlkit's types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.base import Sample, Score
from rewards.pool import VerifierPool
from rlkit.types import Prompt, Rollout, Verdict


def to_sample(prompt: Prompt, rollout: Rollout) -> Sample:
    """What a reward sees of a rollout."""
    return Sample(
        prompt=prompt.text,
        completion=rollout.text,
        reference=prompt.reference,
        metadata=prompt.metadata,
        finish_reason=rollout.finish_reason,
        completion_tokens=len(rollout.token_ids),
    )


def to_verdict(score: Score) -> Verdict:
    """The verifier's answer as rlkit stores it."""
    return Verdict(score=score.score, parts=dict(score.parts), answer=score.answer, reason=score.reason)


def reference_rollout(prompt: Prompt) -> Rollout:
    """A rollout whose text is the reference answer, to try rewards on before anything is sampled."""
    return Rollout(
        ordinal=0,
        index=0,
        token_ids=np.zeros(1, dtype=np.int64),
        behavior_logprobs=np.zeros(1, dtype=np.float32),
        loss_mask=np.ones(1, dtype=np.bool_),
        segments=np.zeros(1, dtype=np.int64),
        version_spans=(),
        finish_reason="stop",
        engine_id="reference",
        text=prompt.reference or "",
    )


async def score_rollouts(pool: VerifierPool, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
    """Verdicts of aligned prompts and rollouts, in their order."""
    samples = [to_sample(p, r) for p, r in zip(prompts, rollouts, strict=True)]
    return [to_verdict(score) for score in await pool.score(samples)]
