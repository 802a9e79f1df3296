"""What a rollout worker needs of an inference engine: token ids in, token ids out."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlkit.buffer.snapshots import Snapshot
from rlkit.types import FloatArray, IntArray, Prompt, Rollout, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Sample number `index` of group `ordinal`; both key its random numbers."""

    ordinal: int
    index: int
    prompt_token_ids: IntArray


class Engine(Protocol):
    """Implemented by the embedded transformers engine and by vLLM servers."""

    engine_id: str  # names the engine in its rollouts
    version: int  # of the weights new tokens are sampled from
    in_flight: bool  # takes new weights, and further requests, while it samples
    capacity: int  # samples that it decodes at a time

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """Yield a rollout for every request, in the order they finish, those that finish together in one list.

        Behaviour log-probs are those of the sampling distribution, version spans the engine's own.
        """

    async def update_weights(self, version: int, snapshot: Snapshot | None) -> None:
        """Serve `version` from now on; `snapshot` is None where the weights are shared in process.

        Raises EngineError, and goes on with its old weights, for a file that is torn, foreign or gone.
        """

    async def score(self, token_ids: IntArray) -> dict[str, FloatArray]:
        """Log-probs (temperature 1) of tokens 1, 2, ... of a sequence given those before, [T - 1], by server."""

    async def healthy(self) -> None:
        """EngineError, which names it, where a part of the engine does not answer."""

    async def move(self, asleep: bool) -> None:
        """Free the device, or take it back; requests under way are finished first. Nothing where it takes no memory."""

    async def close(self) -> None:
        """Stop the engine; idempotent."""


async def sample(
    engine: Engine, prompts: Sequence[Prompt], samples: int, sampling: SamplingParams, *, first: int = 0
) -> list[Rollout]:
    """`samples` rollouts of every prompt, prompt by prompt; prompts have the ordinals first, first + 1, ..."""
    keyed = ((ordinal, index, p.token_ids) for ordinal, p in enumerate(prompts, first) for index in range(samples))
    requests = [GenerationRequest(ordinal=o, index=i, prompt_token_ids=tokens) for o, i, tokens in keyed]
    rollouts = [r async for part in engine.generate(requests, sampling) for r in part]
    return sorted(rollouts, key=lambda r: (r.ordinal, r.index))
