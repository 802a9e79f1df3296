"""Several learner ranks sample together: each has an engine on its own copy of the weights.

Rank 0 drives: it broadcasts orders, and the other ranks carry them out in `rlkit.learner.train`. Draws are keyed by
group and sample, so who samples what changes nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate.utils import broadcast_object_list

from rlkit.errors import Interrupted
from rlkit.rollout.engine import Engine, GenerationRequest
from rlkit.types import FloatArray, IntArray, Rollout, SamplingParams


@dataclass(frozen=True, slots=True)
class GenerateOrder:
    """Rank 0 -> all: sample your share of these requests from the weights of `version`, then gather."""

    requests: Sequence[GenerationRequest]
    sampling: SamplingParams
    version: int

    def share(self, rank: int, ranks: int) -> Sequence[GenerationRequest]:
        """Consecutive requests, so that most prompts are read on one rank only."""
        count = len(self.requests)
        return self.requests[count * rank // ranks : count * (rank + 1) // ranks]


@dataclass(slots=True)
class RankedEngine:
    """Rank 0's view of the engines of all ranks, as one `rlkit.rollout.engine.Engine`."""

    local: Engine
    ranks: int

    @property
    def engine_id(self) -> str:
        return self.local.engine_id

    @property
    def version(self) -> int:
        return self.local.version

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """Own rollouts as they finish, then those of the other ranks. Interrupted if one of them was."""
        order = GenerateOrder(requests, sampling, self.version)
        broadcast_object_list([order], from_process=0)
        shares: list[Any] = [None] * self.ranks
        try:
            async for rollouts in self.local.generate(order.share(0, self.ranks), sampling):
                yield rollouts
        finally:  # whatever ended it here: the other ranks gather too
            await asyncio.to_thread(torch.distributed.gather_object, [], shares, dst=0)
        if None in shares:
            raise Interrupted("another rank was stopped; the same command goes on from the checkpoint")
        yield [rollout for share in shares for rollout in share]

    async def score(
        self, prompts: Sequence[IntArray], completions: Sequence[IntArray], temperature: float
    ) -> list[FloatArray]:
        return await self.local.score(prompts, completions, temperature)

    async def update_weights(self, version: int, snapshot: Path | None) -> None:
        """The other ranks hear of it with their next order."""
        await self.local.update_weights(version, snapshot)

    async def close(self) -> None:
        await self.local.close()


async def carry_out(order: GenerateOrder, engine: Engine, rank: int, ranks: int) -> None:
    """Ranks other than 0: sample the share and hand it to rank 0; None in its place after a signal."""
    await engine.update_weights(order.version, None)
    found: list[Rollout] | None = None
    with contextlib.suppress(Interrupted):
        found = [r async for part in engine.generate(order.share(rank, ranks), order.sampling) for r in part]
    torch.distributed.gather_object(found, None, dst=0)
