"""Between rollouts and the `rewards` package, which knows nothing of rlkit's types."""

from collections.abc import Sequence

from rewards.base import Sample, Score
from rewards.pool import VerifierPool
from rlkit.types import Prompt, Rollout, Verdict


def _sample(prompt: Prompt, completion: str, finish_reason: str, tokens: int) -> Sample:
    return Sample(
        prompt=prompt.text,
        completion=completion,
        reference=prompt.reference,
        metadata=prompt.metadata,
        finish_reason=finish_reason,
        completion_tokens=tokens,
    )


async def score_rollouts(pool: VerifierPool, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
    """Verdicts of aligned prompts and rollouts, in their order."""
    pairs = zip(prompts, rollouts, strict=True)
    scores = await pool.score([_sample(p, r.text, r.finish_reason, len(r.token_ids)) for p, r in pairs])
    return [Verdict(score=s.score, parts=dict(s.parts), answer=s.answer, reason=s.reason) for s in scores]


async def score_references(pool: VerifierPool, prompts: Sequence[Prompt]) -> list[Score]:
    """Scores of completions that are the reference answer, to try rewards on before anything is sampled."""
    return list(await pool.score([_sample(p, p.reference or "", "stop", 1) for p in prompts]))
