"""A probe tells equal weights from stale ones, and which side is stale."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlkit.buffer.snapshots import Snapshot
from rlkit.config.schema import ModelConfig
from rlkit.errors import TrainingError
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.rollout.verification import WeightCheck, probe_logprobs

MODEL = ModelConfig(
    architecture={
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64,
    },
    alphabet="0123456789+=",
)  # fmt: skip
MODELS = [load_model(MODEL, load_tokenizer(MODEL), torch.float32, seed) for seed in range(3)]
PROBE = np.arange(4, 16)


class Serving:
    """An engine that has the weights of one of MODELS."""

    version = 0

    def __init__(self, weights: int) -> None:
        self.weights = weights

    async def score(self, token_ids):
        return {"server": probe_logprobs(MODELS[self.weights], token_ids)}


def snapshot(version: int, weights: int, probe: bool = True) -> Snapshot:
    scored = (PROBE.tolist(), probe_logprobs(MODELS[weights], PROBE).tolist()) if probe else None
    return Snapshot(version=version, path=f"v{version}", checksum=str(weights), size=1, probe=scored)


def test_probe_logprobs_are_those_of_a_full_forward() -> None:
    ids = torch.from_numpy(PROBE)[None]
    table = torch.log_softmax(MODELS[0](input_ids=ids).logits[0].double(), -1)
    expected = [float(table[t, PROBE[t + 1]]) for t in range(len(PROBE) - 1)]
    np.testing.assert_allclose(probe_logprobs(MODELS[0], PROBE), expected, atol=1e-6)


def test_equal_weights_are_verified_and_versions_without_a_probe_are_not() -> None:
    check, engine = WeightCheck(1e-5), Serving(0)
    asyncio.run(check(engine, snapshot(0, 0)))
    assert (check.verified_version, check.difference) == (0, pytest.approx(0, abs=1e-6))
    asyncio.run(check(engine, snapshot(1, 1, probe=False)))
    assert check.verified_version == 0


@pytest.mark.parametrize(("every", "verified"), [(0, [5, 5, 5, 5]), (2, [5, 5, 7, 7])])
def test_the_first_update_of_an_engine_is_verified_whichever_version_it_is(every: int, verified: list[int]) -> None:
    check, engine, found = WeightCheck(1e-5, every), Serving(0), list[int]()
    for version in range(5, 9):
        asyncio.run(check(engine, snapshot(version, 0)))
        found.append(check.verified_version)
    assert found == verified


@pytest.mark.parametrize(
    ("served", "file", "learner", "says"),
    [
        (0, "1", 1, "the engine is stale, it still has the weights of version 0"),
        (0, "0", 1, "the learner's snapshot is stale, its file is that of version 0"),
        (2, "1", 1, "other weights than the learner's"),
    ],
)
def test_a_disagreement_says_which_side_is_stale(served: int, file: str, learner: int, says: str) -> None:
    check, engine = WeightCheck(1e-5), Serving(0)
    asyncio.run(check(engine, snapshot(0, 0)))
    engine.weights = served
    with pytest.raises(TrainingError, match=says):
        asyncio.run(check(engine, replace(snapshot(1, learner), checksum=file)))
    assert check.verified_version == 0


def test_scores_that_are_not_numbers_are_a_disagreement() -> None:
    class Broken(Serving):
        async def score(self, token_ids):
            return {"server": np.full(len(token_ids) - 1, np.nan, np.float32)}

    with pytest.raises(TrainingError, match="disagree"):
        asyncio.run(WeightCheck(1e-5)(Broken(0), snapshot(0, 0)))
