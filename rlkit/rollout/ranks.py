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
SPARED_TENTHS = 3  # of rank 0's share


@dataclass(frozen=True, slots=True)
class GenerateOrder:
    """Rank 0 -> all: sample your share of these requests from the weights of `version`, and send what finishes."""

    requests: Sequence[GenerationRequest]
    sampling: SamplingParams
    version: int

    def share(self, rank: int, ranks: int) -> Sequence[GenerationRequest]:
        """Consecutive requests, so that most prompts are read on one rank only; rank 0 also keeps buffer and scores."""
        tenths = [max(0, 10 * r - SPARED_TENTHS) for r in (rank, rank + 1)]
        first, last = (len(self.requests) * place // (10 * ranks - SPARED_TENTHS) for place in tenths)
        return self.requests[first:last]


@dataclass(slots=True)
class RankedEngine:
    """The engines of all ranks as one `Engine`, on rank 0; the others hear of new weights with the next order."""

    local: Engine
    ranks: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """The rollouts of all ranks as they finish. Interrupted if another rank was."""
        order = GenerateOrder(requests, sampling, self.local.version)
        broadcast_object_list([order], from_process=0)
        loop, found = asyncio.get_running_loop(), asyncio.Queue[list[Rollout] | None]()

        async def sample() -> None:
            async with contextlib.aclosing(self.local.generate(order.share(0, self.ranks), sampling)) as stream:
                async for rollouts in stream:
                    found.put_nowait(rollouts)

        def listen(rank: int) -> None:
            part: list[Any] = [[]]
            while True:
                torch.distributed.recv_object_list(part, src=rank)
                if part[0] == INTERRUPTED:
                    raise Interrupted("another rank was stopped; the same command goes on from the checkpoint")
                if part[0] is None:
                    return
                loop.call_soon_threadsafe(found.put_nowait, part[0])

        own = asyncio.create_task(sample())
        others = [asyncio.create_task(asyncio.to_thread(listen, rank)) for rank in range(1, self.ranks)]
        for task in (own, *others):
            task.add_done_callback(lambda _: found.put_nowait(None))
        open_ranks = self.ranks
        try:
            while open_ranks:
                if (rollouts := await found.get()) is None:
                    open_ranks -= 1
                else:
                    yield rollouts
        finally:  # whatever ended it here: the other ranks send until they are done
            own.cancel()
            await asyncio.wait([own, *others])
        for task in (own, *others):
            task.result()


async def carry_out(order: GenerateOrder, engine: Engine, rank: int, ranks: int) -> None:
    """Ranks other than 0: sample the share and send rank 0 what finishes, then None or, after a signal, INTERRUPTED."""
    await engine.update_weights(order.version, None)
    last: str | None = INTERRUPTED
    with contextlib.suppress(Interrupted):
        async for rollouts in engine.generate(order.share(rank, ranks), order.sampling):
            torch.distributed.send_object_list([rollouts], dst=0)
        last = None
    torch.distributed.send_object_list([last], dst=0)
