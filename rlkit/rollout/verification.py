"""Do engine and learner have the same weights? A probe sequence, scored on both sides, says so.

A file's checksum shows that the engine read what the learner wrote. It does not show that the learner wrote its present
weights, nor that every tensor reached its place in the engine; log-probs of a fixed sequence of tokens do.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from rlkit.buffer.snapshots import Snapshot
from rlkit.errors import TrainingError
from rlkit.rollout.engine import Engine
from rlkit.types import FloatArray, IntArray

PROBE_TOKENS = 64


@torch.no_grad()  # inference_mode would make weights that FSDP gathers here unfit for training
def probe_logprobs(model: nn.Module, token_ids: IntArray) -> FloatArray:
    """Log-probs (temperature 1, float32, in nats) of tokens 1, 2, ... of a sequence given those before: [T - 1]."""
    model.eval()  # without dropout; the learner turns training on again itself
    ids = torch.from_numpy(token_ids)[None].to(next(model.parameters()).device)
    table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    return table.gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy()


@dataclass(slots=True)
class WeightCheck:
    """Compares an engine with the learner after its first update and after every `every`-th, if that is not 0."""

    tolerance: float = 1e-3  # largest difference of a log-prob
    every: int = 1
    updates: int = 0
    verified_version: int = -1
    difference: float = 0.0  # the largest one of the last comparison
    _before: dict[str, tuple[Snapshot, FloatArray]] = field(default_factory=dict)  # by server

    async def __call__(self, engine: Engine, snapshot: Snapshot) -> None:
        """TrainingError, which says which side is stale, where they disagree."""
        due = self.updates == 0 or (self.every > 0 and self.updates % self.every == 0)
        self.updates += 1
        if snapshot.probe is None or not due:
            return
        (tokens, expected), version = snapshot.probe, engine.version
        found = await engine.score(np.array(tokens, dtype=np.int64))
        if engine.version != version:
            return  # newer weights came while it scored
        self.difference = max(float(np.abs(x - expected).max()) for x in found.values())
        for server, scores in found.items():
            if not np.abs(scores - expected).max() <= self.tolerance:
                why = self._why(server, snapshot, scores)
                problem = f"the log-probs of {server} and of the learner disagree at version {snapshot.version}: {why}"
                most = f"a difference of at most rollout.verify_tolerance = {self.tolerance:g}"
                raise TrainingError(problem, key="weights", value=self.difference, expected=most)
            self._before[server] = snapshot, scores
        self.verified_version = snapshot.version

    def _why(self, server: str, snapshot: Snapshot, scores: FloatArray) -> str:
        before, then = self._before.get(server, (None, scores))
        if before is None or np.abs(scores - then).max() > self.tolerance:
            return "it has other weights than the learner's, or computes something else with them"
        if before.checksum == snapshot.checksum:
            return f"the learner's snapshot is stale, its file is that of version {before.version}"
        return f"the engine is stale, it still has the weights of version {before.version}"
