"""Several learner ranks sample together: each has an engine on its own copy of the weights.

Rank 0 drives: it broadcasts orders, and the other ranks carry them out in `rlkit.learner.train`. Draws are keyed by
group and sample, so who samples what changes nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed
from accelerate.utils import broadcast_object_list

from rlkit.errors import Interrupted
from rlkit.rollout.engine import Engine, GenerationRequest
from rlkit.types import Rollout, SamplingParams

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class GenerateOrder:
    """Rank 0 -> all: sample your share of these requests from the weights of `version`, and send it."""

    requests: Sequence[GenerationRequest]
    sampling: SamplingParams
    version: int

    def share(self, rank: int, ranks: int) -> Sequence[GenerationRequest]:
        """Consecutive requests, so that most prompts are read on one rank only."""
        count = len(self.requests)
        return self.requests[count * rank // ranks : count * (rank + 1) // ranks]


@dataclass(slots=True)
class RankedEngine:
    """Rank 0's view of the engines of all ranks, as one `rlkit.rollout.engine.Engine`: its own but for `generate`.

    The other ranks hear of new weights with their next order.
    """

    local: Engine
    ranks: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """The rollouts of all ranks, its own as they finish, then the others'. Interrupted if another rank was."""
        order = GenerateOrder(requests, sampling, self.local.version)
        broadcast_object_list([order], from_process=0)
        others: list[Any] = []
        try:
            async with contextlib.aclosing(self.local.generate(order.share(0, self.ranks), sampling)) as stream:
                async for rollouts in stream:
                    yield rollouts
        finally:  # whatever ended it here: the other ranks send what they have
            for rank in range(1, self.ranks):
                part: list[Any] = [None]
                await asyncio.to_thread(torch.distributed.recv_object_list, part, src=rank)
                others += part
        if INTERRUPTED in others:
            raise Interrupted("another rank was stopped; the same command goes on from the checkpoint")
        for rollouts in others:
            yield rollouts


async def carry_out(order: GenerateOrder, engine: Engine, rank: int, ranks: int) -> None:
    """Ranks other than 0: sample the share and send it to rank 0 in one piece or, after a signal, INTERRUPTED."""
    await engine.update_weights(order.version, None)
    found: list[Rollout] | str = INTERRUPTED
    with contextlib.suppress(Interrupted):
        found = [r async for part in engine.generate(order.share(rank, ranks), order.sampling) for r in part]
    torch.distributed.send_object_list([found], dst=0)
