"""The derived batch table and the memory estimate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.config.compose import load
from rlkit.config.schema import Config, DataConfig, DatasetConfig, LearnerConfig, RolloutConfig
from rlkit.learner.batching import plan_microbatches
from rlkit.learner.check import batch_table, empty_model, estimate
from rlkit.learner.model import load_model, load_tokenizer

Smoke = Callable[..., Config]
Refused = Callable[..., AbstractContextManager[None]]


def table(config: Config) -> dict[str, int]:
    return {name: value for name, value, _ in batch_table(config)}


@given(
    groups=st.integers(1, 12),
    samples=st.integers(1, 9),
    updates=st.integers(1, 4),
    prompt=st.integers(1, 40),
    completion=st.integers(1, 40),
    budget=st.integers(80, 400),
    staleness=st.integers(0, 3),
    data=st.data(),
)
def test_bounds_hold_for_the_learners_own_plan(
    groups: int,
    samples: int,
    updates: int,
    prompt: int,
    completion: int,
    budget: int,
    staleness: int,
    data: st.DataObject,
) -> None:
    config = Config(
        steps=5,
        prompts_per_step=groups * updates,
        samples_per_prompt=samples,
        max_staleness=staleness,
        data=DataConfig(train=DatasetConfig(max_prompt_tokens=prompt)),
        rollout=RolloutConfig(max_completion_tokens=completion),
        learner=LearnerConfig(updates_per_step=updates, max_tokens_per_microbatch=budget),
    )
    derived = table(config)
    lengths = data.draw(
        st.lists(st.integers(1, prompt + completion), min_size=groups * samples, max_size=groups * samples)
    )
    planned = updates * len(plan_microbatches(lengths, budget))
    longest = [prompt + completion] * (groups * samples)
    assert planned <= derived["micro-batches per step, at most"]
    assert derived["micro-batches per step, at most"] == updates * len(plan_microbatches(longest, budget))
    assert derived["sequences per step"] == groups * updates * samples
    assert derived["sequences per update"] * updates == derived["sequences per step"]
    assert derived["trained tokens per step, at most"] == sum(longest) * updates
    assert derived["optimiser steps"] == 5 * updates
    assert derived["groups in flight, at most"] == (staleness + 1) * groups * updates


@pytest.mark.parametrize(
    ("every", "at_start", "expected"),
    [(0, True, 2), (0, False, 1), (3, True, 5), (5, True, 3), (10, False, 1), (100, True, 2)],
)
def test_evaluations(every: int, at_start: bool, expected: int) -> None:
    overrides = ["steps=10", f"evaluation.every_steps={every}", f"evaluation.at_start={str(at_start).lower()}"]
    assert table(load("quickstart", overrides)[0])["evaluations"] == expected


def parts(config: Config) -> dict[str, int]:
    return {name: size for name, size, _ in estimate(config)}


@pytest.mark.parametrize("heads", ["4", "2"])
def test_parameters_are_those_of_the_model(smoke: Smoke, heads: str) -> None:
    config = smoke(f"model.architecture.num_key_value_heads={heads}")
    model = load_model(config.model, load_tokenizer(config.model), torch.float32, seed=0)
    count = sum(p.numel() for p in model.parameters())
    vocabulary = empty_model(config.model).config.vocab_size
    assert vocabulary == model.get_input_embeddings().num_embeddings
    found = parts(config)
    assert found["weights"] == 4 * count
    assert found["AdamW moments"] == 8 * count


def test_ranks_share_what_is_sharded_and_workers_have_the_cache(smoke: Smoke) -> None:
    whole = parts(smoke("rollout.workers=1"))
    rank = parts(smoke("rollout.workers=1", "learner.processes=2", "learner.sharded=true"))
    for name in ("weights", "gradients", "AdamW moments"):
        assert rank[name] == whole[name] / 2
    cache = "key-value cache of the engine"
    assert cache not in whole and cache in parts(smoke())


def test_activations_are_those_autograd_keeps(smoke: Smoke) -> None:
    """Bytes saved for the backward pass of a real block, against the estimate: a factor of two."""
    config = smoke(
        "prompts_per_step=2",
        "samples_per_prompt=2",
        "data.train.max_prompt_tokens=192",
        "rollout.max_completion_tokens=64",
    )
    model = load_model(config.model, load_tokenizer(config.model), torch.float32, seed=0)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(4, 256, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    ratio = parts(config)["activations of a micro-batch"] / sum(kept.values())
    assert 0.5 < ratio < 2


def test_what_adds_memory_adds_it(smoke: Smoke) -> None:
    plain = parts(smoke())
    assert "reference model" not in plain
    assert parts(smoke("algorithm/kl=reference"))["reference model"] == plain["weights"]
    half = parts(smoke("model.dtype=bfloat16"))
    assert half["weights"] * 2 == plain["weights"]
    activations = "activations of a micro-batch"
    thrifty = parts(smoke("model.gradient_checkpointing=true"))
    assert thrifty[activations] < plain[activations]
    cache = "key-value cache of the engine"
    bounded = parts(smoke("rollout.engine.max_batch_samples=4"))
    assert bounded[cache] * 4 == plain[cache]  # 16 sequences otherwise


def test_no_weights_are_allocated(smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 70-billion-parameter shape is estimated at once: nothing but the meta device could."""
    config = smoke(
        "model.architecture.hidden_size=8192",
        "model.architecture.intermediate_size=28672",
        "model.architecture.num_hidden_layers=80",
        "model.architecture.num_attention_heads=64",
        "model.architecture.num_key_value_heads=8",
    )
    assert parts(config)["weights"] > 250e9


def test_architecture_that_cannot_be(smoke: Smoke, refused: Refused) -> None:
    with refused("model.architecture.model_type", "llma"):
        estimate(smoke("model.architecture.model_type=llma"))
    with refused("model.architecture"):
        estimate(smoke("model.architecture.num_attention_heads=3"))
    with refused("model.architecture.model_type"):
        estimate(smoke("~model.architecture.model_type"))
