"""What each of two ranks runs in test_ranks.py: sample together, then be interrupted on rank 1 only."""

import asyncio
import json
import os
import sys
from pathlib import Path

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from test_engine import MODEL, REQUESTS, TOKENIZER, sampling

from rlkit.errors import Interrupted
from rlkit.learner.model import load_model
from rlkit.rollout.ranks import RankedEngine, carry_out
from rlkit.rollout.transformers_engine import TransformersEngine


async def lead(engine, out: Path) -> None:
    ranked = RankedEngine(engine, 2)
    await ranked.update_weights(7, None)
    rollouts = [r async for part in ranked.generate(REQUESTS, sampling()) for r in part]
    stopped = False
    try:
        async for _ in ranked.generate(REQUESTS, sampling()):
            pass
    except Interrupted:
        stopped = True
    alone = [r async for part in engine.generate(REQUESTS, sampling()) for r in part]
    rows, expected = (
        sorted((r.ordinal, r.index, r.token_ids.tolist(), r.engine_id, r.versions().tolist()) for r in of_run)
        for of_run in (rollouts, alone)
    )
    out.write_text(json.dumps({"rollouts": rows, "alone": expected, "stopped": stopped}))


async def follow(engine) -> None:
    for _ in range(2):
        message = [None]
        broadcast_object_list(message, from_process=0)
        await carry_out(message[0], engine, 1, 2)


def main(out: Path) -> None:
    state = PartialState(cpu=True)
    rank, orders = state.process_index, []

    def check_stop() -> None:
        """Rank 1 gets its signal in the second order."""
        orders.append(1)
        if rank == 1 and engine.version == 7 and len(orders) > 24:
            raise Interrupted("a signal")

    model = load_model(MODEL, TOKENIZER, torch.float32, 0)
    engine = TransformersEngine(compact_every=1).open(model, TOKENIZER, check_stop, rank)
    asyncio.run(lead(engine, out) if rank == 0 else follow(engine))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # gloo aborts where the interpreter ends
